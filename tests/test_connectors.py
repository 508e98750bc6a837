"""The contract that every connector keeps; a new line in `CONNECTORS` is tested here without a new test."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acformer.anchors import select_anchors
from acformer.connectors import (
    CONNECTORS,
    Connector,
    Geometry,
    build_connector,
    connector_options,
    list_connectors,
)
from acformer.connectors.blocks import CrossAttentionStack, FeedForward, Projector
from acformer.connectors.queries import AnchorQueries, LearnedQueries
from acformer.connectors.stack import StackConnector
from acformer.errors import UsageError

SMALL = {"num_anchors": 9, "num_queries": 10, "depth": 2, "num_heads": 2, "head_dim": 8, "ff_mult": 2}
CLIP = Geometry(32, 24, (6, 6), 1)
GEOMETRIES = {
    "clip": CLIP,
    "non-square": Geometry(32, 24, (3, 8), 1),
    "registers": Geometry(32, 24, (6, 6), 5),
    "siglip": Geometry(32, 24, (6, 6), 0),
}
names = pytest.mark.parametrize("name", list_connectors())
geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def small(name: str, geometry: Geometry = CLIP, seed: int = 0, **kwargs: Any) -> Connector:
    torch.manual_seed(seed)
    options = connector_options(name)
    return build_connector(name, geometry, **{**{k: v for k, v in SMALL.items() if k in options}, **kwargs})


@geometries
@names
def test_shape_is_num_tokens(name, geometry, make_features):
    connector = small(name, geometry)
    assert connector(make_features(geometry, batch=3)).shape == (3, connector.num_tokens, 24)


@geometries
@names
def test_every_parameter_learns(name, geometry, make_features):
    connector = small(name, geometry)
    connector(make_features(geometry)).square().sum().backward()
    idle = [key for key, p in connector.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@names
def test_bf16(name, make_features):
    """The row stays float32, as the encoder gives it."""
    connector = small(name).to(torch.bfloat16)
    output = connector(make_features(CLIP, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    exact = small(name)(make_features(CLIP))
    # Measured at most 0.0063 in outputs up to 1.4: bf16 keeps 8 bits.
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.02)


@names
def test_saved_weights_give_the_same_output(name, make_features, tmp_path):
    connector, other = small(name), small(name, seed=1)
    expected = connector(make_features(CLIP))
    assert not torch.equal(other(make_features(CLIP)), expected)
    save_file(connector.state_dict(), tmp_path / "weights.safetensors")
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other(make_features(CLIP)), expected)


@names
def test_images_do_not_see_each_other(name, make_features):
    connector, features = small(name), make_features(CLIP, batch=3)
    last = features._replace(tokens=features.tokens[2:], cls_attention=features.cls_attention[2:])
    # Measured 0 in outputs up to 1.4; another matmul may sum one image in another order than three.
    torch.testing.assert_close(connector(features)[2:], connector(last), rtol=0, atol=2e-6)


@names
def test_builds_without_memory(name):
    """The config derives T from a connector on the meta device."""
    with torch.device("meta"):
        connector = small(name)
    assert connector.num_tokens == small(name).num_tokens
    assert all(parameter.is_meta for parameter in connector.parameters())


@names
def test_any_number_of_tokens_or_a_refusal(name, make_features):
    connector, features = small(name), make_features(CLIP)
    for num_tokens in (2, 7, 30):
        if connector.elastic:
            assert connector(features, num_tokens).shape == (2, num_tokens, 24)
            assert torch.equal(connector(features), connector(features, connector.num_tokens))
        else:
            with pytest.raises(UsageError, match=f"always gives {connector.num_tokens} .* cannot give {num_tokens}"):
                connector(features, num_tokens)


@names
def test_unknown_option(name):
    option = next(iter(connector_options(name)))
    with pytest.raises(UsageError, match=f"option of connector '{name}' '{option}s'; did you mean '{option}'"):
        build_connector(name, CLIP, **{f"{option}s": 1})


@names
@pytest.mark.parametrize("value", ["x", "4", None, [4], 0, -3, float("nan"), float("inf")])
def test_values_that_do_not_fit(name, value):
    for option, default in connector_options(name).items():
        wanted = "bool" if default is True or default is False else "positive (int|float)"
        with pytest.raises(UsageError, match=f"option {option} of connector '{name}' must be a {wanted}, got "):
            small(name, **{option: value})


def test_numbers_and_bools_are_told_apart():
    with pytest.raises(UsageError, match=r"num_anchors of connector 'acformer' must be a positive int, got 4\.5"):
        small("acformer", num_anchors=4.5)
    with pytest.raises(UsageError, match=r"num_anchors .* got True"):
        small("acformer", num_anchors=True)
    with pytest.raises(UsageError, match=r"include_prefix .* must be a bool, got 1"):
        small("mlp", include_prefix=1)
    for ff_mult in (3, 1.5):
        assert small("acformer", ff_mult=ff_mult).num_tokens == 10


@names
def test_an_image_without_patches(name):
    with pytest.raises(UsageError, match=r"smaller than one patch of the encoder: 0 x 6 patches"):
        small(name, Geometry(32, 24, (0, 6), 1))


@names
def test_compiles_into_one_graph(name, make_features):
    connector, features = small(name), make_features(CLIP)
    torch.compiler.reset()
    output = torch.compile(connector, fullgraph=True, backend="eager")(features)
    assert torch.equal(output, connector(features)), "the same kernels: no tolerance"
    torch.compiler.reset()


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
        "depth": 6,
        "num_heads": 8,
        "head_dim": 64,
        "ff_mult": 4,
    }
    with torch.device("meta"):
        assert build_connector("acformer", clip_l).num_tokens == 145
        assert build_connector("perceiver", clip_l).num_tokens == 145
        assert build_connector("mlp", clip_l).num_tokens == 576
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
    with pytest.raises(UsageError, match=r"option offset of connector 'odd' .* got -3"):
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
        queries = AnchorQueries(geometry, 7)(features, 7 + has_cls)
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
        with pytest.raises(UsageError, match=r"num_anchors=37 .*1\.\.36.*6 x 6 patches"):
            small("acformer", num_anchors=37)

    @pytest.mark.parametrize("num_tokens", [1, 38])
    def test_impossible_number_of_tokens(self, num_tokens, make_features):
        with pytest.raises(ValueError, match=r"num_anchors must be in 1\.\.36"):
            small("acformer")(make_features(CLIP), num_tokens)

    def test_an_encoder_without_a_row(self, make_features):
        with pytest.raises(UsageError, match=r"no \[CLS\] attention"):
            small("acformer")(make_features(CLIP)._replace(cls_attention=None))


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
        assert isinstance(connector, StackConnector)
        linear = [m for m in connector.stack.modules() if isinstance(m, nn.Linear)]
        assert linear
        assert all(m.bias is None for m in linear)

    @pytest.mark.parametrize("hidden", range(1, 100, 7))
    def test_feed_forward_width_comes_back_from_its_ratio(self, hidden):
        assert FeedForward(49, hidden / 49)[1].out_features == hidden
