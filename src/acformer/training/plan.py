"""What a recipe will need: bytes a GPU, FLOP a step, hours; from its configs alone, before anything is downloaded.

A step is traced twice: with the mean length for its FLOP, with the longest for its memory (`acformer.training.trace`).
What stands beside it follows from the sharding (`acformer.training.sharding`). Weights that learn are counted in
`model.dtype`, frozen ones in the dtype of the arithmetic.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import torch
from transformers import TrainingArguments

from acformer.errors import UsageError, unknown_name
from acformer.hf import AcFormerForConditionalGeneration
from acformer.hf.build import parse_dtype
from acformer.training.elastic import elastic_choices
from acformer.training.lora import add_adapters
from acformer.training.recipe import Recipe, StageSpec
from acformer.training.sharding import (
    SHARDINGS,
    Standing,
    count_weights,
    named_sharding,
    optimizer_values,
    standing,
)
from acformer.training.skeleton import empty_model, model_config
from acformer.training.text_sizes import TextSizes, text_sizes
from acformer.training.trace import Batch, Precision, Step, trace_encoder, trace_step
from acformer.training.trainer import freeze, module_parameters

GIB = 2**30
RESERVE = 2.0
"""GiB for the CUDA context, the workspaces of NCCL and cuBLAS and what fragmentation leaves unused: a guess."""
DEFAULTS = {f.name: f.default for f in fields(TrainingArguments) if f.default is not MISSING}


@dataclass(frozen=True)
class Hardware:
    """gpus: processes, one a GPU. memory: GiB of one. tflops: TFLOP/s of one at best, in the dtype of the arithmetic.

    mfu: model FLOP utilisation, the share of `tflops` that training gets; what checkpointing computes again is not in
    it. sharding: one of `SHARDINGS`; default the recipe's own.
    """

    gpus: int = 1
    memory: float = 80.0
    tflops: float = 312.0
    mfu: float = 0.4
    sharding: str | None = None


@dataclass(frozen=True)
class Texts:
    """What is known better than the plan would guess: tokens of a text, of the longest one, and packing of rows."""

    mean: int | None = None
    longest: int | None = None
    packing: bool = False


@dataclass(frozen=True)
class StagePlan:
    """A stage. Bytes are those of one GPU at the longest row, FLOP and tokens those of an optimizer step on all GPUs.

    trained, frozen: weights by module. activations: with the inputs of the step; logits: part of them. other_shardings:
    total bytes under another one, where this one does not fit. steps, hours: None where the number of samples is not
    known. features_bytes: of all images on the disk, where features are cached; encoding_hours: to make them.
    """

    stage: str
    trained: dict[str, int]
    frozen: dict[str, int]
    sharding: str
    rows: int
    accumulation: int
    samples_a_step: int
    visual_tokens: int
    text: TextSizes
    longest_row: int
    tokens_a_step: int
    weights: int
    gradients: int
    optimizer: int
    working: int
    activations: int
    logits: int
    total: int
    fits: bool
    other_shardings: dict[str, int]
    flops_a_step: int
    steps: int | None
    hours: float | None
    features_bytes: int | None
    encoding_hours: float | None


@dataclass(frozen=True)
class Plan:
    """Of a recipe: parameters by module, its stages, and the hardware that they are for. reserve: GiB beside them."""

    recipe: str
    parameters: dict[str, int]
    hardware: Hardware
    reserve: float
    stages: list[StagePlan]

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return all(stage.fits for stage in self.stages)


def plan(recipe: Recipe, hardware: Hardware, texts: Texts | None = None) -> Plan:
    """The plan of the stages that the recipe would run.

    Raises:
        CheckpointError: a part's config can be read nowhere.
        UsageError: parts or settings that do not fit.
    """
    _check(hardware)
    model = empty_model(model_config(recipe))
    parameters = _counts(model)
    stages = []
    for stage, spec in recipe.stages():
        model = empty_model(model_config(recipe))
        stages.append(_Planner(recipe, stage, spec, hardware, texts or Texts(), model).plan())
    return Plan(recipe.name, parameters, hardware, RESERVE, stages)


def _check(hardware: Hardware) -> None:
    for name in ("gpus", "memory", "tflops", "mfu"):
        if not 0 < getattr(hardware, name) < math.inf:
            raise UsageError(f"{name} must be a positive number, got {getattr(hardware, name)}")
    if hardware.mfu > 1:
        raise UsageError(f"mfu is a share of what the GPU can do, at most 1, got {hardware.mfu}")
    if hardware.sharding is not None and hardware.sharding not in SHARDINGS:
        raise unknown_name("sharding", hardware.sharding, SHARDINGS)


def _counts(model: AcFormerForConditionalGeneration, learning: bool | None = None) -> dict[str, int]:
    """Weights by module; of those that learn, or that do not."""
    found = {
        module: sum(p.numel() for p in parameters if learning is None or p.requires_grad == learning)
        for module, parameters in module_parameters(model).items()
    }
    return {module: count for module, count in found.items() if count}


class _Planner:
    """One stage: its settings, resolved, and what follows from them."""

    def __init__(
        self,
        recipe: Recipe,
        stage: str,
        spec: StageSpec,
        hardware: Hardware,
        texts: Texts,
        model: AcFormerForConditionalGeneration,
    ):
        self.stage, self.spec, self.hardware, self.packing, self.model = stage, spec, hardware, texts.packing, model
        freeze(model, spec.learning_rates)
        if spec.lora is not None:
            add_adapters(model, spec.lora)
        self.settings = _settings(spec.training)
        self.sharding = hardware.sharding or named_sharding(spec.training)
        self.cached = recipe.cache_features
        self.text = _overridden(text_sizes(spec, spec.template or recipe.model.template), texts)
        self.precision = _precision(self.settings, spec, parse_dtype(recipe.model.dtype))
        self.weights = count_weights(model, self.precision, spec.quantize)
        connector = model.model.connector
        self.choices = elastic_choices(connector, *spec.elastic) if spec.elastic else (connector.num_tokens,)
        self.rows = self.settings["per_device_train_batch_size"] * spec.group
        self.accumulation = self.settings["gradient_accumulation_steps"]

    def plan(self) -> StagePlan:
        """All that is known of the stage."""
        usual, longest = self.usual(), self.longest()
        step, peak = self.trace(usual, self.sharding, checkpointing=False), self.trace(longest, self.sharding)
        memory = self.memory(self.sharding, peak)
        total = sum(memory.values())
        others = self.others(longest) if not self.has_room(total) and self.hardware.gpus > 1 else {}
        samples = usual.rows * usual.images * self.accumulation * self.hardware.gpus
        flops = step.flops * self.accumulation * self.hardware.gpus
        steps = self.num_steps(samples)
        images = self.text.samples and math.ceil(self.text.samples / self.spec.group)
        return StagePlan(
            stage=self.stage,
            trained=_counts(self.model, learning=True),
            frozen=_counts(self.model, learning=False),
            sharding=self.sharding,
            rows=self.rows,
            accumulation=self.accumulation,
            samples_a_step=samples,
            visual_tokens=self.choices[len(self.choices) // 2],
            text=self.text,
            longest_row=longest.length,
            tokens_a_step=usual.rows * usual.length * self.accumulation * self.hardware.gpus,
            **memory,
            logits=peak.logits_bytes,
            total=total,
            fits=self.has_room(total),
            other_shardings=others,
            flops_a_step=flops,
            steps=steps,
            hours=None if steps is None else self.hours(flops * steps),
            features_bytes=self.features_bytes() * images if self.cached and images else None,
            encoding_hours=self.hours(trace_encoder(self.model) * images) if self.cached and images else None,
        )

    def usual(self) -> Batch:
        """The mean row; packed, a full one."""
        tokens = self.choices[len(self.choices) // 2]
        length = self.row(tokens, self.text.mean)
        images = max(1, self.spec.max_length // length) if self.packing else 1
        return self.batch(self.spec.max_length if self.packing else length, self.text.supervised, images, tokens)

    def longest(self) -> Batch:
        """A batch of the longest rows, all of whose text is learned."""
        if self.packing:
            return self.usual()
        tokens = self.choices[-1]
        length = self.row(tokens, self.text.longest)
        return self.batch(length, length - self.row(tokens, 0), 1, tokens)

    def row(self, tokens: int, text: int) -> int:
        """Length of a row of one image and so much text; `max_length` cuts the text."""
        image = self.model.model.fusion.count_placeholders(tokens)
        return image + min(text, max(self.spec.max_length - image, 1))

    def batch(self, length: int, supervised: int, images: int, tokens: int) -> Batch:
        """A batch of rows of `length` tokens with so many images, each of `tokens` visual tokens."""
        own = self.model.model.connector.num_tokens
        budget = None if tokens == own else tokens
        return Batch(
            self.rows, length, min(supervised * images, length - 1), images, budget, self.cached, self.spec.group
        )

    def trace(self, batch: Batch, sharding: str, *, checkpointing: bool | None = None) -> Step:
        """checkpointing: default the recipe's."""
        compute = self.precision.autocast or self.precision.trained
        is_sharded = sharding != "ddp"
        return trace_step(
            self.model,
            batch,
            replace(self.precision, trained=compute) if is_sharded else self.precision,
            checkpointing=_checkpointing(self.settings) if checkpointing is None else checkpointing,
            keep_gradients=not is_sharded,
            accumulated=self.accumulation > 1 and not is_sharded,
        )

    def memory(self, sharding: str, peak: Step) -> dict[str, int]:
        """Bytes by what they are for; their sum is the peak."""
        values = optimizer_values(self.settings["optim"])
        still: Standing = standing(sharding, self.hardware.gpus, self.weights, self.precision, values)
        compute = self.precision.autocast or self.precision.trained
        held = peak.peak_bytes - (still.gradients if sharding == "ddp" else 0)
        return {
            "weights": round(still.weights),
            "gradients": round(still.gradients),
            "optimizer": round(still.optimizer),
            "working": round(still.working + self.weights.dequantized * compute.itemsize),
            "activations": max(round(held), 0),
        }

    def has_room(self, total: int) -> bool:
        return total / GIB + RESERVE <= self.hardware.memory

    def others(self, longest: Batch) -> dict[str, int]:
        """Total bytes under the other shardings."""
        peaks = {key: self.trace(longest, key) for key in ("ddp", "fsdp")}
        found = {name: self.memory(name, peaks["ddp" if name == "ddp" else "fsdp"]) for name in SHARDINGS}
        return {name: sum(memory.values()) for name, memory in found.items() if name != self.sharding}

    def num_steps(self, samples: int) -> int | None:
        """Optimizer steps of so many samples each; None where the number of samples is not known."""
        if self.settings["max_steps"] > 0:
            return self.settings["max_steps"]
        if self.text.samples is None:
            return None
        return math.ceil(math.ceil(self.text.samples / samples) * self.settings["num_train_epochs"])

    def hours(self, flops: int) -> float:
        rate = self.hardware.mfu * self.hardware.tflops * 1e12 * self.hardware.gpus
        return flops / rate / 3600

    def features_bytes(self) -> int:
        """Of one image on the disk: tokens and hidden layers in float16, scores in float32."""
        features = self.model.model.connector.zero_features()
        layers = 0 if features.hidden_layers is None else features.hidden_layers.numel()
        scores = self.model.config.vision_config.num_attention_heads * math.prod(features.grid)
        return 2 * (features.tokens.numel() + layers) + 4 * scores


def _settings(training: Mapping[str, Any]) -> dict[str, Any]:
    """`training` over the defaults of `TrainingArguments`."""
    for key in training:
        if key not in DEFAULTS:
            raise unknown_name("training argument", key, DEFAULTS)
    return {**DEFAULTS, **training}


def _checkpointing(settings: Mapping[str, Any]) -> bool:
    """Under its old name and its new one."""
    return bool(settings.get("gradient_checkpointing") or settings.get("activation_checkpointing"))


def _precision(settings: Mapping[str, Any], spec: StageSpec, dtype: torch.dtype) -> Precision:
    half = torch.bfloat16 if settings["bf16"] else torch.float16 if settings["fp16"] else None
    trained = torch.float32 if half is not None and spec.lora is not None else dtype  # as `learner.as_it_learns`
    return Precision(trained=trained, frozen=half or dtype, autocast=half)


def _overridden(found: TextSizes, texts: Texts) -> TextSizes:
    """What the caller says, instead of what was found."""
    if texts.mean is None and texts.longest is None:
        return found
    mean = texts.mean or found.mean
    share = found.supervised / found.mean
    longest = max(texts.longest or found.longest, mean)
    return replace(found, mean=mean, supervised=max(round(mean * share), 1), longest=longest, source="as given")
