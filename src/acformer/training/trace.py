"""A training step on tensors that have shapes and no memory: what it computes and what it holds, counted exactly.

The model's own forward and backward pass run under torch's `FakeTensorMode`, so whatever it does is in the count:
checkpointed activations, casts of autocast, logits of the supervised positions alone. The tensors pass for a CPU's,
whose flash attention keeps what a GPU's keeps; unlike CUDA's, autocast leaves norms of the connector and of the encoder
in half precision there.
"""

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import getclosurevars, isfunction
from math import ceil, prod
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from acformer.hf import AcFormerForConditionalGeneration
from acformer.training.peak_memory import PeakMemory
from acformer.training.skeleton import replace_weights

aten = torch.ops.aten


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *args: Any, out_val: Any = None) -> int:
    """Each gradient asked for costs the forward pass; torch's own count forgets that groups do not mix."""
    output_mask = args[-1]
    return 2 * prod(weight.shape[1:]) * grad.numel() * sum(output_mask[:2])


COUNTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
    aten.convolution_backward: _convolution_backward,
}
"""FLOP of an operation from its arguments and `out_val`: torch's, and the CPU's attention, which torch leaves out."""


class FlopCounter(PeakMemory):
    """`PeakMemory`, and `flops`: of the matrix products that run inside, a multiplication and an addition being two.

    As in torch's `FlopCounterMode`, attention counts all L x L pairs, causal or not. That one is not used here: its
    tracker of modules keeps checkpointed activations alive, and so has another peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if count := COUNTS.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=output)
        return output


@dataclass(frozen=True)
class Batch:
    """What one process reads in one forward pass.

    rows: B. length: L tokens a row, those of its images included. supervised: tokens a row that are learned. images: of
    a row. num_visual_tokens: T, where it is not the connector's own. cached: features come from a cache; then
    `sharing` rows have the same images, which the batch holds once.
    """

    rows: int
    length: int
    supervised: int
    images: int = 1
    num_visual_tokens: int | None = None
    cached: bool = False
    sharing: int = 1


@dataclass(frozen=True)
class Precision:
    """trained, frozen: dtypes of the weights. autocast: of the arithmetic, None for that of the weights."""

    trained: torch.dtype
    frozen: torch.dtype
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Step:
    """flops: of forward and backward pass. peak_bytes: held at one time beside weights and optimizer, gradients and
    inputs included. logits_bytes: of it at most in tensors as large as the logits.
    """

    flops: int
    peak_bytes: int
    logits_bytes: int


def trace_step(
    model: AcFormerForConditionalGeneration,
    batch: Batch,
    precision: Precision,
    *,
    checkpointing: bool = False,
    keep_gradients: bool = True,
    accumulated: bool = False,
) -> Step:
    """Forward and backward pass of an empty model (`skeleton.empty_model`), whose weights are replaced by fake ones.

    Args:
        checkpointing: of activations.
        keep_gradients: False where they are sharded away as soon as they are there (ZeRO, FSDP).
        accumulated: the gradients of an earlier pass are there.
    """
    with fake_tensors(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `gradient_checkpointing_enable`, renamed after 5.19
        replace_weights(
            model, lambda p: torch.empty(p.shape, dtype=precision.trained if p.requires_grad else precision.frozen)
        )
        _set_training(model, checkpointing)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in learning if not keep_gradients else ():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        logits = batch.rows * batch.supervised, model.config.text_config.vocab_size
        with _Answers(logits, batch.images) as watch:
            if accumulated:
                for parameter in learning:
                    parameter.grad = torch.empty_like(parameter)
            _loss(model, batch, precision.autocast).backward()
        peak, logits_peak = watch.peak_bytes, watch.peak_logits
        model.zero_grad()
    return Step(watch.flops, peak, logits_peak)


def trace_encoder(model: AcFormerForConditionalGeneration) -> int:
    """FLOP of the encoder for one image."""
    with fake_tensors(model):
        replace_weights(model, lambda p: torch.empty(p.shape, dtype=torch.float32))
        with _Answers((1, 1), 1) as watch, torch.no_grad():
            model.get_vision_features(_pixels(model, 1))
    return watch.flops


@contextmanager
def fake_tensors(model: nn.Module) -> Iterator[None]:
    """`FakeTensorMode`, of which nothing stays behind: DINOv3's code, for one, caches tensors in its functions."""
    caches = _caches(model)
    for cached in caches:
        cached.cache_clear()
    try:
        with FakeTensorMode():
            yield
    finally:
        for cached in caches:
            cached.cache_clear()


def _caches(model: nn.Module) -> list[Any]:
    """Every `lru_cache` in the code of the modules, also those that transformers hides in a wrapper's closure."""
    kinds = {type(module) for module in model.modules()}
    scopes = [vars(kind) for kind in kinds] + [vars(sys.modules[kind.__module__]) for kind in kinds]
    functions = [value for scope in scopes for value in scope.values()]
    hidden = [value for function in functions for value in _closure(function)]
    return [value for value in (*functions, *hidden) if hasattr(value, "cache_clear")]


def _closure(value: Any) -> list[Any]:
    return list(getclosurevars(value).nonlocals.values()) if isfunction(value) else []


def _set_training(model: AcFormerForConditionalGeneration, checkpointing: bool) -> None:
    model.train()
    if not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters()):
        model.model.vision_tower.eval()
    if checkpointing:
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_disable()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _loss(model: AcFormerForConditionalGeneration, batch: Batch, autocast: torch.dtype | None) -> Tensor:
    """As the Trainer's step makes it, whose wrapper turns half-precision outputs into float32."""
    forward = model.forward if autocast is None else convert_outputs_to_fp32(model.forward)
    with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        return forward(**_inputs(model, batch), supervised_only=True, num_items_in_batch=torch.ones(())).loss


def _inputs(model: AcFormerForConditionalGeneration, batch: Batch) -> dict[str, Any]:
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.int64)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if batch.num_visual_tokens is not None:
        inputs["num_visual_tokens"] = batch.num_visual_tokens
    if images := batch.rows * batch.images:
        inputs |= _cached(model, images, batch.sharing) if batch.cached else {"pixel_values": _pixels(model, images)}
    return inputs


def _pixels(model: AcFormerForConditionalGeneration, images: int) -> Tensor:
    size = model.config.image_size
    return torch.zeros(images, 3, size, size)


def _cached(model: AcFormerForConditionalGeneration, images: int, sharing: int) -> dict[str, Any]:
    """As `FeatureCache` keeps them and `stack_features` stacks them."""
    of_one, heads = model.model.connector.zero_features(), model.config.vision_config.num_attention_heads
    different = ceil(images / sharing)
    features = {
        "tokens": torch.zeros(different, *of_one.tokens.shape[1:], dtype=torch.float16),
        "cls_attention": torch.zeros(different, heads, of_one.grid[0] * of_one.grid[1]),
        "image_index": torch.zeros(images, dtype=torch.int64),
    }
    if of_one.hidden_layers is not None:
        features["hidden_layers"] = torch.zeros(different, *of_one.hidden_layers.shape[1:], dtype=torch.float16)
    return {"vision_features": features}


class _Answers(FlopCounter):
    """`FlopCounter` that answers what the model asks of values, which fake tensors have none of.

    A mask chooses as many positions as there are `logits`' rows; `any` finds nothing (no NaN); every other condition
    holds; a number is `images`, of a row. peak_logits: the most bytes at one time in tensors of `logits`' size.
    """

    def __init__(self, logits: tuple[int, int], images: int) -> None:
        super().__init__()
        self.logits = logits
        self.images = images
        self.found: Any = None
        self.logits_bytes = self.peak_logits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.overloadpacket
        if operation is torch.ops.prim.device:
            return func(*args, **(kwargs or {}))
        if operation in (aten._local_scalar_dense, aten.is_nonzero):
            is_condition = args[0].dtype == torch.bool
            return args[0] is not self.found if is_condition else self.images
        if operation is aten.index and (mask := _mask(args[1])) is not None:
            shape = [self.logits[0], *args[0].shape[mask.ndim :]]
            return super().__torch_dispatch__(aten.new_empty.default, types, (args[0], shape))
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if operation is aten.any:
            self.found = output
        return output

    def _hold(self, tensor: Tensor, given: list[Any]) -> None:
        before = self._bytes
        super()._hold(tensor, given)
        if self._bytes > before and tensor.shape[-1:] == self.logits[1:] and tensor.numel() == prod(self.logits):
            nbytes = tensor.nbytes
            self.logits_bytes += nbytes
            self.peak_logits = max(self.peak_logits, self.logits_bytes)
            weakref.finalize(tensor.untyped_storage(), self._release_logits, nbytes)

    def _release_logits(self, nbytes: int) -> None:
        self.logits_bytes -= nbytes


def _mask(indices: Any) -> Tensor | None:
    return next((index for index in indices if index is not None and index.dtype == torch.bool), None)
