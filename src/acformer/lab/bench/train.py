"""`bench train`: a step of stage 1 (the connector learns, all else is frozen) at several numbers of visual tokens.

The paper's Speed column and the x axis of its Fig. 1, with what the arithmetic alone would allow beside it. A step is
forward, loss on the caption, backward, AdamW. The frozen models are held in the dtype, as LLaVA's bf16 run under
DeepSpeed holds them, the connector in float32. Our own trainer under `bf16: true` casts frozen float32 weights anew in
each step: that is not in it. Unlike the paper's there is one device and no gradient checkpointing.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from acformer.connectors import Connector
from acformer.hf import AcFormerForConditionalGeneration
from acformer.lab.bench.floors import connector_step_flops, encoder_flops, text_backward_flops, text_flops
from acformer.lab.bench.presets import connectors_at, fresh, made_up_features
from acformer.lab.bench.report import Row
from acformer.lab.bench.settings import Settings
from acformer.lab.bench.timing import Variant, measure
from acformer.training.trainer import freeze

Inputs = dict[str, Any]

CAPTION = {"mean": 30, "spread": 0.35, "shortest": 8, "longest": 80}
IGNORE = -100


def rows(settings: Settings) -> list[Row]:
    """One a batch, way to get the features (cached, or encoded in the step), connector and T.

    speed: of `mlp` in the same round's time. floor_speed: the same of the floors. share: the one of the other.
    """
    config = settings.preset.config
    model = fresh(config, settings.device, settings.dtype).train()
    model.model.vision_tower.eval()
    learning = {"connector": 5e-4}
    connectors = connectors_at(
        settings.preset.geometry,
        dict.fromkeys(["mlp", *settings.connectors]),
        settings.tokens,
        settings.device,
        torch.float32,  # weights that learn; the arithmetic is in the settings' dtype
        settings.preset.options,
    )
    found = []
    for batch in settings.batch:
        captions = caption_lengths(batch)
        variants: dict[str, Variant] = {}
        labels: dict[str, Row] = {}
        for (name, tokens), connector in connectors.items():
            model.model.connector = connector
            freeze(model, learning)
            optimizer = ready_optimizer(connector, learning["connector"])
            flops = step_flops(config, connector, captions)
            for features, images, more in ways(settings, connector, batch):
                key = f"{name} {tokens} {features}"
                inputs = {**caption_inputs(captions, tokens, config, settings.device), **images}
                run = step(model, connector, optimizer, inputs, rounded(settings))
                variants[key] = Variant(run, flops + batch * more)
                labels[key] = {"batch": batch, "features": features, "connector": name, "tokens": tokens}
        label = settings.label("batch", batch)
        timings = measure(variants, settings.device, settings.dtype, settings.rounds, label=label)
        for key, row in labels.items():
            base = next(k for k in variants if k.startswith("mlp ") and labels[k]["features"] == row["features"])
            floor_speed = variants[base].flops / variants[key].flops
            times = timings.row(key, base)
            speed = 1 / times["ratio"]
            gained = {"speed": speed, "floor_speed": floor_speed, "share": speed / floor_speed}
            found.append({**row, "captions": captions, **times, **{k: round(v, 3) for k, v in gained.items()}})
    return found


def ready_optimizer(connector: Connector, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW that has made its states, which are therefore in no step's peak."""
    optimizer = torch.optim.AdamW(connector.parameters(), lr=learning_rate, fused=True)
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
    rounded: Callable[[], AbstractContextManager],
) -> Callable[[], None]:
    """A step with this connector in the model, made as `supervised_only` makes the trainer's: without a KV cache."""

    def run() -> None:
        model.model.connector = connector
        with rounded():
            loss = model(**inputs, supervised_only=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def ways(settings: Settings, connector: Connector, batch: int) -> Iterator[tuple[str, Inputs, int]]:
    """Features from a cache, or pixels: name, arguments of the model, and the encoder's FLOP an image."""
    vision, size = settings.preset.config.vision_config, settings.preset.config.image_size
    heads, dtype = vision.num_attention_heads, settings.dtype
    cached = made_up_features(connector, heads, batch, settings.device, dtype)
    yield "cached", {"vision_features": cached}, 0
    pixels = torch.randn(batch, 3, size, size, device=settings.device, dtype=dtype)
    flops = encoder_flops(vision, connector.input_grid, settings.preset.config.feature_layer)
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
    place = torch.arange(length, device=device).expand(len(captions), -1)
    is_real = place < tokens + torch.tensor(captions, device=device).unsqueeze(1)
    input_ids = torch.where(place < tokens, config.image_token_id, config.image_token_id - 1)  # any other word
    labels = torch.where(is_real & (place >= tokens), input_ids, IGNORE)
    return {"input_ids": input_ids, "attention_mask": is_real.long(), "labels": labels}


def rounded(settings: Settings) -> Callable[[], AbstractContextManager]:
    """Autocast where the arithmetic is in half precision: the connector's weights stay in float32."""
    if settings.dtype == torch.float32:
        return nullcontext
    return lambda: torch.autocast(settings.device.type, settings.dtype)
