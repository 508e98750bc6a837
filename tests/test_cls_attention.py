"""The [CLS] row against the attention map that eager attention returns, and what reading it may not cost."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from acformer.errors import UsageError
from acformer.vision.cls_attention import RECORDING, ClsAttentionTap, KernelListener, cls_row
from acformer.vision.encoder import VisionEncoder, load_vision_encoder
from acformer.vision.families import ENCODERS, num_prefix_tokens
from acformer.vision.features import VisionFeatures

KERNELS = ("sdpa", "eager")
CLS_FAMILIES = ("clip_vision_model", "dinov2", "dinov2_with_registers")

# Measured in float32 over all families, kernels and layers: at most 1.5e-7 between our softmax(q_cls . K^T) and the
# eager map's row, whose entries are below 1: two orders of summation.
ROW_TOLERANCE = {"rtol": 0, "atol": 1e-6}


def encode(encoder: VisionEncoder, pixels: Tensor) -> VisionFeatures:
    with torch.no_grad():
        return encoder(pixels)


def eager_row(eager: PreTrainedModel, pixels: Tensor, block: int) -> Tensor:
    """(B, H, N) from the whole map of an untouched model: [CLS] query, prefix columns dropped."""
    with torch.no_grad():
        attention = eager(pixels, output_attentions=True).attentions[block]
    return attention[:, :, 0, num_prefix_tokens(eager.config) :]


def probe_row(tower: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(B, H, N): what SigLIP's pooling attention itself says, head by head."""
    normed = tower.post_layernorm(tokens)
    probe = tower.head.probe.expand(len(tokens), -1, -1)
    _, weights = tower.head.attention(probe, normed, normed, need_weights=True, average_attn_weights=False)
    return weights[:, :, 0]


def test_cls_row_is_the_first_row_of_the_map():
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 3, 5, 8, dtype=torch.float64).unbind()
    attention = torch.einsum("bhqd,bhkd->bhqk", query, key).mul(0.3).softmax(-1)
    # Measured 0; einsum and matmul may come to sum in another order.
    torch.testing.assert_close(cls_row(query, key, 0.3), attention[:, :, 0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_listener_hears_what_the_kernel_is_called_with(scale):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 5, 8, dtype=torch.float64).unbind()
    plain = F.scaled_dot_product_attention(query, key, value, scale=scale)
    with KernelListener() as listener:
        assert torch.equal(F.scaled_dot_product_attention(query, key, value=value, scale=scale), plain)
    expected = torch.einsum("bhqd,bhkd->bhqk", query, key).mul(scale or 8**-0.5).softmax(-1)[:, :, 0]
    torch.testing.assert_close(listener.row, expected, rtol=0, atol=1e-14)
    listener.row = None
    F.scaled_dot_product_attention(query, key, value)
    assert listener.row is None, "it listens inside the with alone"
    with pytest.raises(UsageError, match="masks its attention"), listener:
        F.scaled_dot_product_attention(query, key, value, torch.ones(5, 5, dtype=torch.bool))


@pytest.mark.parametrize("feature_layer", [-1, -2, 2])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", CLS_FAMILIES)
def test_row_is_that_of_the_eager_map(family, kernel, feature_layer, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family, attn_implementation=kernel), feature_layer)
    block = feature_layer if feature_layer < 0 else feature_layer - 1  # hidden_states has one entry more
    expected = eager_row(make_tower(family, attn_implementation="eager"), pixels, block)
    row = encode(encoder, pixels).cls_attention
    assert row.shape == (2, 4, 16)
    torch.testing.assert_close(row, expected, **ROW_TOLERANCE)


@pytest.mark.parametrize("feature_layer", [-1, -2, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_siglip_row_is_that_of_the_probe(kernel, feature_layer, make_tower, pixels):
    encoder = load_vision_encoder(make_tower("siglip_vision_model", attn_implementation=kernel), feature_layer)
    features = encode(encoder, pixels)
    expected = probe_row(make_tower("siglip_vision_model"), features.tokens)
    torch.testing.assert_close(features.cls_attention, expected, **ROW_TOLERANCE)


def test_siglip_without_its_head_has_no_row(make_tower, pixels):
    encoder = load_vision_encoder(make_tower("siglip_vision_model", vision_use_head=False))
    assert encode(encoder, pixels).cls_attention is None


# Measured 0.0028 (bf16) and 0.00025 (f16) in rows up to 0.24: queries and keys come out of rounded blocks.
@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision_row_is_float32(family, dtype, atol, make_tower, pixels):
    """Else the scores of many patches would tie."""
    expected = encode(load_vision_encoder(make_tower(family)), pixels).cls_attention
    features = encode(load_vision_encoder(make_tower(family).to(dtype)), pixels.to(dtype))
    assert features.tokens.dtype == dtype
    assert features.cls_attention.dtype == torch.float32
    torch.testing.assert_close(features.cls_attention, expected, rtol=0, atol=atol)


def test_no_square_map_is_formed(family, make_tower, record_ops):
    """Under eager attention, which forms one for every block, the record does see it."""
    pixels = torch.randn(1, 3, 77, 77, generator=torch.Generator().manual_seed(0))
    for kernel in KERNELS:
        encoder = load_vision_encoder(make_tower(family, attn_implementation=kernel))
        with record_ops() as record:
            features = encode(encoder, pixels)
        length = features.tokens.shape[1]
        squares = [shape for shape in record.shapes if shape[-2:] == (length, length)]
        largest = max(torch.Size(shape).numel() for shape in record.shapes)
        assert bool(squares) == (kernel == "eager")
        assert (largest >= 4 * length**2) == (kernel == "eager"), "H x N x N"


@pytest.mark.parametrize("family", CLS_FAMILIES)
def test_the_tower_keeps_its_kernel(family, make_tower, pixels):
    """The tapped block alone has a config of its own; the kernel may change afterwards."""
    tower = make_tower(family)
    encoder = load_vision_encoder(tower)
    assert tower.config._attn_implementation == "sdpa"
    under_sdpa = encode(encoder, pixels)
    tower.set_attn_implementation("eager")
    under_eager = encode(encoder, pixels)
    assert tower.config._attn_implementation == "eager"
    torch.testing.assert_close(under_eager.cls_attention, under_sdpa.cls_attention, **ROW_TOLERANCE)


@pytest.mark.parametrize("family", CLS_FAMILIES)
def test_the_recording_kernel_is_not_for_the_tower(family, make_tower, pixels):
    tower = make_tower(family)
    encoder = load_vision_encoder(tower)
    tower.config._attn_implementation = RECORDING
    with pytest.raises(UsageError, match="choose 'sdpa'"):
        encoder(pixels)


def test_encoders_of_one_config_do_not_disturb_each_other(family, make_tower, pixels):
    tower = make_tower(family)
    plain = type(tower)(tower.config).eval()
    plain.load_state_dict(tower.state_dict())
    first = load_vision_encoder(tower, -2)
    alone = encode(first, pixels)
    second = load_vision_encoder(type(tower)(tower.config), -1)
    encode(second, pixels)
    again = encode(first, pixels)
    assert torch.equal(again.tokens, alone.tokens)
    assert torch.equal(again.cls_attention, alone.cls_attention)
    with torch.no_grad():  # a third of that config, never tapped, runs as ever
        assert torch.equal(plain(pixels, output_hidden_states=True).hidden_states[-2], alone.tokens)


def test_a_copy_has_a_tap_of_its_own(family, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family))
    expected = encode(encoder, pixels)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(encode(other, pixels).cls_attention, expected.cls_attention)
    assert encoder.tap.tokens is None, "the copy's pass went into the copy's tap"
    assert torch.equal(encode(encoder, pixels).cls_attention, expected.cls_attention)


def test_a_copy_keeps_levels_of_its_own(family, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family), hidden_layers=[0, 3])
    expected = encode(encoder, pixels).hidden_layers
    other = copy.deepcopy(encoder)
    other(pixels[:1])
    assert torch.equal(encode(encoder, pixels).hidden_layers, expected)
    assert encode(other, pixels[:1]).hidden_layers.shape == (1, *expected.shape[1:])


def test_a_pass_is_read_once(family, make_tower, pixels):
    tap = ClsAttentionTap(tower := make_tower(family))
    with torch.no_grad():
        tower(pixels)
    tap.read()
    with pytest.raises(RuntimeError, match="has not run since"):
        tap.read()


@pytest.mark.parametrize("family", ["clip_vision_model", "siglip_vision_model"])
def test_compiles_into_one_graph(family, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family), hidden_layers=[0, 2])
    expected = encode(encoder, pixels)
    torch.compiler.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    for _ in range(2):
        features = encode(compiled, pixels)
        assert torch.equal(features.tokens, expected.tokens), "the same kernels: no tolerance"
        assert torch.equal(features.cls_attention, expected.cls_attention)
        assert torch.equal(features.hidden_layers, expected.hidden_layers)
    torch.compiler.reset()


def test_exports(family, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family), hidden_layers=[0, 2])
    expected = encode(encoder, pixels)
    exported = torch.export.export(encoder, (pixels,)).module()
    assert torch.equal(encode(exported, pixels).cls_attention, expected.cls_attention)
    assert torch.equal(encode(exported, pixels).hidden_layers, expected.hidden_layers)


def test_every_family_is_tested():
    assert set(ENCODERS) == {*CLS_FAMILIES, "siglip_vision_model"}


@pytest.mark.parametrize("family", ENCODERS)
def test_autocast_does_not_round_the_row(family, make_tower, pixels):
    """Training under bf16 must find the anchors that inference finds: a row rounded to bf16 is full of ties."""
    encoder = load_vision_encoder(make_tower(family))
    with torch.autocast("cpu", torch.bfloat16):
        row = encode(encoder, pixels).cls_attention
    assert row.dtype == torch.float32
    assert (row.bfloat16().float() != row).float().mean() > 0.9


@pytest.mark.parametrize("family", CLS_FAMILIES)
def test_a_kernel_may_ask_the_module_which_kernel_it_is(family, make_tower, pixels):
    """As transformers' FlashAttention does; the tapped block must answer with the tower's, not with its own."""
    asked = []

    def kernel(module, query, key, value, attention_mask, **kwargs):
        asked.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("asking_kernel", kernel)
    tower = make_tower(family, attn_implementation="sdpa")
    tower.set_attn_implementation("asking_kernel")
    encoder = load_vision_encoder(tower)
    assert encode(encoder, pixels).cls_attention is not None
    assert set(asked) == {"asking_kernel"}
    encode(encoder, pixels)
    assert set(asked) == {"asking_kernel"}


@pytest.mark.parametrize("family", ENCODERS)
def test_one_tower_belongs_to_one_encoder(family, make_tower):
    tower = make_tower(family)
    load_vision_encoder(tower)
    with pytest.raises(UsageError, match="already belongs to an encoder"):
        load_vision_encoder(tower)
