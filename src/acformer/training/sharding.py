"""What stands in the memory of one process between two passes: weights, gradients, optimizer states, by strategy.

`ddp`: every process has all of it. `zero2`, `zero3`: DeepSpeed's, with weights in half precision and their float32
masters among the sharded optimizer states; `zero2` shards gradients and states, `zero3` the weights too. `fsdp`: FSDP2
with everything sharded, weights in their own dtype and gathered in half precision block by block.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acformer.errors import UsageError, unknown_name
from acformer.hf import AcFormerForConditionalGeneration
from acformer.training.lora import QUANTIZED
from acformer.training.trace import Precision

SHARDINGS = ("ddp", "zero2", "zero3", "fsdp")
OPTIMIZER_VALUES = {
    "adamw_torch": 2.0,
    "adamw_torch_fused": 2.0,
    "adafactor": 0.01,
    "adagrad": 1.0,
    "sgd": 0.0,
    "rmsprop": 1.0,
    "lion_32bit": 1.0,
    "adamw_bnb_8bit": 0.5,
    "adamw_8bit": 0.5,
    "lion_8bit": 0.25,
    "paged_adamw_32bit": 2.0,
    "paged_adamw_8bit": 0.5,
}
"""Values of a weight's own size that an optimizer keeps for it. Paged ones may leave the GPU; here they are on it."""
BUCKET = 200_000_000
"""Values of a DeepSpeed bucket, as in examples/launch; two are in flight."""
LIVE = 1_000_000_000
"""Values that ZeRO-3 keeps gathered at most (`stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class Weights:
    """Of a model, in values and, of what is frozen, in bytes.

    block: values of the largest block that FSDP gathers at once, root: of all that belongs to no block;
    block_learns: whether such a block learns. dequantized: values of the largest quantised layer.
    """

    trained: int
    frozen: int
    frozen_bytes: float
    root: int
    block: int
    block_learns: bool
    dequantized: int = 0


@dataclass(frozen=True)
class Standing:
    """Bytes of one process. working: what is gathered, or in the buckets of a reduction, at one time."""

    weights: float
    gradients: float
    optimizer: float
    working: float


def count_weights(model: AcFormerForConditionalGeneration, precision: Precision, quantize: str | None) -> Weights:
    """Of a model whose weights know whether they learn; blocks are the layers of the language model.

    The encoder's are gathered with all else: a process without an image runs none of them (`training.distributed`).
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    matrices = _quantized(model) if quantize else []
    few_bits = sum(matrix.numel() for matrix in matrices)
    saved = few_bits * (precision.frozen.itemsize - QUANTIZED[quantize]) if quantize else 0.0
    lists = [module for module in model.model.language_model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for layers in lists for block in layers]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    largest = max(sizes, default=0)
    learns = any(p.requires_grad for p in blocks[sizes.index(largest)].parameters()) if blocks else False
    return Weights(
        trained=trained,
        frozen=frozen,
        frozen_bytes=frozen * precision.frozen.itemsize - saved,
        root=trained + frozen - sum(sizes),
        block=largest,
        block_learns=learns,
        dequantized=max((matrix.numel() for matrix in matrices), default=0),
    )


def _quantized(model: nn.Module) -> list[nn.Parameter]:
    """The frozen matrices of the language model's linear layers, its head left out, as transformers does."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name.startswith("model.language_model.layers.") and parameter.ndim == 2 and not parameter.requires_grad
    ]


def standing(sharding: str, gpus: int, weights: Weights, precision: Precision, values: float) -> Standing:
    """Bytes of one of so many processes; `values`: the optimizer's, see `OPTIMIZER_VALUES`."""
    compute = (precision.autocast or precision.trained).itemsize
    own, half, single = precision.trained.itemsize, compute, torch.float32.itemsize
    trained, frozen = weights.trained, weights.frozen_bytes
    # All sums in bytes. DDP reduces gradients in buckets of its own, as large as the gradients.
    if sharding == "ddp":
        buckets = trained * own if gpus > 1 else 0
        return Standing(trained * own + frozen, trained * own, trained * own * values, buckets)
    if sharding == "fsdp":
        # Two blocks at one time, since the next is gathered while one computes; with gradients where they learn.
        blocks = 2 * weights.block * half * (2 if weights.block_learns else 1)
        gathered = (weights.root * half + blocks) if gpus > 1 else 0
        states = trained * own * values
        return Standing((trained * own + frozen) / gpus, trained * own / gpus, states / gpus, gathered)
    states = trained * single * (1 + values) / gpus
    buckets = 2 * min(BUCKET, trained) * half
    if sharding == "zero2":
        return Standing(trained * half + frozen, trained * half / gpus, states, buckets)
    live = min(LIVE, trained + weights.frozen) * half if gpus > 1 else 0
    return Standing((trained * half + frozen) / gpus, trained * half / gpus, states, live + buckets)


def named_sharding(training: Mapping[str, Any]) -> str:
    """What a stage's `training` section asks for; `ddp` where it asks for nothing.

    Raises:
        UsageError: a DeepSpeed file that cannot be read, or with a stage that is not planned.
    """
    if training.get("fsdp"):
        return "fsdp"
    if not (deepspeed := training.get("deepspeed")):
        return "ddp"
    if isinstance(deepspeed, str):
        try:
            deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"training.deepspeed: cannot read {training['deepspeed']}: {error}") from error
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    if stage not in (2, 3):
        raise UsageError(f"training.deepspeed: plans are made for ZeRO stages 2 and 3, got {stage}")
    return f"zero{stage}"


def optimizer_values(name: str) -> float:
    """By `training.optim`; `UsageError` for one whose states are not known here."""
    if name not in OPTIMIZER_VALUES:
        raise unknown_name("optimizer to plan for", name, OPTIMIZER_VALUES)
    return OPTIMIZER_VALUES[name]
