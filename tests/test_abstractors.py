"""The abstractors with weights of their own: against their releases, transformers, and loops written out.

What every connector keeps is in `test_connectors.py`.
"""

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrDecoderLayer

from acformer.connectors import Connector, Geometry, build_connector
from acformer.connectors.attention import MultiHeadAttention
from acformer.connectors.deformable import DeformableAttention, DeformableLayer, sample, uniform_points
from acformer.connectors.patch_blocks import as_block, nearest_block, split_blocks
from acformer.connectors.token_grid import nearest_num_tokens, token_grid
from acformer.errors import UsageError
from acformer.vision.features import VisionFeatures

SQUARE, WIDE = Geometry(32, 24, (6, 6), 1), Geometry(32, 24, (4, 6), 5)
RELEASE = Path(__file__).parent / "fixtures" / "c_abstractor.safetensors"
sides = st.integers(1, 12)


def build(name: str, geometry: Geometry = SQUARE, seed: int = 0, **options) -> Connector:
    """In float64, with weights in which nothing is zero and nothing one."""
    torch.manual_seed(seed)
    connector = build_connector(name, geometry, **options).double()
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return connector


class TestTokenGrid:
    @pytest.mark.parametrize(
        ("num_tokens", "grid", "layout"),
        [
            (144, (24, 24), (12, 12)),
            (64, (24, 24), (8, 8)),
            (32, (16, 16), (4, 8)),  # as square as 8 x 4: more columns
            (2, (5, 5), (1, 2)),
            (12, (3, 8), (2, 6)),  # 3 / 8 lies between 2 / 6 and 3 / 4, nearer to 2 / 6
            (16, (16, 1), (16, 1)),
        ],
    )
    def test_examples(self, num_tokens, grid, layout):
        assert token_grid(num_tokens, grid) == layout

    @given(grid=st.tuples(sides, sides), layout=st.tuples(sides, sides))
    def test_fits_and_nothing_fits_better(self, grid, layout):
        rows, cols = min(layout[0], grid[0]), min(layout[1], grid[1])
        h, w = token_grid(rows * cols, grid)
        assert h * w == rows * cols
        assert h <= grid[0]
        assert w <= grid[1]

        def off(rows: int, cols: int) -> float:
            return abs(torch.tensor(rows * grid[1] / (cols * grid[0]), dtype=torch.float64).log().item())

        assert off(h, w) <= off(rows, cols) + 1e-12, "the logarithm rounds"

    @pytest.mark.parametrize(("num_tokens", "nearest"), [(13, "12 and 15"), (37, "36"), (400, "36"), (0, "1")])
    def test_no_layout(self, num_tokens, nearest):
        with pytest.raises(UsageError, match=rf"{num_tokens} tokens .* within 6 x 6 patches; nearest: {nearest}$"):
            token_grid(num_tokens, (6, 6))

    @given(num_tokens=st.integers(-3, 200), grid=st.tuples(sides, sides))
    def test_nearest_number_has_an_even_layout(self, num_tokens, grid):
        """At most 1.5 times too flat or too high; no such number is nearer."""
        nearest = nearest_num_tokens(num_tokens, grid)
        even = {
            rows * cols
            for rows, cols in product(range(1, grid[0] + 1), range(1, grid[1] + 1))
            if 2 / 3 <= rows * grid[1] / (cols * grid[0]) <= 1.5
        }
        assert nearest in even
        assert abs(nearest - num_tokens) == min(abs(number - num_tokens) for number in even)

    def test_a_prime_number_is_not_laid_out_as_a_strip(self):
        assert nearest_num_tokens(33, (16, 16)) == 35


class TestPatchBlocks:
    def test_order(self):
        """Blocks in raster order, patches within a block too."""
        blocks = split_blocks(torch.arange(24.0).view(1, 24, 1), (4, 6), (2, 3))
        rows = [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11], [12, 13, 14, 18, 19, 20], [15, 16, 17, 21, 22, 23]]
        assert blocks.squeeze().tolist() == rows

    @pytest.mark.parametrize(
        ("num_tokens", "grid", "block"),
        [
            (144, (24, 24), (2, 2)),
            (32, (16, 16), (2, 4)),  # as good as 4 x 2: the flat one
            (1, (3, 5), (3, 5)),
            (1000, (3, 5), (1, 1)),
            (5, (4, 4), (2, 2)),
        ],
    )
    def test_nearest(self, num_tokens, grid, block):
        assert nearest_block(num_tokens, grid) == block

    def test_values(self):
        assert as_block("scale", 2, (4, 6)) == as_block("scale", [2, 2], (4, 6)) == (2, 2)
        assert as_block("scale", (4, 1), (4, 6)) == (4, 1)

    @pytest.mark.parametrize("value", [4, (2, 4), [3, 3]])
    def test_must_divide(self, value):
        with pytest.raises(UsageError, match=r"scale=.* 4 x 6 patches; .* rows among \[1, 2, 4\] .* \[1, 2, 3, 6\]"):
            as_block("scale", value, (4, 6))


class TestMultiHeadAttention:
    def test_is_torchs(self):
        """Whatever bias torch's keys have: the softmax does not see it."""
        torch.manual_seed(0)
        theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
        ours = MultiHeadAttention(12, 3).double()
        nn.init.normal_(theirs.in_proj_bias)
        for linear, weight in zip((ours.q_proj, ours.k_proj, ours.v_proj), theirs.in_proj_weight.chunk(3), strict=True):
            linear.weight.data = weight
        ours.q_proj.bias.data, _, ours.v_proj.bias.data = theirs.in_proj_bias.chunk(3)
        ours.o_proj = theirs.out_proj
        query, key, value = (torch.randn(2, n, 12).double() for n in (4, 7, 7))
        # Measured 3.9e-16 in outputs up to 0.9.
        torch.testing.assert_close(ours(query, key, value), theirs(query, key, value)[0], rtol=0, atol=1e-14)

    @pytest.mark.parametrize("name", ["d_abstractor", "token_packer", "q_former"])
    def test_heads_must_divide(self, name):
        with pytest.raises(UsageError, match=r"num_heads=5 does not divide the width \d+"):
            build_connector(name, SQUARE, num_heads=5, **({} if name == "q_former" else sizes(name)))


def sizes(name: str) -> dict:
    return {"d_abstractor": {"num_tokens": 9}, "token_packer": {"hidden_layers": []}}[name]


class TestCAbstractor:
    def test_is_the_releases(self):
        """With the weights and the output that AcFormer's release gave on timm's RegNet stage, in float64."""
        data = load_file(RELEASE)
        connector = build("c_abstractor", Geometry(64, 8, (8, 8), 1), num_tokens=16, depth=1)
        weights = dict(_as_ours(name, tensor) for name, tensor in data.items() if name.startswith("state."))
        own = {name for name in connector.state_dict() if not name.startswith("projector.")}
        assert own == set(weights)
        connector.load_state_dict(weights, strict=False)
        features = VisionFeatures(data["input.features"], None, (8, 8), 1)
        # Measured 1.8e-15 in outputs up to 4.2.
        torch.testing.assert_close(connector.abstract(features, 16), data["output"], rtol=0, atol=1e-13)

    def test_one_checkpoint_serves_any_budget(self, make_features):
        connector, other = (build("c_abstractor", WIDE, num_tokens=n, depth=1) for n in (6, 15))
        other.load_state_dict(connector.state_dict())
        features = make_features(WIDE, dtype=torch.float64)
        assert torch.equal(connector(features, 15), other(features))
        with pytest.raises(UsageError, match="7 tokens cannot be laid out"):
            connector(features, 7)

    def test_prefix_is_dropped(self, make_features):
        connector, features = build("c_abstractor", WIDE, num_tokens=6, depth=1), make_features(WIDE)
        tokens = features.tokens.double()
        other = torch.cat([torch.zeros_like(tokens[:, :5]), tokens[:, 5:]], dim=1)
        assert torch.equal(connector(features._replace(tokens=tokens)), connector(features._replace(tokens=other)))


def _as_ours(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """timm's names; its point-wise convolutions are our Linears."""
    stage, block, module, weight = re.fullmatch(r"state\.net\.(0|2)\.b(\d+)\.(.*)\.(weight|bias)", name).groups()
    module = re.sub(r"conv(\d)\.bn", r"norm\1", module)
    module = module.replace("se.fc", "squeeze_excite.linear").replace("conv2.conv", "depthwise")
    module = re.sub(r"conv(\d)\.conv", r"linear\1", module)
    ours = f"stage{1 + int(stage) // 2}.{int(block) - 1}.{module}.{weight}"
    return ours, tensor.flatten(1) if "linear" in ours and weight == "weight" else tensor


class TestLDPv2:
    def test_written_out(self, make_features):
        connector, features = build("ldp_v2", WIDE, num_tokens=6), make_features(WIDE, dtype=torch.float64)
        first, _, second = connector.projector
        hidden = second(nn.functional.gelu(first(features.tokens[:, 5:]))).view(2, 2, 2, 3, 2, 24).mean((2, 4))
        kernel, expected = connector.positions.weight, hidden + connector.positions.bias
        padded = nn.functional.pad(hidden, (0, 0, 1, 1, 1, 1))
        for row in range(3):
            for column in range(3):
                shifted = padded[:, row : row + 2, column : column + 3]
                expected = expected + shifted * kernel[:, 0, row, column]
        # Measured 2.2e-16 in outputs up to 1.1.
        torch.testing.assert_close(connector(features), expected.flatten(1, 2), rtol=0, atol=1e-13)

    def test_one_checkpoint_serves_any_budget(self, make_features):
        connector, other = (build("ldp_v2", WIDE, num_tokens=n) for n in (6, 15))
        other.load_state_dict(connector.state_dict())
        features = make_features(WIDE, dtype=torch.float64)
        assert torch.equal(connector(features, 15), other(features))


class TestDeformable:
    def test_sample_is_bilinear(self):
        """Against a loop over the places, also where they lie at the edge and outside."""
        torch.manual_seed(0)
        image, places = torch.randn(2, 3, 4, 5).double(), torch.rand(2, 6, 7, 2).double() * 1.6 - 0.3
        expected = torch.zeros(2, 3, 6, 7).double()
        for b, t, k in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(7)).tolist():
            x, y = (places[b, t, k] * torch.tensor([5, 4]) - 0.5).tolist()
            for row in range(4):
                for column in range(5):
                    share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                    expected[b, :, t, k] += share * image[b, :, row, column]
        # Measured 4.4e-16 in values up to 2.5.
        torch.testing.assert_close(sample(image, places), expected, rtol=0, atol=1e-13)

    def test_points_are_the_centres_of_the_cells(self):
        points = uniform_points((2, 4), torch.device("cpu"))
        assert points.tolist() == [[x / 8, y / 4] for y in (1, 3) for x in (1, 3, 5, 7)]

    @pytest.mark.parametrize(("num_heads", "num_points"), [(1, 1), (4, 3), (8, 4)])
    def test_starts_by_looking_around(self, num_heads, num_points):
        """Equal weights, whatever the query; of four heads right, down, left, up, each point a patch further."""
        attention = DeformableAttention(16, num_heads, num_points)
        assert not attention.weight_proj.weight.any()
        assert not attention.offset_proj.weight.any()
        star = attention.offset_proj.bias.view(num_heads, num_points, 2)
        reach = star.abs().amax(-1)
        assert torch.equal(reach, torch.arange(1.0, num_points + 1).expand(num_heads, -1))
        if num_heads == 4:
            right_down_left_up = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
            # Measured 8.7e-8: cosines in float32.
            torch.testing.assert_close(star[:, 0], right_down_left_up, rtol=0, atol=1e-6)

    def test_layer_is_deformable_detrs(self):
        """With the weights of transformers' decoder layer, written for several levels and given one."""
        torch.manual_seed(0)
        config = DeformableDetrConfig(
            d_model=16,
            decoder_attention_heads=4,
            decoder_n_points=3,
            decoder_ffn_dim=40,
            num_feature_levels=1,
            dropout=0.0,
        )
        config._attn_implementation = "sdpa"
        theirs, ours = DeformableDetrDecoderLayer(config).double(), DeformableLayer(16, 4, 3, 2.5).double()
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.5)
        weights = {_detr_name(name): tensor for name, tensor in theirs.state_dict().items()}
        del weights["self_attention.k_proj.bias"]
        ours.load_state_dict(weights)
        queries, patches, positions = (torch.randn(2, n, 16).double() for n in (6, 20, 6))
        points, grid = torch.rand(6, 2).double(), (4, 5)
        expected = theirs(
            queries,
            object_queries_position_embeddings=positions[:1].expand(2, -1, -1),
            reference_points=points[None, :, None].expand(2, -1, -1, -1),
            spatial_shapes=torch.tensor([grid]),
            spatial_shapes_list=[grid],
            level_start_index=torch.tensor([0]),
            encoder_hidden_states=patches,
        )
        # Measured 1.7e-15 in outputs up to 1.4.
        torch.testing.assert_close(ours(queries, positions[0], points, patches, grid), expected, rtol=0, atol=1e-13)


def _detr_name(name: str) -> str:
    ours = {
        "self_attn_layer_norm": "norm1",
        "encoder_attn_layer_norm": "norm2",
        "final_layer_norm": "norm3",
        "self_attn": "self_attention",
        "encoder_attn.sampling_offsets": "attention.offset_proj",
        "encoder_attn.attention_weights": "attention.weight_proj",
        "encoder_attn.value_proj": "attention.v_proj",
        "encoder_attn.output_proj": "attention.o_proj",
        "mlp.fc1": "feed_forward.0",
        "mlp.fc2": "feed_forward.2",
    }
    module = next(theirs for theirs in ours if name.startswith(theirs + "."))
    return ours[module] + name[len(module) :]


class TestDAbstractor:
    def test_queries_are_pooled_patches_at_the_cells(self, make_features):
        """What the first layer is given: means of 2 x 2 patches, and the centres of these as reference points."""
        connector, features = (
            build_connector("d_abstractor", WIDE, num_tokens=6, num_heads=2, depth=1),
            make_features(WIDE),
        )
        given_to_layer = []
        connector.layers[0].register_forward_pre_hook(lambda layer, inputs: given_to_layer.append(inputs))
        connector(features)
        queries, _, points, patches, grid = given_to_layer[0]
        image = features.tokens[:, 5:].view(2, 2, 2, 3, 2, 32)
        # Measured 1.2e-7: float32 sums.
        torch.testing.assert_close(queries, image.mean((2, 4)).flatten(1, 2), rtol=0, atol=1e-6)
        assert torch.equal(points, uniform_points((2, 3), points.device))
        assert torch.equal(patches, features.tokens[:, 5:])
        assert grid == (4, 6)

    def test_a_token_reads_around_its_cell(self, make_features):
        """At the start; a layer without self-attention, whose queries would tell each other of their cells."""
        geometry = Geometry(16, 8, (12, 12), 1)
        connector = build_connector("d_abstractor", geometry, num_tokens=16, num_heads=4, num_points=1, depth=1)
        nn.init.zeros_(connector.layers[0].self_attention.o_proj.weight)
        features = make_features(geometry)
        tokens = features.tokens.requires_grad_()
        connector(features._replace(tokens=tokens))[0, 0].square().sum().backward()
        read = tokens.grad[0, 1:].abs().sum(-1).view(12, 12).gt(0)
        expected = torch.zeros(12, 12, dtype=torch.bool)
        expected[0:3, 0:3] = True
        assert torch.equal(read, expected), "its own 3 x 3 patches, which the points one patch away do not leave"


class TestQFormer:
    def test_is_blip2s(self, make_features):
        """Output with a BLIP-2 Q-Former's weights is that Q-Former's, projected."""
        torch.manual_seed(0)
        config = Blip2QFormerConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, encoder_hidden_size=32
        )
        theirs = Blip2QFormerModel(config).double().eval()
        connector = build("q_former", num_queries=5, hidden_size=16, depth=3, num_heads=2, ff_mult=2)
        connector.q_former.load_state_dict(theirs.state_dict())
        features = make_features(SQUARE, dtype=torch.float64)
        queries = connector.queries.expand(2, -1, -1)
        hidden = theirs(query_embeds=queries, encoder_hidden_states=features.tokens).last_hidden_state
        assert torch.equal(connector(features), connector.projector(hidden)), "the same operations: no tolerance"

    def test_cross_attention_frequency(self):
        connector = build("q_former", hidden_size=16, depth=4, num_heads=2, cross_attention_frequency=3)
        assert [layer.has_cross_attention for layer in connector.q_former.encoder.layer] == [True, False, False, True]

    def test_defaults_are_blip2s(self):
        with torch.device("meta"):
            connector = build_connector("q_former", Geometry(1408, 2560, (16, 16), 1))
            theirs = Blip2QFormerModel(Blip2QFormerConfig())
        shapes = {name: tensor.shape for name, tensor in connector.q_former.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
        assert connector.num_tokens == 32


class TestTokenPacker:
    @pytest.mark.parametrize(("scale", "hidden_layers"), [((2, 2), [1, 3]), ((4, 2), [-2]), ((1, 3), [])])
    def test_written_out(self, scale, hidden_layers, make_features):
        """A loop over the regions, torch's own attention, every level's patches side by side."""
        geometry = Geometry(32, 24, (4, 6), 1)
        connector = build("token_packer", geometry, scale=scale, hidden_layers=hidden_layers, num_heads=4)
        features = make_features(geometry, dtype=torch.float64)
        if hidden_layers:
            features = features._replace(hidden_layers=torch.randn(2, len(hidden_layers), 25, 32).double())
        attention = _torch_attention(connector.attention)
        (rows, cols), tokens = scale, []
        image = features.tokens[:, 1:].mT.reshape(2, 32, 4, 6)
        coarse = nn.functional.interpolate(image, (4 // rows, 6 // cols), mode="bilinear")
        for row in range(4 // rows):
            for column in range(6 // cols):
                inside = [
                    r * 6 + c
                    for r in range(row * rows, (row + 1) * rows)
                    for c in range(column * cols, (column + 1) * cols)
                ]
                sources = [features.hidden_layers[:, k, 1:] for k in range(len(hidden_layers))] or [
                    features.tokens[:, 1:]
                ]
                region = torch.cat([source[:, inside] for source in sources], dim=-1)
                query = connector.norm_q(connector.q_proj(coarse[:, :, row, column])).unsqueeze(1)
                key, value = connector.norm_k(connector.k_proj(region)), connector.norm_v(connector.v_proj(region))
                tokens.append(connector.projector(attention(query, key, value)[0]))
        # Measured 5.0e-16 in outputs up to 0.9.
        torch.testing.assert_close(connector(features), torch.cat(tokens, dim=1), rtol=0, atol=1e-13)

    def test_scale_2_of_the_grid_is_the_mean_of_four(self, make_features):
        connector, features = build("token_packer", scale=2, hidden_layers=[], num_heads=2), make_features(SQUARE)
        coarse = split_blocks(features.patches, (6, 6), (2, 2)).mean(2)
        # Measured 1.2e-7: float32.
        torch.testing.assert_close(connector.coarse_queries(features), coarse, rtol=0, atol=1e-6)

    def test_defaults_are_the_papers(self):
        with torch.device("meta"):
            connector = build_connector("token_packer", Geometry(1024, 4096, (24, 24), 1))
        assert connector.hidden_layers == (12, 16, 22, 23)
        assert connector.num_tokens == 144
        assert connector.k_proj[0].in_features == 4096

    def test_32_tokens(self):
        assert build("token_packer", Geometry(32, 24, (16, 16), 1), scale=[2, 4], hidden_layers=[]).num_tokens == 32

    def test_starts_as_released(self):
        """Linears drawn alike whatever their width; of torch's attention, q, k and v as one Xavier matrix."""
        torch.manual_seed(0)
        connector = build_connector("token_packer", Geometry(256, 320, (6, 6), 1), hidden_layers=[1, 2])
        theirs = nn.MultiheadAttention(256, 8).in_proj_weight
        projections = [getattr(connector.attention, name) for name in ("q_proj", "k_proj", "v_proj")]
        for module in connector.modules():
            if isinstance(module, nn.Linear):
                # The smallest are 65,536 draws: deviations within 1 %, four standard errors.
                deviation = theirs.std().item() if module in projections else 0.02
                assert module.weight.std().item() == pytest.approx(deviation, rel=0.012)
                assert module.bias is None or not module.bias.any()
            if isinstance(module, nn.LayerNorm):
                assert torch.equal(module.weight, torch.ones(256))
                assert not module.bias.any()
        most = max(linear.weight.abs().max().item() for linear in projections)
        assert most == pytest.approx(theirs.abs().max().item(), rel=1e-3), "uniform to the same bound"

    def test_features_without_levels(self, make_features):
        with pytest.raises(
            UsageError,
            match=r"reads the hidden layers \[1, 2\] .* or build it with hidden_layers=\[\]",
        ):
            build("token_packer", hidden_layers=[1, 2])(make_features(SQUARE))


def _torch_attention(ours: MultiHeadAttention) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(ours.q_proj.in_features, ours.num_heads, batch_first=True).double()
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    theirs.in_proj_weight.data = torch.cat([linear.weight for linear in projections])
    theirs.in_proj_bias.data = torch.cat([ours.q_proj.bias, torch.randn_like(ours.q_proj.bias), ours.v_proj.bias])
    theirs.out_proj = ours.o_proj
    return theirs


BUDGETS = [
    ("c_abstractor", SQUARE, 13, {"num_tokens": 12}),
    ("d_abstractor", SQUARE, 9, {"num_tokens": 9}),
    ("ldp_v2", WIDE, 100, {"num_tokens": 24}),
    ("q_former", SQUARE, 13, {"num_queries": 13}),
    ("token_packer", Geometry(32, 24, (16, 16), 1), 33, {"scale": [2, 4]}),
]


@pytest.mark.parametrize(("name", "geometry", "num_tokens", "options"), BUDGETS)
def test_for_budget(name, geometry, num_tokens, options):
    assert type(build_connector(name, geometry, **small(name), **options)).for_budget(geometry, num_tokens) == options


def small(name: str) -> dict:
    return {"token_packer": {"hidden_layers": []}, "q_former": {"hidden_size": 24, "depth": 1}}.get(name, {})


def test_weights_start_as_in_the_sources():
    torch.manual_seed(0)
    deformable = build_connector("d_abstractor", SQUARE, num_tokens=9, num_heads=4, depth=1)
    attention = deformable.layers[0].attention
    assert not deformable.shifts.any()
    assert not attention.weight_proj.weight.any()
    assert torch.equal(attention.offset_proj.bias, DeformableAttention(32, 4, 4).offset_proj.bias)
    assert 0.9 < deformable.positions.std() < 1.1
    q_former = build_connector("q_former", SQUARE, hidden_size=96, depth=1)
    query = q_former.q_former.encoder.layer[0].attention.attention.query
    assert not query.bias.any()
    # 0.02 of 9,216 normal draws, 3,072 for the queries: within 5 %.
    assert query.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert q_former.queries.std().item() == pytest.approx(0.02, rel=0.05)
    packer = build_connector("token_packer", SQUARE, hidden_layers=[1, 2])
    assert not packer.k_proj[0].bias.any()
    assert packer.projector[0].weight.std().item() == pytest.approx(0.02, rel=0.1)  # of 768 draws, four standard errors
    convolution = build_connector("ldp_v2", SQUARE, num_tokens=9).positions
    for drawn in (convolution.weight, convolution.bias):  # uniform to 1 / 3, as PyTorch's own of nine inputs
        assert 0.2 < drawn.abs().max() <= 1 / 3
