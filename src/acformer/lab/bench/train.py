"""`bench train`: a step of stage 1 (the connector learns, all else is frozen) at several numbers of visual tokens.

The paper's Speed column and the x axis of its Fig. 1, with what the arithmetic alone would allow beside it. A step is
forward, loss on the caption, backward, AdamW. The frozen models are held in the dtype, as LLaVA's bf16 run under
DeepSpeed holds them, the connector in float32. Our own trainer under `bf16: true` casts frozen float32 weights anew in
each step: that is not in it. Unlike the paper's there is one device and no gradient checkpointing.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from acformer.connectors import Connector
from acformer.hf import AcFormerForConditionalGeneration
from acformer.lab.bench.presets import build_connectors, random_features, random_model
from acformer.lab.bench.roofline import connector_step_flops, encoder_flops, text_backward_flops, text_flops
from acformer.lab.bench.settings import Settings
from acformer.lab.bench.timing import Result, Variant, timed_rows
from acformer.lab.training_step import autocast, training_step
from acformer.training.trainer import freeze

Inputs = dict[str, Any]

CAPTION = {"mean": 30, "spread": 0.35, "shortest": 8, "longest": 80}
IGNORE = -100
LEARNING_RATES = {"connector": 5e-4}


def rows(settings: Settings) -> list[Result]:
    """One a batch, source of the features (cached, or encoded in the step), connector and T.

    speed: of `mlp` in the same round's time. floor_speed: the same of the rooflines. share: the one of the other.
    """
    preset, device = settings.preset, settings.device
    model = random_model(preset.config, device, settings.dtype).train()
    model.model.vision_tower.eval()
    names = dict.fromkeys(["mlp", *settings.connectors])
    # Weights that learn are float32; the arithmetic is in the settings' dtype.
    connectors = build_connectors(preset, names, settings.tokens, device, torch.float32)
    found = []
    for batch in settings.batch:
        captions = caption_lengths(batch)
        variants: list[tuple[Result, Variant]] = []
        for (name, tokens), connector in connectors.items():
            model.model.connector = connector
            freeze(model, LEARNING_RATES)
            optimizer = optimizer_with_states(connector)
            flops = step_flops(preset.config, connector, captions)
            for features, images, encoder in feature_sources(settings, connector, batch):
                inputs = {**caption_inputs(captions, tokens, preset.config, device), **images}
                labels = {"batch": batch, "features": features, "connector": name, "tokens": tokens}
                run = step(model, connector, optimizer, inputs, settings)
                variants.append(({**labels, "captions": captions}, Variant(run, flops + batch * encoder)))
        base = {"connector": "mlp"}
        timed = timed_rows(settings, variants, base, ["features"], label=("batch", batch))
        flops_of_mlp = {labels["features"]: v.flops for labels, v in variants if labels["connector"] == "mlp"}
        for row, (_, variant) in zip(timed, variants, strict=True):
            speed, floor_speed = 1 / row["ratio"], flops_of_mlp[row["features"]] / variant.flops
            gained = {"speed": speed, "floor_speed": floor_speed, "share": speed / floor_speed}
            found.append({**row, **{key: round(value, 3) for key, value in gained.items()}})
    return found


def optimizer_with_states(connector: Connector) -> torch.optim.Optimizer:
    """AdamW that has made its states, which are therefore in no step's peak."""
    optimizer = torch.optim.AdamW(connector.parameters(), lr=LEARNING_RATES["connector"], fused=True)
    for parameter in connector.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def step(
    model: AcFormerForConditionalGeneration,
    connector: Connector,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
    settings: Settings,
) -> Callable[[], Tensor]:
    """A step with this connector in the model, made as `supervised_only` makes the trainer's: without a KV cache."""

    def compute_loss() -> Tensor:
        model.model.connector = connector
        with autocast(settings.device, settings.dtype):
            return model(**inputs, supervised_only=True).loss

    return partial(training_step, compute_loss, optimizer)


def feature_sources(settings: Settings, connector: Connector, batch: int) -> Iterator[tuple[str, Inputs, int]]:
    """Features from a cache, or pixels: name, arguments of the model, and the encoder's FLOP an image."""
    config, device, dtype = settings.preset.config, settings.device, settings.dtype
    yield "cached", {"vision_features": random_features(settings.preset, connector, batch, device, dtype)}, 0
    pixels = torch.randn(batch, 3, config.image_size, config.image_size, device=device, dtype=dtype)
    flops = encoder_flops(config.vision_config, connector.input_grid, config.feature_layer)
    yield "encoded", {"pixel_values": pixels}, flops


def step_flops(config: Any, connector: Connector, captions: list[int]) -> int:
    """Connector forward and backward, language model forward and backward to its input; no padding, no optimizer."""
    text, tokens = config.text_config, connector.num_tokens
    of_text = sum(
        text_flops(text, tokens + caption, logits=caption) + text_backward_flops(text, tokens + caption, caption)
        for caption in captions
    )
    return of_text + len(captions) * connector_step_flops(connector)


def caption_lengths(batch: int) -> list[int]:
    """Tokens of the captions of one batch, about 30 as in LLaVA's 558k pairs: log-normal, a made-up spread.

    As a shuffle draws them, not grouped by length: the quantiles (i + 1/2) / B of the distribution, so a batch as
    mixed as most are, the same in every run. What the shorter ones are padded with is a part of the time.
    """
    spread = CAPTION["spread"]
    normal = NormalDist(math.log(CAPTION["mean"]) - spread**2 / 2, spread)
    drawn = (math.exp(normal.inv_cdf((i + 0.5) / batch)) for i in range(batch))
    return [round(min(max(length, CAPTION["shortest"]), CAPTION["longest"])) for length in drawn]


def caption_inputs(captions: list[int], tokens: int, config: Any, device: torch.device) -> dict[str, Tensor]:
    """The plain template: T image tokens, then the caption, which alone is learned; padded on the right."""
    length = tokens + max(captions)
    position = torch.arange(length, device=device).expand(len(captions), -1)  # (B, L)
    is_real = position < tokens + torch.tensor(captions, device=device).unsqueeze(1)
    input_ids = torch.where(position < tokens, config.image_token_id, config.image_token_id - 1)  # any other word
    labels = torch.where(is_real & (position >= tokens), input_ids, IGNORE)
    return {"input_ids": input_ids, "attention_mask": is_real.long(), "labels": labels}
