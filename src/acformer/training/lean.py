"""What makes a step cheaper and leaves what it computes as it is: on, while a stage trains, and off again behind it.

    adapters     PEFT casts what an adapter reads to float32, and autocast casts it back: under autocast it need not
    attention    PyTorch's kernel for bfloat16 on a CPU calls a matrix product for each head of each row; for short rows
                 three products over all heads are 3 to 5 times as fast (its backward most of all)
    layers       with `compile_layers`, each decoder layer is compiled, one graph for all: elementwise work is fused

No weight and no name of a weight changes, so checkpoints are those of a stage without it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from acformer.errors import UsageError

SHORT = "acformer_short_rows"
LONGEST = 256  # tokens: the scores of all pairs are kept for the backward pass, and beyond it the kernel is as fast


@contextmanager
def lean(model: Any, half: torch.dtype | None, *, compile_layers: bool = False) -> Iterator[None]:
    """Steps of this model are cheaper inside. half: the dtype of the arithmetic, where the weights have another.

    Raises:
        UsageError: layers are to be compiled, and there are none under the name that decoders have for them.
    """
    with ExitStack() as stack:
        if half is not None and getattr(model, "_hf_peft_config_loaded", False):
            from peft.helpers import disable_input_dtype_casting

            stack.enter_context(disable_input_dtype_casting(model))
        language_model = model.model.language_model
        if half is torch.bfloat16 and language_model.device.type == "cpu":
            stack.enter_context(_short_rows(language_model))
        if compile_layers:
            stack.enter_context(_compiled(decoder_layers(language_model)))
        yield


def decoder_layers(language_model: Any) -> nn.ModuleList:
    """The layers that `compile_layers` means; `UsageError` where they have another name than Llama's, Qwen's, ..."""
    layers = getattr(language_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UsageError(
            f"compile_layers: {type(language_model).__name__} has no decoder layers named `layers`: leave it out"
        )
    return layers


@contextmanager
def _short_rows(language_model: Any) -> Iterator[None]:
    """Its attention is `short_attention`, where it is PyTorch's otherwise."""
    before = language_model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    language_model.config._attn_implementation = SHORT
    try:
        yield
    finally:
        language_model.config._attn_implementation = before


@contextmanager
def _compiled(layers: nn.ModuleList) -> Iterator[None]:
    """Each layer compiled for rows of any length, in training alone."""
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def short_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`, of (B, H, L, d) queries and (B, G, L, d) keys and values -> (B, L, H, d).

    Rows longer than `LONGEST`, other dtypes, dropout and whatever else the kernel is given are the kernel's.
    """
    has_more = any(kwargs.get(name) is not None for name in ("is_causal", "position_bias", "softcap", "cache"))
    is_long = max(query.shape[2], key.shape[2]) > LONGEST
    by_head = attention_mask is not None and attention_mask.shape[1] > 1
    if query.dtype != torch.bfloat16 or dropout or has_more or is_long or by_head:
        kwargs = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batch, heads, length, width = query.shape
    groups, seen = key.shape[1:3]
    scaling = width**-0.5 if scaling is None else scaling
    # The heads that share keys stand below each other, (B, G, H/G L, d): one product for all of them.
    scores = (query * scaling).reshape(batch, groups, -1, width) @ key.transpose(-1, -2)
    scores = scores.view(batch, groups, heads // groups, length, seen)
    if attention_mask is None and length > 1 and getattr(module, "is_causal", True):
        attention_mask = torch.ones(length, seen, dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask[:, :, None, :, :seen], torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask[:, :, None, :, :seen]
    weights = scores.softmax(-1)  # summed in float32 by the kernel, whatever it is given
    read = weights.view(batch, groups, -1, seen) @ value  # (B, G, H/G L, d)
    return read.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(SHORT, short_attention)
AttentionMaskInterface.register(SHORT, sdpa_mask)
