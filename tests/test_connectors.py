"""The contract that every connector keeps; a new line in `CONNECTORS` is tested here without a new test.

`-k NAME` runs the contract tests of one connector, and those that it has for itself.
"""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acformer.anchors.search import select_anchors
from acformer.anchors.selectors import SELECTORS
from acformer.connectors import (
    CONNECTORS,
    Connector,
    Geometry,
    budget_options,
    build_connector,
    connector_options,
    list_connectors,
)
from acformer.connectors.blocks import CrossAttentionStack, FeedForward, Projector
from acformer.connectors.merging import fuse_rest, merge_rest
from acformer.connectors.queries import FusedQueries, LearnedQueries, PooledQueries, SelectedQueries
from acformer.connectors.resampler import Resampler
from acformer.errors import UsageError
from acformer.registry import options_of

SMALL = {
    "num_anchors": 9,
    "num_queries": 10,
    "num_tokens": 10,
    "kernel": [3, 2],
    "scale": [3, 2],
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "head_dim": 8,
    "ff_mult": 2,
}
CLIP = Geometry(32, 24, (6, 6), 1)
RANDOM = {"selector": "random"}
GEOMETRIES = {
    "clip": CLIP,
    "non-square": Geometry(32, 24, (3, 8), 1),
    "registers": Geometry(32, 24, (6, 6), 5),
    "siglip": Geometry(32, 24, (6, 6), 0),
}
names = pytest.mark.parametrize("name", list_connectors())
geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
ALL_SELECTORS = [*SELECTORS.names(), *SELECTORS.aliases]
# Every connector, and with every selector where it takes one.
CHOICES: list[tuple[str, dict[str, str]]] = [(name, {}) for name in list_connectors()]
CHOICES += [(n, {"selector": s}) for n, _ in CHOICES if "selector" in connector_options(n) for s in ALL_SELECTORS]


def small(name: str, geometry: Geometry = CLIP, seed: int = 0, **kwargs: Any) -> Connector:
    """In evaluation, where nothing is drawn."""
    torch.manual_seed(seed)
    options = connector_options(name)
    return build_connector(name, geometry, **{**{k: v for k, v in SMALL.items() if k in options}, **kwargs}).eval()


def pick(patches: Tensor, index: Tensor) -> Tensor:
    return torch.stack([image[chosen] for image, chosen in zip(patches, index, strict=True)])


@geometries
@names
def test_shape_is_num_tokens(name, geometry, make_features):
    connector = small(name, geometry)
    assert connector(make_features(connector, batch=3)).shape == (3, connector.num_tokens, 24)
    grid = connector.input_grid  # one that reads a smaller image counts its patches
    assert connector.num_tokens <= geometry.num_prefix_tokens + grid[0] * grid[1]


@geometries
@names
def test_every_parameter_learns(name, geometry, make_features):
    """In the second step at the latest: behind a matrix that starts at zero nothing learns in the first."""
    connector = small(name, geometry).train()
    optimizer = torch.optim.SGD(connector.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        connector(make_features(connector)).square().sum().backward()
        optimizer.step()
    idle = [key for key, p in connector.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@names
def test_a_step_without_images_reaches_every_weight(name):
    connector = small(name).train()
    zero_loss = connector.zero_loss()
    zero_loss.backward()
    assert zero_loss.item() == 0
    assert all(bool((p.grad == 0).all()) for p in connector.parameters())


@names
def test_bf16(name, make_features):
    """The row stays float32, as the encoder gives it."""
    connector = small(name).to(torch.bfloat16)
    features = make_features(connector, dtype=torch.bfloat16)
    output = connector(features)
    assert output.dtype == torch.bfloat16
    known = {key: value.float() for key, value in features.arrays.items()}
    exact = small(name)(features._replace(**known))
    # Measured at most 0.0143 (c_abstractor) in outputs up to 2.4: bf16 keeps 8 bits.
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.02)


@names
def test_saved_weights_give_the_same_output(name, make_features, tmp_path):
    connector, other = small(name), small(name, seed=1)
    features = make_features(connector)
    expected = connector(features)
    assert not torch.equal(other(features), expected)
    save_file(connector.state_dict(), tmp_path / "weights.safetensors")
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other(features), expected)


@names
def test_images_do_not_see_each_other(name, make_features):
    connector = small(name)
    features = make_features(connector, batch=3)
    last = features._replace(**{key: value[2:] for key, value in features.arrays.items()})
    # Measured at most 6e-8 in outputs up to 2.4; another matmul may sum one image in another order than three.
    torch.testing.assert_close(connector(features)[2:], connector(last), rtol=0, atol=2e-6)


@names
def test_what_comes_out_depends_on_the_image(name, make_features):
    connector = small(name)
    first, second = connector(make_features(connector, seed=1)), connector(make_features(connector, seed=2))
    assert (first - second).abs().amax(dim=(0, 2)).min() > 1e-4, "of every visual token"


@names
def test_builds_without_memory(name):
    """The config derives T from a connector on the meta device."""
    with torch.device("meta"):
        connector = small(name)
    assert connector.num_tokens == small(name).num_tokens
    assert all(parameter.is_meta for parameter in connector.parameters())


@pytest.mark.parametrize(("name", "options"), CHOICES, ids=[" ".join((name, *kw.values())) for name, kw in CHOICES])
@pytest.mark.parametrize("num_tokens", [7, 13, 31, 37, 38, 43])
def test_any_number_of_tokens_or_a_refusal(name, options, num_tokens, make_features):
    """An elastic connector gives any number that one built for it would give, and says what it can else."""
    connector = small(name, **options)
    features = make_features(connector)
    possible = small(name, **options, **budget_options(name, CLIP, num_tokens)).num_tokens == num_tokens
    if connector.elastic and possible:
        output = connector(features, num_tokens)
        assert output.shape == (2, num_tokens, 24)
        assert output.isfinite().all()
        assert torch.equal(connector(features), connector(features, connector.num_tokens))
    else:
        can = r"nearest: \d|must be in 1\.\.3[56]"
        refusal = can if connector.elastic else f"always gives {connector.num_tokens} "
        with pytest.raises(UsageError, match=refusal):
            connector(features, num_tokens)


@geometries
@names
@pytest.mark.parametrize("num_tokens", [1, 5, 10, 24, 1000])
def test_options_for_a_budget(name, geometry, num_tokens, make_features):
    """As near to the budget as the connector can come; whoever has no choice gives everything."""
    options = budget_options(name, geometry, num_tokens)
    connector = small(name, geometry, **options)
    assert connector(make_features(connector)).shape == (2, connector.num_tokens, 24)
    if not options:
        assert connector.num_tokens == geometry.num_patches
    elif num_tokens == 10:
        assert abs(connector.num_tokens - num_tokens) <= 2
    elif num_tokens == 1000:
        assert connector.num_tokens >= geometry.num_patches


def test_an_impossible_budget():
    with pytest.raises(UsageError, match="at least 1 visual token, got num_tokens=0"):
        budget_options("acformer", CLIP, 0)
    with pytest.raises(UsageError, match="unknown connector 'acfomer'"):
        budget_options("acfomer", CLIP, 9)


@names
def test_unknown_option(name):
    option = next(iter(connector_options(name)))
    with pytest.raises(UsageError, match=f"option of connector '{name}' '{option}s'; did you mean '{option}'"):
        build_connector(name, CLIP, **{f"{option}s": 1})


@names
@pytest.mark.parametrize("value", ["x", "4", None, [4.5], 0, -3, float("nan"), float("inf")])
def test_values_that_do_not_fit(name, value):
    """Whoever checks it, the message names the option."""
    for option, parameter in options_of(CONNECTORS[name]).items():
        if value is not None or "None" not in str(parameter.annotation):
            with pytest.raises(UsageError, match=f"{option}.* must be a |unknown {option} '{value}'; .*valid: "):
                small(name, **{option: value})


def test_numbers_and_bools_are_told_apart():
    with pytest.raises(UsageError, match=r"num_anchors of connector 'acformer' must be a positive int, got 4\.5"):
        small("acformer", num_anchors=4.5)
    with pytest.raises(UsageError, match=r"num_anchors .* got True"):
        small("acformer", num_anchors=True)
    with pytest.raises(UsageError, match=r"include_prefix .* must be a bool, got 1"):
        small("mlp", include_prefix=1)
    with pytest.raises(UsageError, match=r"kernel .* must be a positive int or list of ints, got \[2, 1\.5\]"):
        small("pixel_shuffle", kernel=[2, 1.5])
    for ff_mult in (3, 1.5):
        assert small("acformer", ff_mult=ff_mult).num_tokens == 10


@names
def test_an_image_without_patches(name):
    with pytest.raises(UsageError, match=r"smaller than one patch of the encoder: 0 x 6 patches"):
        small(name, Geometry(32, 24, (0, 6), 1))


@names
def test_compiles_into_one_graph(name, make_features):
    connector = small(name)
    features = make_features(connector)
    torch.compiler.reset()
    output = torch.compile(connector, fullgraph=True, backend="eager")(features)
    assert torch.equal(output, connector(features)), "the same kernels: no tolerance"
    torch.compiler.reset()


@names
def test_says_what_it_is(name):
    """In one line, for the tables; the base class's own would say nothing."""
    idea, base = (thing.__doc__.partition("\n")[0] for thing in (CONNECTORS[name], Connector))
    assert 30 < len(idea) < 120
    assert idea != base


def test_unknown_name():
    with pytest.raises(UsageError, match=r"unknown connector 'acfomer'; did you mean 'acformer'.*mlp, .*perceiver"):
        build_connector("acfomer", CLIP)
    with pytest.raises(UsageError, match="unknown connector 'x'; valid: "):
        connector_options("x")


def test_options_of_the_paper():
    """T = 145 from 24 x 24 patches unless told otherwise; depth 6, 8 heads of 64."""
    clip_l = Geometry(1024, 4096, (24, 24), 1)
    assert connector_options("acformer") == {
        "num_anchors": 144,
        "selector": "anchors",
        "stochastic_anchors": False,
        "depth": 6,
        "num_heads": 8,
        "head_dim": 64,
        "ff_mult": 4,
    }
    with torch.device("meta"):
        for name in ("acformer", "direct", "perceiver", "pooling", "pooling_pr", "random_pr", "top_p"):
            assert build_connector(name, clip_l).num_tokens == 145
        assert build_connector("e_vit", clip_l).num_tokens == 146
        assert build_connector("pixel_shuffle", clip_l).num_tokens == 144
        assert build_connector("mlp", clip_l).num_tokens == build_connector("linear", clip_l).num_tokens == 576
        assert build_connector("mlp", clip_l, include_prefix=True).num_tokens == 577


def test_a_new_connector_is_one_line(monkeypatch, make_features):
    class First(Connector):
        """The first `count` patches, each a token."""

        def __init__(self, geometry: Geometry, *, count: int = 2):
            super().__init__(geometry)
            self.count = count
            self.projector = Projector(geometry.vision_hidden_size, geometry.text_hidden_size)

        @property
        def num_tokens(self) -> int:
            return self.count

        def aggregate(self, features, num_tokens: int) -> Tensor:
            return self.projector(features.patches[:, :num_tokens])

    monkeypatch.setitem(CONNECTORS, "first", First)
    assert "first" in list_connectors()
    assert connector_options("first") == {"count": 2}
    assert build_connector("first", CLIP, count=5)(make_features(CLIP)).shape == (2, 5, 24)


def test_a_connector_may_take_other_values(monkeypatch):
    """A number may be as low as its default, an option of a type of its own is the connector's to check."""

    class Odd(Connector):
        num_tokens = 1

        def __init__(self, geometry: Geometry, *, offset: int = -2, width: int | None = None, sizes: tuple = ()):
            super().__init__(geometry)
            self.options = offset, width, sizes

        def aggregate(self, features, num_tokens: int) -> Tensor:
            return features.tokens

    monkeypatch.setitem(CONNECTORS, "odd", Odd)
    assert build_connector("odd", CLIP, offset=-2, width=None, sizes=[1]).options == (-2, None, [1])
    assert build_connector("odd", CLIP, offset=0, width=3).options == (0, 3, ())
    with pytest.raises(UsageError, match=r"option offset of connector 'odd' must be an int of at least -2, got -3"):
        build_connector("odd", CLIP, offset=-3)
    with pytest.raises(UsageError, match="option width of connector 'odd' must be a positive int or nothing, got 'x'"):
        build_connector("odd", CLIP, width="x")


def test_a_connector_must_say_what_it_does():
    class Idle(Connector):
        """Nothing."""

    with pytest.raises(TypeError, match="abstract"):
        Idle(CLIP)


class TestMLP:
    def test_is_llavas(self, make_features):
        features, connector = make_features(CLIP), small("mlp")
        first, _, second = connector.projector
        expected = second(nn.functional.gelu(first(features.tokens[:, 1:])))
        assert torch.equal(connector(features), expected)

    @geometries
    def test_include_prefix(self, geometry, make_features):
        connector, features = small("mlp", geometry, include_prefix=True), make_features(geometry)
        assert connector.num_tokens == features.tokens.shape[1]
        assert torch.equal(connector(features), connector.projector(features.tokens))


class TestLinear:
    def test_is_one_matrix(self, make_features):
        features, connector = make_features(CLIP), small("linear")
        assert {*connector.state_dict()} == {"projector.weight", "projector.bias"}
        expected = features.patches @ connector.projector.weight.T + connector.projector.bias
        # Measured 0 in outputs up to 2.4; a fused sum may differ in the last digit.
        torch.testing.assert_close(connector(features), expected, rtol=0, atol=2e-6)


class TestPerceiver:
    def test_queries_are_the_latents(self, make_features):
        queries = LearnedQueries(CLIP, 5)
        assert torch.equal(queries(make_features(CLIP), 5), queries.latents.expand(2, 5, 32))

    def test_needs_no_row(self, make_features):
        features = make_features(CLIP)._replace(cls_attention=None)
        assert small("perceiver")(features).shape == (2, 10, 24)


class TestAcFormer:
    @geometries
    def test_queries_are_cls_and_the_anchors(self, geometry, make_features):
        """In raster order; registers are never queries, and SigLIP has no [CLS]."""
        features, prefix = make_features(geometry), geometry.num_prefix_tokens
        has_cls = prefix > 0
        queries = SelectedQueries(geometry, 7)(features, 7 + has_cls)
        for image, anchors in enumerate(select_anchors(features.cls_attention, 7)):
            expected = features.tokens[image, [0] * has_cls + [prefix + int(anchor) for anchor in anchors]]
            assert torch.equal(queries[image], expected)

    @pytest.mark.parametrize(("geometry", "num_tokens"), [("siglip", 9), ("clip", 10), ("registers", 10)])
    def test_num_tokens(self, geometry, num_tokens):
        assert small("acformer", GEOMETRIES[geometry]).num_tokens == num_tokens

    def test_reads_all_tokens(self, make_features):
        """Keys and values: patches that are no anchors, [CLS] and registers too."""
        geometry = GEOMETRIES["registers"]
        features, connector = make_features(geometry), small("acformer", geometry)
        tokens = features.tokens.requires_grad_()
        connector(features).sum().backward()
        assert bool(tokens.grad.abs().sum(dim=-1).gt(0).all())

    def test_all_budgets_have_the_same_weights(self, make_features):
        """What a connector of another budget gives is what asking for that budget gives."""
        connector, other = small("acformer", num_anchors=9), small("acformer", num_anchors=20)
        other.load_state_dict(connector.state_dict())
        features = make_features(CLIP)
        assert torch.equal(connector(features, 21), other(features))

    def test_more_anchors_than_patches(self):
        with pytest.raises(UsageError, match=r"num_anchors must be in 1\.\.36 \(the number of patches\), got 37"):
            small("acformer", num_anchors=37)

    @pytest.mark.parametrize("num_tokens", [1, 38])
    def test_impossible_number_of_tokens(self, num_tokens, make_features):
        with pytest.raises(ValueError, match=r"num_anchors must be in 1\.\.36"):
            small("acformer")(make_features(CLIP), num_tokens)

    def test_an_encoder_without_a_row(self, make_features):
        with pytest.raises(UsageError, match=r"no \[CLS\] attention"):
            small("acformer")(make_features(CLIP)._replace(cls_attention=None))

    @pytest.mark.parametrize("selector", ALL_SELECTORS)
    def test_any_selector(self, selector, make_features):
        """The same weights, other queries."""
        features = make_features(CLIP)
        connector = small("acformer", selector=selector)
        patches = SELECTORS[selector](features, 9 if selector != "dominant_contextual" else 7)
        queries = connector.queries(features, 10)
        assert torch.equal(queries[:, 0], features.tokens[:, 0])
        assert torch.equal(queries[:, 1 : 1 + patches.shape[1]], pick(features.patches, patches))
        assert connector(features).shape == (2, 10, 24)
        assert connector.state_dict().keys() == small("acformer").state_dict().keys()

    @pytest.mark.parametrize("selector", ["anchors", "cls_topk", "dominant_contextual", "norm"])
    def test_stochastic_anchors(self, selector, make_features):
        """Drawn while training; in evaluation they are the deterministic ones."""
        features, plain = make_features(CLIP), small("acformer", selector=selector)
        connector = small("acformer", selector=selector, stochastic_anchors=True)
        assert torch.equal(connector(features), plain(features))
        connector.train()
        assert not torch.equal(connector(features), connector(features))
        assert torch.equal(plain.train()(features), plain(features))

    @pytest.mark.parametrize("selector", ["grid", "diverse"])
    def test_what_cannot_be_drawn(self, selector):
        with pytest.raises(UsageError, match=f"'{selector}' cannot draw .*: anchors, cls_topk, .*random"):
            small("acformer", selector=selector, stochastic_anchors=True)

    def test_unknown_selector(self):
        for name in ("acformer", "direct"):
            with pytest.raises(UsageError, match="unknown selector 'anchor'; did you mean 'anchors'"):
                small(name, selector="anchor")

    @pytest.mark.parametrize("selector", ["grid", "diverse", "norm", "random"])
    def test_selectors_that_need_no_row(self, selector, make_features):
        features = make_features(CLIP)._replace(cls_attention=None)
        assert small("acformer", selector=selector)(features).shape == (2, 10, 24)


class TestAliases:
    @pytest.mark.parametrize(("other", "name", "options"), [("top_p", "direct", {}), ("random_pr", "acformer", RANDOM)])
    def test_the_papers_names(self, other, name, options, make_features):
        """Whatever is told or asked by one name is the same by the other: options, budgets, weights, tokens."""
        assert connector_options(other) == {**connector_options(name), **options}
        assert budget_options(other, CLIP, 8) == budget_options(name, CLIP, 8)
        connector, expected = small(other), small(name, **options)
        assert type(connector) is type(expected)
        features = make_features(CLIP)
        assert torch.equal(connector(features), expected(features))
        assert connector.state_dict().keys() == expected.state_dict().keys()
        assert other not in list_connectors()
        with pytest.raises(UsageError, match=f"option of connector '{other}' 'num_anchor'; did you mean 'num_anchors'"):
            build_connector(other, CLIP, num_anchor=3)

    def test_an_option_of_its_own_goes_before_the_aliases(self, make_features):
        features = make_features(CLIP)
        assert torch.equal(small("random_pr", selector="norm")(features), small("acformer", selector="norm")(features))

    def test_options_by_their_former_names(self):
        """As configs and recipes may still have them."""
        assert small("token_packer", levels=[1, 2]).hidden_layers == (1, 2)
        with pytest.raises(UsageError, match="option hidden_layers of connector 'token_packer' must be a list of ints"):
            small("token_packer", levels="x")
        with pytest.raises(UsageError, match=r"option of connector 'token_packer' 'level'"):
            small("token_packer", level=[1])

    def test_a_connector_of_that_name_goes_before_the_alias(self, monkeypatch):
        monkeypatch.setitem(CONNECTORS, "top_p", CONNECTORS["mlp"])
        assert build_connector("top_p", CLIP, include_prefix=True).num_tokens == 37


class TestRandomQueries:
    def test_evaluation_can_be_repeated_and_training_varies(self, make_features):
        features, connector = make_features(CLIP), small("acformer", **RANDOM)
        assert torch.equal(connector(features), connector(features))
        connector.train()
        assert not torch.equal(connector(features), connector(features))

    def test_images_differ_in_what_is_drawn(self, make_features):
        features = make_features(CLIP, batch=8)
        assert len({tuple(row) for row in SELECTORS["random"](features, 9).tolist()}) == 8


class TestPooling:
    @pytest.mark.parametrize(("grid", "num_tokens", "layout"), [((6, 6), 10, (3, 3)), ((4, 9), 7, (2, 3))])
    def test_means_of_regions(self, grid, num_tokens, layout, make_features):
        """Where the layout divides the grid, by hand; [CLS] first."""
        features = make_features(Geometry(32, 24, grid, 5))
        queries = PooledQueries(Geometry(32, 24, grid, 5), num_tokens)(features, num_tokens)
        (rows, cols), (h, w) = layout, grid
        image = features.patches.unflatten(1, (rows, h // rows, cols, w // cols))
        assert torch.equal(queries[:, 0], features.tokens[:, 0])
        # Measured 1.2e-7: sums in another order.
        torch.testing.assert_close(queries[:, 1:], image.mean(dim=(2, 4)).flatten(1, 2), rtol=0, atol=5e-7)

    def test_regions_that_overlap(self, make_features):
        """8 columns in 3: columns 0-2, 2-5, 5-7."""
        geometry = GEOMETRIES["non-square"]
        features = make_features(geometry)
        rows = features.patches.unflatten(1, (3, 8))
        expected = torch.stack([rows[:, :, a:b].mean(dim=2) for a, b in [(0, 3), (2, 6), (5, 8)]], dim=2)
        queries = PooledQueries(geometry, 10)(features, 10)
        # Measured 0; sums in another order would differ by 1.2e-7.
        torch.testing.assert_close(queries[:, 1:], expected.flatten(1, 2), rtol=0, atol=5e-7)

    def test_all_patches(self, make_features):
        features, connector = make_features(CLIP), small("pooling", num_tokens=37)
        assert torch.equal(connector(features), connector.projector(features.tokens))

    @pytest.mark.parametrize("name", ["pooling", "pooling_pr"])
    def test_a_number_without_layout(self, name, make_features):
        """Told in numbers that can be given: with [CLS], which is one of them."""
        refusal = r"^8 tokens cannot be laid out as 1 \+ rows x columns within 6 x 6 patches; nearest: 7 and 9$"
        with pytest.raises(UsageError, match=refusal):
            small(name, num_tokens=8)
        with pytest.raises(UsageError, match=refusal):
            small(name)(make_features(CLIP), 8)
        assert {small(name, num_tokens=count).num_tokens for count in (7, 9)} == {7, 9}
        with pytest.raises(UsageError, match=r"^7 tokens cannot be laid out as rows x columns .* nearest: 6 and 8$"):
            small(name, GEOMETRIES["siglip"], num_tokens=7)

    def test_stack_reads_the_same_queries(self, make_features):
        features, connector = make_features(CLIP), small("pooling_pr")
        pooled = small("pooling").queries(features, 10)
        assert torch.equal(connector(features), connector.projector(connector.stack(pooled, features.tokens)))


class TestDirect:
    """`direct` and `e_vit`: no cross-attention."""

    @pytest.mark.parametrize("selector", ALL_SELECTORS)
    @geometries
    def test_selected_tokens_into_the_projector(self, selector, geometry, make_features):
        features, connector = make_features(geometry), small("direct", geometry, selector=selector)
        queries = SelectedQueries(geometry, 9, selector).eval()(features, connector.num_tokens)
        assert torch.equal(connector(features), connector.projector(queries))

    def test_e_vit_fuses_the_rest(self, make_features):
        features = make_features(GEOMETRIES["registers"], seed=3)
        connector = small("e_vit", GEOMETRIES["registers"])
        assert connector.num_tokens == 11
        tokens = FusedQueries(GEOMETRIES["registers"], 9)(features, 11)
        for image, anchors in enumerate(select_anchors(features.cls_attention, 9).tolist()):
            assert torch.equal(tokens[image, 1:10], features.patches[image, anchors])
            rest = [patch for patch in range(36) if patch not in anchors]
            weight = [features.cls_attention[image, :, patch].mean().item() for patch in rest]
            fused = sum(a * features.patches[image, patch] for a, patch in zip(weight, rest, strict=True)) / sum(weight)
            # Measured 1.2e-7: sums in another order.
            torch.testing.assert_close(tokens[image, 10], fused, rtol=0, atol=1e-6)
        assert torch.equal(connector(features), connector.projector(tokens))

    def test_e_vit_needs_a_rest(self, make_features):
        assert small("e_vit", num_anchors=35).num_tokens == 37
        refusal = r"num_anchors must be in 1\.\.35 \(the number of patches less 1\), got 36"
        with pytest.raises(UsageError, match=refusal):
            small("e_vit", num_anchors=36)
        with pytest.raises(UsageError, match=refusal):
            small("e_vit")(make_features(CLIP), 38)

    def test_no_attention_at_all_fuses_to_nothing(self):
        assert torch.equal(fuse_rest(torch.ones(1, 3, 2), torch.tensor([[0]]), torch.zeros(1, 3)), torch.zeros(1, 1, 2))

    def test_contextual_tokens(self):
        """Patches 1 and 4 are chosen. Of 0, 2, 3, 5 the targets are 0 and 3; 2 looks like 3, and 5 like 0."""
        patches = torch.tensor([[[2.0, 0], [9, 9], [0, 1], [0, 3], [9, 9], [4, 1]]])
        merged = merge_rest(patches, torch.tensor([[1, 4]]), 2)
        assert merged.tolist() == [[[3, 0.5], [0, 2]]]

    @pytest.mark.parametrize(("num_tokens", "contextual"), [(64, 10), (128, 20), (192, 30)])
    def test_shares_of_visionzip(self, num_tokens, contextual, make_features):
        """[CLS], the rest of the dominant tokens, then so many means: 54 + 10, 108 + 20, 162 + 30."""
        geometry = Geometry(8, 8, (16, 16), 1)
        features = make_features(geometry)
        tokens = SelectedQueries(geometry, num_tokens - 1, "dominant_contextual")(features, num_tokens)
        dominant = SELECTORS["cls_topk"](features, num_tokens - 1 - contextual)
        assert torch.equal(tokens[:, 1:-contextual], pick(features.patches, dominant))
        assert torch.equal(tokens[:, -contextual:], merge_rest(features.patches, dominant, contextual))

    def test_contextual_tokens_with_any_selector(self, make_features):
        """`dominant_contextual` is `cls_topk` and a share; another selector may have one, or that one none."""
        features = make_features(CLIP)
        assert SELECTORS["dominant_contextual"] is SELECTORS["cls_topk"]
        tokens = SelectedQueries(CLIP, 9, "grid", contextual=0.2)(features, 10)
        assert torch.equal(tokens[:, 1:8], pick(features.patches, SELECTORS["grid"](features, 7)))
        assert torch.equal(tokens[:, 8:], merge_rest(features.patches, SELECTORS["grid"](features, 7), 2))
        plain, none = (
            SelectedQueries(CLIP, 9, name, contextual=0)(features, 10) for name in ("cls_topk", "dominant_contextual")
        )
        assert torch.equal(plain, none)

    def test_contextual_tokens_are_means_of_all_that_is_left(self, make_features):
        """Weighted by how many joined, they sum to the sum of the patches that were not chosen."""
        patches, index = make_features(CLIP).patches, torch.tensor([[0, 7, 9], [3, 4, 35]])
        one = merge_rest(patches, index, 1)
        rest = (patches.sum(dim=1) - pick(patches, index).sum(dim=1)) / 33
        # Measured 9e-8.
        torch.testing.assert_close(one[:, 0], rest, rtol=0, atol=5e-7)
        everyone = merge_rest(patches, index, 33)
        others = [[n for n in range(36) if n not in chosen] for chosen in index.tolist()]
        assert torch.equal(everyone, pick(patches, torch.tensor(others)))


class TestPixelShuffle:
    def test_order(self, make_features):
        """Tokens in raster order, and so the patches within one."""
        features, connector = make_features(CLIP), small("pixel_shuffle", kernel=(3, 2))
        image = features.patches.unflatten(1, (6, 6))
        blocks = [
            torch.cat([image[:, 3 * row + y, 2 * col + x] for y in range(3) for x in range(2)], dim=-1)
            for row in range(2)
            for col in range(3)
        ]
        assert torch.equal(connector(features), connector.projector(torch.stack(blocks, dim=1)))

    def test_one_patch_a_block_is_mlp(self, make_features):
        features = make_features(CLIP)
        assert torch.equal(small("pixel_shuffle", kernel=1)(features), small("mlp")(features))

    @pytest.mark.parametrize(("kernel", "message"), [(4, "does not divide 6 x 6"), ([2, 3, 1], "two"), ([0, 2], "two")])
    def test_blocks_that_do_not_fit(self, kernel, message):
        with pytest.raises(UsageError, match=rf"kernel.*{message}"):
            small("pixel_shuffle", kernel=kernel)


class TestStack:
    def test_is_equations_4_to_6(self):
        """Written out with matrices, in float64."""
        torch.manual_seed(0)
        stack = CrossAttentionStack(12, depth=2, num_heads=3, head_dim=5, ff_mult=2).double()
        queries, features = torch.randn(2, 4, 12).double(), torch.randn(2, 9, 12).double()
        hidden = queries
        for layer in stack.layers:
            attention, (norm, up, gelu, down) = layer.attention, layer.feed_forward
            key, value = (attention.norm_features(features) @ attention.kv_proj.weight.T).split(15, dim=-1)
            query = attention.norm_queries(hidden) @ attention.q_proj.weight.T
            mixed = [
                ((q @ k.mT) / 5**0.5).softmax(-1) @ v
                for q, k, v in zip(query.split(5, -1), key.split(5, -1), value.split(5, -1), strict=True)
            ]
            hidden = hidden + torch.cat(mixed, -1) @ attention.o_proj.weight.T
            hidden = hidden + gelu(norm(hidden) @ up.weight.T) @ down.weight.T
        # Measured 1.3e-15.
        torch.testing.assert_close(stack(queries, features), stack.norm(hidden), rtol=0, atol=1e-13)

    def test_only_norms_and_projector_have_biases(self):
        connector = small("acformer")
        assert isinstance(connector, Resampler)
        linear = [m for m in connector.stack.modules() if isinstance(m, nn.Linear)]
        assert linear
        assert all(m.bias is None for m in linear)

    @pytest.mark.parametrize("hidden", range(1, 100, 7))
    def test_feed_forward_width_comes_back_from_its_ratio(self, hidden):
        assert FeedForward(49, hidden / 49)[1].out_features == hidden
