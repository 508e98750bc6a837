"""A step traced on fake tensors against the same step on real ones: the same FLOP, the same bytes."""

import resource
import warnings
from contextlib import nullcontext

import pytest
import tiny
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CONFIG_MAPPING, AutoModel

from acformer.training.skeleton import empty_model, replace_weights
from acformer.training.trace import Batch, FlopCounter, Precision, fake_tensors, trace_encoder, trace_step
from acformer.training.trainer import freeze

FULL = Precision(torch.float32, torch.float32)
MIXED = Precision(torch.float32, torch.bfloat16, torch.bfloat16)
STAGES = {"pretrain": {"connector": 1e-3}, "finetune": {"connector": 1e-3, "language_model": 1e-3}}
TEXT = 40
aten = torch.ops.aten


def batch_of(config, rows: int = 4) -> Batch:
    return Batch(rows, config.num_placeholders + TEXT, TEXT - 2)


def real_inputs(config, batch: Batch) -> dict:
    """Image tokens, two words that are not learned, and one row that is padded by a token."""
    ids = torch.full((batch.rows, batch.length), 5)
    ids[:, : config.num_placeholders] = config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -batch.supervised :] = 5
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    pixels = torch.randn(batch.rows, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def real_step(config, batch: Batch, precision: Precision, rates: dict, checkpointing: bool = False, mode=None):
    """The step on weights that exist, inside the mode."""
    model = tiny.AcFormerForConditionalGeneration(config).train()
    freeze(model, rates)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(precision.trained if parameter.requires_grad else precision.frozen)
    model.model.vision_tower.eval()
    if checkpointing:
        with warnings.catch_warnings(action="ignore"):
            model.gradient_checkpointing_enable()
    mode = mode or FlopCounter()
    with mode:
        inputs = real_inputs(config, batch)
        forward = convert_outputs_to_fp32(model.forward) if precision.autocast else model.forward
        with torch.autocast("cpu", precision.autocast) if precision.autocast else nullcontext():
            loss = forward(**inputs, supervised_only=True, num_items_in_batch=torch.ones(())).loss
        loss.backward()
    return mode


def traced(config, batch: Batch, precision: Precision, rates: dict, **kwargs):
    model = empty_model(config)
    freeze(model, rates)
    return trace_step(model, batch, precision, **kwargs)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", tiny.mostly_slow([FULL, MIXED], MIXED), ids=["full", "mixed"])
@pytest.mark.parametrize("stage", tiny.mostly_slow(STAGES, "finetune"))
def test_bytes_and_flop_of_a_step(stage, precision, checkpointing):
    config = tiny.config()
    batch, rates = batch_of(config), STAGES[stage]
    real = real_step(config, batch, precision, rates, checkpointing)
    step = traced(config, batch, precision, rates, checkpointing=checkpointing)
    assert step.flops == real.flops
    assert step.peak_bytes == pytest.approx(real.peak_bytes, rel=0.05 if checkpointing else 0.02)


def test_a_head_that_shares_the_embedding():
    config = tiny.config()
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    batch = batch_of(config)
    real = real_step(config, batch, MIXED, STAGES["finetune"])
    step = traced(config, batch, MIXED, STAGES["finetune"])
    assert step.flops == real.flops
    assert step.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)


@pytest.mark.parametrize("stage", STAGES)
def test_torchs_own_counter_says_the_same(stage):
    config = tiny.config()
    batch, rates = batch_of(config), STAGES[stage]
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
            *shapes[:4]
        ),
    }
    counter = real_step(config, batch, FULL, rates, mode=FlopCounterMode(display=False, custom_mapping=kernels))
    assert traced(config, batch, FULL, rates).flops == counter.get_total_flops()


@pytest.mark.parametrize("connector", tiny.mostly_slow(tiny.CONNECTORS, "acformer_v2", "c_abstractor", "token_packer"))
def test_every_connector(connector):
    config = tiny.config(connector)
    batch = batch_of(config, rows=2)
    real = real_step(config, batch, FULL, STAGES["finetune"])
    step = traced(config, batch, FULL, STAGES["finetune"])
    assert step.flops == real.flops
    assert step.peak_bytes == pytest.approx(real.peak_bytes, rel=0.05)


@pytest.mark.parametrize(
    "vision",
    tiny.mostly_slow(
        [name for name in tiny.ENCODERS if name != "ijepa"],  # it has no [CLS] attention
        "clip_vision_model",
        "siglip2_vision_model",
        "dinov3_vit",
    ),
)
def test_every_encoder(vision):
    config = tiny.config(vision=vision)
    batch = batch_of(config, rows=2)
    rates = {"vision_tower": 1e-3, **STAGES["finetune"]}
    assert traced(config, batch, FULL, rates).flops == real_step(config, batch, FULL, rates).flops


def test_gated_cross_attention_and_several_images_a_row():
    gated = tiny.config(fusion="gated_cross_attention")
    rates = {"fusion": 1e-3, **STAGES["finetune"]}
    batch = Batch(2, 20, 8)
    assert gated.num_placeholders == 1
    real = real_step(gated, batch, FULL, rates)
    assert traced(gated, batch, FULL, rates).flops == real.flops
    more = traced(gated, Batch(2, 20, 8, images=3), FULL, rates)
    assert more.flops > real.flops


def test_cached_features_leave_the_encoder_out():
    config = tiny.config()
    batch = batch_of(config)
    live = traced(config, batch, FULL, STAGES["pretrain"])
    cached = traced(config, Batch(4, batch.length, batch.supervised, cached=True), FULL, STAGES["pretrain"])
    assert live.flops - cached.flops == 4 * trace_encoder(empty_model(config))
    shared = Batch(4, batch.length, batch.supervised, cached=True, sharing=4)
    assert traced(config, shared, FULL, STAGES["pretrain"]).flops < cached.flops  # the connector runs once


def test_logits_are_those_of_the_supervised_positions():
    config = tiny.config()
    vocabulary = config.text_config.vocab_size
    step = traced(config, Batch(4, config.num_placeholders + TEXT, 10), FULL, STAGES["pretrain"])
    assert step.logits_bytes % (4 * 10 * vocabulary * 4) == 0
    assert 0 < step.logits_bytes < step.peak_bytes


def test_gradients_that_are_sharded_away_and_those_that_wait():
    config = tiny.config()
    batch, rates = batch_of(config), STAGES["finetune"]
    model = empty_model(config)
    freeze(model, rates)
    gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    usual = trace_step(model, batch, FULL)
    without = trace_step(model, batch, FULL, keep_gradients=False)
    waiting = trace_step(model, batch, FULL, accumulated=True)
    assert without.peak_bytes <= usual.peak_bytes <= waiting.peak_bytes
    assert waiting.peak_bytes == pytest.approx(without.peak_bytes + gradients, rel=0.05)
    assert without.flops == usual.flops == waiting.flops


def test_nothing_of_the_size_of_the_weights_is_made():
    """1.2 G weights, 4.8 GB, and gradients of 3.2 GB; the process grows by less than a tenth of it."""
    config = tiny.config()
    config.text_config.intermediate_size = 3 * 2**21
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = traced(config, batch_of(config), FULL, STAGES["finetune"])
    assert step.peak_bytes > 4 * 2**30
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 2**29


def test_no_fake_tensor_stays_in_a_cache_of_the_encoders_code():
    """DINOv3's keeps the places of the patches; a real pass before or after would stumble over those of the other."""
    config = CONFIG_MAPPING["dinov3_vit"](
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    real, pixels = AutoModel.from_config(config).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = real(pixels).last_hidden_state
    for _ in range(2):
        with torch.device("meta"):
            empty = AutoModel.from_config(config)
        with fake_tensors(empty), torch.no_grad():
            replace_weights(empty, lambda p: torch.empty(p.shape))
            assert empty(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == before.shape
    with torch.no_grad():
        assert real(pixels).last_hidden_state.equal(before)
