"""`acformer_v2`: without its parts the paper's connector to the bit; each part what its formula says; what it costs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from acformer.anchors.search import select_anchors
from acformer.connectors import Geometry, build_connector
from acformer.connectors.acformer_v2 import (
    Queries,
    Talk,
    centres,
    place_code,
    squared_distances,
)
from acformer.errors import UsageError
from acformer.training.trace import FlopCounter
from acformer.vision.features import VisionFeatures

PARTS = ("stem", "places", "talk", "near", "block")
NONE, ALL = {"selector": "anchors", **dict.fromkeys(PARTS, False)}, dict.fromkeys(PARTS, True)
SIZES = {"depth": 2, "num_heads": 2, "head_dim": 8, "ff_mult": 2, "num_anchors": 9}
GEOMETRIES = {
    "clip": Geometry(32, 24, (6, 6), 1),
    "non-square": Geometry(32, 24, (3, 8), 1),
    "registers": Geometry(32, 24, (6, 6), 5),
    "siglip": Geometry(32, 24, (6, 6), 0),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
CLIP = GEOMETRIES["clip"]


def new(geometry=CLIP, seed=0, name="acformer_v2", **options):
    torch.manual_seed(seed)
    return build_connector(name, geometry, **{**SIZES, **options}).eval()


def shaken(connector):
    """With weights that are not zero anywhere."""
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return connector


@geometries
@pytest.mark.parametrize("options", [{}, {"selector": "diverse"}, {"selector": "dominant_contextual"}])
def test_without_its_parts_it_is_acformer(geometry, options, make_features):
    features = make_features(geometry)
    old, bare = new(geometry, name="acformer", **options), new(geometry, **{**NONE, **options})
    assert bare.state_dict().keys() == old.state_dict().keys()
    for num_tokens in (10, 17):
        assert torch.equal(bare(features, num_tokens), old(features, num_tokens))


@pytest.mark.parametrize("part", PARTS)
def test_weights_of_acformer_are_taken_and_a_part_adds_its_own(part, make_features):
    old, features = new(name="acformer"), make_features(CLIP)
    grown = new(**{**NONE, part: True}, seed=1)
    missing, unexpected = grown.load_state_dict(old.state_dict(), strict=False)
    assert unexpected == []
    assert {name.partition(".")[0] for name in missing} == {part}
    same = torch.equal(grown(features), old(features))
    assert same == (part in ("places", "block")), "these start at zero"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_has_learnt_changes_what_comes_out(part, make_features):
    features = make_features(CLIP)
    whole = shaken(new(**ALL))
    without = new(**{**ALL, part: False})
    without.load_state_dict(whole.state_dict(), strict=False)
    assert (whole(features) - without(features)).abs().max() > 1e-3


@geometries
def test_all_parts_learn_at_any_number_of_tokens(geometry, make_features):
    connector = shaken(new(geometry, **ALL)).train()  # behind a matrix of zeros nothing learns in the first step
    features = make_features(geometry)
    num_cls = geometry.num_cls
    for num_tokens in (num_cls + 1, 7, 13, geometry.num_patches + num_cls):
        connector.zero_grad()
        output = connector(features, num_tokens)
        assert output.shape == (2, num_tokens, 24)
        output.square().sum().backward()
        # Of one token nothing can be mixed: its attention's weights are 1 whatever they are asked.
        if num_tokens > 2:
            assert [k for k, p in connector.named_parameters() if p.grad is None or not p.grad.any()] == []
        assert all(p.grad.isfinite().all() for p in connector.parameters() if p.grad is not None)
    with pytest.raises(UsageError, match=r"must be in 1\.\."):
        connector(features, geometry.num_patches + num_cls + 1)


def test_bf16_with_all_parts(make_features):
    exact, rounded = shaken(new(**ALL)), shaken(new(**ALL)).to(torch.bfloat16)
    rounded.load_state_dict(exact.state_dict())
    output = rounded(make_features(CLIP, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    # Measured 0.012 in outputs up to 1.4: bf16 keeps 8 bits; a patch may change its cell.
    torch.testing.assert_close(output.float(), exact(make_features(CLIP)), rtol=0, atol=0.03)


@pytest.mark.slow
def test_compiles_and_exports_with_all_parts(make_features):
    connector, features = shaken(new(**ALL)), make_features(CLIP, batch=3)
    torch.compiler.reset()
    compiled = torch.compile(connector, fullgraph=True, backend="eager")
    assert torch.equal(compiled(features), connector(features))
    torch.compiler.reset()

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.connector = connector

        def forward(self, tokens, attention):
            return self.connector(VisionFeatures(tokens, attention, CLIP.grid, 1))

    batch = torch.export.Dim("batch", min=2, max=64)
    inputs = features.tokens, features.cls_attention
    exported = torch.export.export(Tokens(), inputs, dynamic_shapes=({0: batch}, {0: batch}), strict=False).module()
    # Measured 0: the same kernels.
    torch.testing.assert_close(exported(*inputs), connector(features), rtol=0, atol=2e-6)
    twice = make_features(CLIP, batch=6)
    assert exported(twice.tokens, twice.cls_attention).shape == (6, 10, 24)


@pytest.mark.slow
def test_one_more_graph_serves_every_other_number_of_tokens(make_features):
    """As of `acformer` (test_compile.py); with `spaced`, whose steps Python counts, each has its own."""
    connector, features = shaken(new(**{**ALL, "selector": "anchors"})), make_features(CLIP, batch=3)
    torch.compiler.reset()
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(connector, fullgraph=True, backend=backend)
    for num_tokens in (10, 13, 20, 26):
        torch.testing.assert_close(compiled(features, num_tokens), connector(features, num_tokens), rtol=0, atol=2e-6)
    assert backend.frame_count <= 2
    torch.compiler.reset()


def test_by_default_it_has_three_parts_and_spaced_queries(make_features):
    features = make_features(CLIP)
    chosen = dict.fromkeys(("block", "places", "near"), True)
    default, same = shaken(new()), new(**{**NONE, **chosen, "selector": "spaced"})
    same.load_state_dict(default.state_dict())
    assert torch.equal(default(features), same(features))


def multiply_adds(name, **options):
    """Of one image at CLIP ViT-L/14-336's size, 145 tokens, a language model of width 4096."""
    geometry = Geometry(1024, 4096, (24, 24), 1)
    with torch.device("meta"):
        connector = build_connector(name, geometry, **options)
        features = VisionFeatures(torch.empty(1, 577, 1024), torch.empty(1, 16, 576), (24, 24), 1)
        with FlopCounter() as counter, torch.no_grad():
            connector(features)
    return counter.flops / 2


@pytest.mark.parametrize("options", [{}, ALL], ids=["default", "all parts"])
def test_costs_at_most_fifteen_percent_more_than_acformer(options):
    paper = multiply_adds("acformer")
    assert paper == pytest.approx(15.4e9, rel=0.02)  # by hand: 6 layers of 2.06 G, projector 3.04 G
    more = multiply_adds("acformer_v2", **options) / paper - 1
    assert 0.01 < more <= 0.15
    assert multiply_adds("acformer_v2", **NONE) == paper


# Parts


def test_the_stem_leaves_the_choice_of_anchors_alone(make_features):
    features, connector = make_features(CLIP), shaken(new(**{**NONE, "stem": True}))
    seen = connector.stem(features)
    queries = connector.placed_queries(features, seen, 10)
    for image, anchors in enumerate(select_anchors(features.cls_attention, 9).tolist()):
        assert torch.equal(queries.vectors[image, 1:], seen.patches[image, anchors])
        expected = [[(n % 6 + 0.5) / 6, (n // 6 + 0.5) / 6] for n in anchors]
        torch.testing.assert_close(queries.places[image, 1:], torch.tensor(expected))
    assert queries.has_place.tolist() == [False] + [True] * 9
    assert torch.equal(seen.tokens[:, 0], features.tokens[:, 0])


def test_the_stem_is_its_formula(make_features):
    features, stem = make_features(CLIP), shaken(new(**{**NONE, "stem": True})).stem
    around = neighbours(stem.norm(features.patches), stem.depthwise)
    expected = features.patches + stem.squeeze_excite(around).flatten(1, 2)
    # Measured 5e-7: sums in another order.
    torch.testing.assert_close(stem(features).patches, expected, rtol=0, atol=5e-6)


def test_the_block_is_its_formula_and_leaves_the_prefix(make_features):
    features, block = make_features(CLIP), shaken(new(**{**NONE, "block": True})).block
    around = F.silu(neighbours(F.silu(block.norm(features.patches) @ block.down.weight.T), block.depthwise))
    expected = features.patches + block.squeeze_excite(around).flatten(1, 2) @ block.up.weight.T
    # Measured 1.2e-7.
    torch.testing.assert_close(block(features).patches, expected, rtol=0, atol=5e-6)
    assert torch.equal(block(features).tokens[:, :1], features.tokens[:, :1])


def neighbours(patches, depthwise):
    """A depth-wise 3 x 3 convolution over 6 x 6 patches, written out: (B, 36, C) -> (B, 6, 6, C)."""
    image = F.pad(patches.unflatten(1, (6, 6)), (0, 0, 1, 1, 1, 1))
    kernel = depthwise.weight[:, 0]  # (C, 3, 3)
    return sum(image[:, y : y + 6, x : x + 6] * kernel[:, y, x] for y in range(3) for x in range(3))


def test_no_two_places_have_one_code():
    codes = place_code(centres((24, 24), torch.device("cpu")))
    assert codes.shape == (576, 64)
    assert codes.abs().max() <= 1
    apart = torch.cdist(codes, codes) + 10 * torch.eye(576)
    assert apart.min() > 2  # measured 4.5
    # The same place whatever the grid: the middle of the image.
    middle = place_code(torch.tensor([0.5, 0.5]))
    assert torch.equal(place_code(centres((5, 5), codes.device))[12], middle)


def test_distances_in_cells_and_none_to_what_has_no_place():
    places = torch.tensor([[[0.0, 0], [0.25, 0.5], [0.75, 0.5]]])
    queries = Queries(torch.zeros(1, 3, 4), places, torch.tensor([False, True, True]))
    assert squared_distances(queries).tolist() == [[[0, 0, 0], [0, 0, 0.75], [0, 0.75, 0]]]


def test_near_is_its_formula(make_features):
    """One layer and nothing after it, written out a head at a time; [CLS] reads as before and is read as before."""
    connector, features = shaken(new(**{**NONE, "near": True, "depth": 1})), make_features(CLIP)
    queries = connector.placed_queries(features, features, 10)
    where = centres((6, 6), features.tokens.device)
    apart = 10 * (queries.places.unsqueeze(2) - where).square().sum(-1)  # (B, T, N)
    apart = F.pad(apart, (1, 0))  # nothing is far from [CLS], which comes first
    apart[:, 0] = 0
    layer, g = connector.stack.layers[0], connector.near[0]
    read = layer.attention
    q = read.q_proj(read.norm_queries(queries.vectors))
    k, v = read.kv_proj(read.norm_features(features.tokens)).chunk(2, dim=-1)
    heads = []
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        logits = q[..., part] @ k[..., part].mT / 8**0.5 - F.softplus(g[head]) * apart
        heads.append(logits.softmax(-1) @ v[..., part])
    hidden = queries.vectors + read.o_proj(torch.cat(heads, -1))
    hidden = connector.stack.norm(hidden + layer.feed_forward(hidden))
    # Measured 6e-7 in outputs up to 2.
    torch.testing.assert_close(connector(features, 10), connector.projector(hidden), rtol=0, atol=1e-5)


def test_talk_is_its_formula(make_features):
    """Written out a head at a time."""
    torch.manual_seed(0)
    talk = Talk(12, num_heads=3, head_dim=4)
    hidden, places = torch.randn(2, 5, 12), torch.rand(2, 5, 2)
    queries = Queries(hidden, places, torch.tensor([False, True, True, True, True]))
    apart = squared_distances(queries)
    q, k, v = (talk.norm(hidden) @ talk.qkv_proj.weight.T).chunk(3, dim=-1)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        logits = q[..., part] @ k[..., part].mT / 2 - F.softplus(talk.locality[head]) * apart
        heads.append(logits.softmax(-1) @ v[..., part])
    # Measured 3e-8.
    torch.testing.assert_close(talk(hidden, queries), torch.cat(heads, -1) @ talk.o_proj.weight.T, rtol=0, atol=1e-6)


def test_images_do_not_see_each_other_with_all_parts(make_features):
    connector, features = shaken(new(**ALL)), make_features(CLIP, batch=3)
    last = features._replace(**{key: value[2:] for key, value in features.arrays.items()})
    # Measured 4e-7 in outputs up to 1.4.
    torch.testing.assert_close(connector(features)[2:], connector(last), rtol=0, atol=1e-5)
