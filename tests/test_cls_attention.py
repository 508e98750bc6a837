"""The [CLS] row against the attention map that eager attention returns, and what reading it may not cost."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from acformer.errors import UsageError
from acformer.vision.cls_attention import RECORDING, KernelListener, cls_row
from acformer.vision.encoder import VisionEncoder, load_vision_encoder, tower_inputs
from acformer.vision.families import ENCODERS, num_prefix_tokens
from acformer.vision.features import VisionFeatures
from acformer.vision.recording import THREAD, Recording

KERNELS = ("sdpa", "eager")
CLS_FAMILIES = [name for name in tiny.ENCODERS if ENCODERS[name].prefix]
TRACED = ("clip_vision_model", "siglip2_vision_model", "dinov3_vit", "beit")  # one of each kind: tracing takes seconds
SIGLIPS = ("siglip_vision_model", "siglip2_vision_model")

# Measured in float32 over all families, kernels and layers: at most 1.8e-7 between our softmax(q_cls . K^T) and the
# eager map's row, whose entries are below 1: two orders of summation.
ROW_TOLERANCE = {"rtol": 0, "atol": 1e-6}


def encode(encoder: VisionEncoder, pixels: Tensor) -> VisionFeatures:
    with torch.no_grad():
        return encoder(pixels)


def eager_row(eager: PreTrainedModel, pixels: Tensor, block: int) -> Tensor:
    """(B, H, N) from the whole map of an untouched model: [CLS] query, prefix columns dropped."""
    with torch.no_grad():
        attention = eager(**tower_inputs(eager.config, pixels), output_attentions=True).attentions[block]
    return attention[:, :, 0, num_prefix_tokens(eager.config) :]


@pytest.fixture
def recording():
    """Of a pass under way in this thread."""
    THREAD.recording = Recording(())
    yield THREAD.recording
    THREAD.recording = None


def probe_row(tower: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(B, H, N): what the pooling head itself says, head by head."""
    if tower.config.model_type == "aimv2_vision_model":
        key = tower.head.k_proj(tower.rms_norm(tokens)).unflatten(-1, (4, 8)).transpose(1, 2)
        query = tower.head.cls_token.unflatten(-1, (4, 8)).transpose(1, 2)
        return (query @ key.mT * 8**-0.5).softmax(-1)[:, :, 0]
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


def test_a_mask_is_in_the_row():
    """BEiT's relative positions are added to the scores; a mask of bools hides keys."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 3, 5, 8, dtype=torch.float64).unbind()
    bias, seen = torch.randn(1, 3, 5, 5), torch.rand(2, 1, 5, 5) > 0.5
    seen[..., 0] = True
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key).mul(0.3)
    expected = (scores + bias).softmax(-1)[:, :, 0]
    torch.testing.assert_close(cls_row(query, key, 0.3, bias), expected, rtol=0, atol=1e-14)
    expected = scores.masked_fill(~seen, float("-inf")).softmax(-1)[:, :, 0]
    torch.testing.assert_close(cls_row(query, key, 0.3, seen), expected, rtol=0, atol=1e-14)


def test_heads_that_share_their_keys():
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 5, 8, dtype=torch.float64), torch.randn(2, 2, 5, 8, dtype=torch.float64)
    expected = cls_row(query, key[:, [0, 0, 0, 1, 1, 1]], 0.3)
    assert torch.equal(cls_row(query, key, 0.3), expected)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_listener_hears_what_the_kernel_is_called_with(scale, recording):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 5, 8, dtype=torch.float64).unbind()
    plain = F.scaled_dot_product_attention(query, key, value, scale=scale)
    bias = torch.randn(1, 1, 5, 5, dtype=torch.float64)
    with KernelListener():
        assert torch.equal(F.scaled_dot_product_attention(query, key, value=value, scale=scale), plain)
    expected = torch.einsum("bhqd,bhkd->bhqk", query, key).mul(scale or 8**-0.5).softmax(-1)[:, :, 0]
    torch.testing.assert_close(recording.row, expected, rtol=0, atol=1e-14)
    with KernelListener():
        F.scaled_dot_product_attention(query, key, value, bias, scale=scale)
    expected = cls_row(query, key, scale or 8**-0.5, bias)
    torch.testing.assert_close(recording.row, expected, rtol=0, atol=1e-14)
    recording.row = None
    F.scaled_dot_product_attention(query, key, value)
    assert recording.row is None, "it listens inside the with alone"


@pytest.mark.parametrize(("kernel", "feature_layer"), [("sdpa", -2), ("sdpa", -1), ("eager", 2)])
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
@pytest.mark.parametrize("family", [name for name in tiny.ENCODERS if ENCODERS[name].probe])
def test_the_row_without_cls_is_that_of_the_probe(family, kernel, feature_layer, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family, attn_implementation=kernel), feature_layer)
    features = encode(encoder, pixels)
    expected = probe_row(make_tower(family), features.tokens)
    torch.testing.assert_close(features.cls_attention, expected, **ROW_TOLERANCE)


@pytest.mark.parametrize("family", SIGLIPS)
def test_siglip_without_its_head_has_no_row(family, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family, vision_use_head=False))
    assert encode(encoder, pixels).cls_attention is None


def test_an_encoder_with_neither_cls_nor_probe_has_no_row(make_tower, pixels):
    assert encode(load_vision_encoder(make_tower("ijepa")), pixels).cls_attention is None


# Measured 0.0028 (bf16) and 0.00025 (f16) in rows up to 0.24: queries and keys come out of rounded blocks.
@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("family", tiny.WITH_ROW)
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
        encoder = load_vision_encoder(make_tower(family, attn_implementation=kernel, image_size=77))
        with record_ops() as record:
            features = encode(encoder, pixels)
        length = features.tokens.shape[1]
        # One mask of padding for all heads and blocks is not counted: transformers 5.24 writes it for SigLIP 2.
        several = [shape for shape in record.shapes if torch.Size(shape).numel() > length**2]
        squares = [shape for shape in several if shape[-2:] == (length, length)]
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
    assert same(encode(first, pixels), alone)
    inputs = tower_inputs(plain.config, pixels)
    with torch.no_grad():  # a third of that config, which no encoder has, runs as ever
        assert torch.equal(plain(**inputs, output_hidden_states=True).hidden_states[-2], alone.tokens)


def same(features: VisionFeatures, others: VisionFeatures) -> bool:
    return features.arrays.keys() == others.arrays.keys() and all(
        torch.equal(values, others.arrays[name]) for name, values in features.arrays.items()
    )


def test_a_copy_has_weights_of_its_own(family, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family))
    expected = encode(encoder, pixels)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    found = encode(other, pixels)
    assert not any(torch.equal(values, expected.arrays[name]) for name, values in found.arrays.items())
    assert same(encode(encoder, pixels), expected)


def test_a_pass_that_fails_leaves_nothing_behind(family, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family))
    expected = encode(encoder, pixels)

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = encoder.tower.get_submodule(ENCODERS[family].blocks)[-1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        encoder(pixels)
    hook.remove()
    assert THREAD.recording is None
    assert torch.overrides._get_current_function_mode() is None
    assert same(encode(encoder, pixels), expected)


def test_a_pass_inside_of_a_pass(make_tower, pixels):
    """As of an encoder whose embedding is another encoder's: each has its own."""
    inner, outer = load_vision_encoder(make_tower("vit", seed=1)), load_vision_encoder(make_tower("dinov2"))
    expected = encode(outer, pixels)
    outer.tower.embeddings.register_forward_hook(lambda *_: encode(inner, pixels) and None)
    assert same(encode(outer, pixels), expected)


@pytest.mark.parametrize("family", tiny.mostly_slow(TRACED, "clip_vision_model"))
def test_compiles_into_one_graph(family, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family), hidden_layers=[0, 2])
    expected = encode(encoder, pixels)
    torch.compiler.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    for _ in range(2):
        features = encode(compiled, pixels)
        assert same(features, expected), "the same kernels: no tolerance"
    torch.compiler.reset()


def test_a_compiled_block_hands_over_its_tokens(make_tower, pixels):
    """Blocks compiled one by one, as large models are."""
    encoder = load_vision_encoder(make_tower("dinov3_vit"), hidden_layers=[0, 2])
    expected = encode(encoder, pixels)
    torch.compiler.reset()
    for block in encoder.tower.model.layer:
        block.compile(fullgraph=True, backend="eager")
    assert same(encode(encoder, pixels), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("family", tiny.mostly_slow(TRACED, "clip_vision_model"))
def test_exports(family, make_tower, pixels):
    """With a batch of any size."""
    encoder = load_vision_encoder(make_tower(family), hidden_layers=[0, 2])
    expected = encode(encoder, pixels)
    batch = {"pixel_values": {0: torch.export.Dim("batch", min=2, max=64)}}
    exported = torch.export.export(encoder, (pixels,), dynamic_shapes=batch, strict=False).module()
    assert same(encode(exported, pixels), expected)
    assert encode(exported, pixels.repeat(2, 1, 1, 1)).tokens.shape == (4, *expected.tokens.shape[1:])


@pytest.mark.parametrize("family", tiny.WITH_ROW)
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


def test_the_last_block_keeps_its_config_beside_a_pass(make_tower, pixels):
    """The kernel asks for the tower's config; the module's own must not be touched for that, other threads read it."""
    encoder = load_vision_encoder(make_tower("clip_vision_model"))
    attention = encoder.tower.encoder.layers[-1].self_attn
    seen = []

    def kernel(module, *args, **kwargs):
        seen.append((module.config._attn_implementation, attention.config._attn_implementation, module.num_heads))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    AttentionInterface.register("looking_kernel", kernel)
    encoder.tower.set_attn_implementation("looking_kernel")
    encode(encoder, pixels)
    assert seen[-1] == ("looking_kernel", RECORDING, 4)


def test_one_tower_belongs_to_one_encoder(family, make_tower):
    tower = make_tower(family)
    load_vision_encoder(tower)
    with pytest.raises(UsageError, match="already belongs to an encoder"):
        load_vision_encoder(tower)
