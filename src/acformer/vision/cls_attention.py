"""The [CLS] row of one block's attention, without the N x N map.

A fused kernel (SDPA, FlashAttention) never forms the attention map, and eager attention forms all N x N of it for a
single row. Here the tower keeps whatever kernel it is set to; its last block alone runs through an attention
function of our own, which computes q_cls . K^T for its H heads and then calls that kernel. No module is replaced
and no projection is hooked, so it lives through FSDP2, torch.compile, export and engines that fuse q, k and v.

SigLIP has no [CLS]. What stands in for its row: the attention of the pooling head's learned probe to the patches
(the head reads the last block's output through its norm), which is how SigLIP itself sums up an image.

Modules that do not go through transformers' attention functions are listened to: of `nn.MultiheadAttention` the
projections are known, and of whatever else calls torch's `scaled_dot_product_attention` its arguments are read while
it runs, so that norms and rotary positions of queries and keys are in the row as the kernel gets them.
"""

import copy
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from acformer.errors import UsageError
from acformer.vision.families import encoder_family, num_prefix_tokens
from acformer.vision.library import LibraryVisionModel
from acformer.vision.recording import keep_row

RECORDING = "acformer_cls_row"


def record_row(tower: PreTrainedModel) -> bool:
    """Let the last block's attention, or the pooling head's, hand over its row; False where there is no such head."""
    module = _attention_of_cls(tower)
    if isinstance(module, nn.MultiheadAttention):
        module.register_forward_hook(_keep_projected)
    elif module is not None and (encoder_family(tower.config).probe or isinstance(tower, LibraryVisionModel)):
        module.register_forward_pre_hook(_start_listening)
        module.register_forward_hook(_stop_listening, always_call=True)
    elif module is not None:
        _use_recording_attention(module, tower)
    return module is not None


def _attention_of_cls(tower: PreTrainedModel) -> Any:
    """The module of whose first query the row is wanted, None where there is neither a [CLS] nor a probe."""
    family = encoder_family(tower.config)
    if family.probe is not None:
        return dict(tower.named_modules()).get(family.probe)
    if num_prefix_tokens(tower.config) == 0:
        return None
    blocks: Any = tower.get_submodule(family.blocks)
    attention = dict(blocks[-1].named_modules()).get(family.attention)
    if attention is None:
        raise UsageError(f"the blocks of {type(tower).__name__} have no {family.attention!r}, their family's attention")
    # transformers < 5.19 nests DINOv2's one level deeper.
    return dict(attention.named_children()).get("attention", attention)


def cls_row(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q_cls . K^T * scaling + mask): (B, H, L, d), (B, G, L, d) -> (B, H, L), in float32 at least.

    Rounded to bf16 the scores of many patches would tie, so the dot products are formed in float32, also where
    autocast would round them. G divides H: with grouped queries, heads share keys.

    mask: what the kernel adds to the scores, or True where a query sees a key, (1 or B, 1 or H, L, L): BEiT's relative
    positions come this way.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # (B, G, L, d) -> (B, H, L, d)
    with torch.autocast(query.device.type, enabled=False):
        scores = query[:, :, :1].to(dtype) @ key.to(dtype).transpose(-1, -2) * scaling  # (B, H, 1, L)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[..., :1, :], float("-inf"))  # the row of [CLS]: (B, H, 1, L)
        elif mask is not None:
            scores = scores + mask[..., :1, :].to(dtype)
        return scores.softmax(dim=-1)[:, :, 0]  # (B, H, 1, L) -> (B, H, L)


def _use_recording_attention(attention: Any, tower: PreTrainedModel) -> None:
    eager = vars(import_module(type(attention).__module__)).get("eager_attention_forward")
    if eager is None:
        raise UsageError(
            f"{type(attention).__name__} does not go through transformers' attention functions, so its [CLS] attention "
            "cannot be read"
        )
    # A config of its own for this one module: the rest of the tower keeps its kernel.
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = RECORDING
    attention.tower_config = tower.config
    attention.eager_attention = eager


def recording_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention function of the last block: hands over its [CLS] row, then runs the kernel that the tower is set to."""
    config = vars(module).get("tower_config")
    if config is None or config._attn_implementation == RECORDING:
        raise UsageError(f"attn_implementation {RECORDING!r} is for the encoder's last block alone: choose 'sdpa'")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    keep_row(cls_row(query, key, scaling, attention_mask))
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, module.eager_attention)
    return attend(_AsInTheTower(module), query, key, value, attention_mask, scaling=scaling, **kwargs)


class _AsInTheTower:
    """The module as its kernel may ask it: FlashAttention reads from `module.config` which kernel it is."""

    def __init__(self, module: Any):
        self._module = module
        self.config = module.tower_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _keep_projected(module: nn.MultiheadAttention, args: tuple, output: Any) -> None:
    """The row from the first query and the keys: the weights that the module returns are rounded to its dtype."""
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)  # (D, D) of q, k, v each
    with torch.autocast(args[0].device.type, enabled=False):
        query, key = (  # (B, L, D) -> (B, H, L, d)
            F.linear(x.to(weight.dtype), weight, bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((args[0][:, :1], args[1]), weights, biases, strict=False)
        )
    keep_row(cls_row(query, key, query.shape[-1] ** -0.5))


class KernelListener(TorchFunctionMode):
    """While entered, hands over the row of the first query of every `scaled_dot_product_attention` call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            keep_row(kernel_row(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def kernel_row(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """`cls_row` of what `scaled_dot_product_attention` is called with."""
    scale = kwargs.get("scale")
    return cls_row(query, key, query.shape[-1] ** -0.5 if scale is None else scale, attn_mask)


LISTENER = KernelListener()
"""Without state, so threads share it; torch keeps a stack of modes for each."""


def _start_listening(module: nn.Module, args: tuple) -> None:
    LISTENER.__enter__()


def _stop_listening(module: nn.Module, args: tuple, output: Any) -> None:
    LISTENER.__exit__(None, None, None)


AttentionInterface.register(RECORDING, recording_attention)
