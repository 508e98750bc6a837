"""The [CLS] row of one block's attention, without the N x N map.

A fused kernel (SDPA, FlashAttention) never forms the attention map, and eager attention forms all N x N of it for a
single row. Here the tower keeps whatever kernel it is set to; its last block alone runs through an attention
function of our own, which computes q_cls . K^T for its H heads and then calls that kernel. No module is replaced
and no projection is hooked, so it lives through FSDP2, torch.compile, export and engines that fuse q, k and v.

SigLIP has no [CLS]. What stands in for its row: the attention of the pooling head's learned probe to the patches
(the head reads the last block's output through its norm), which is how SigLIP itself sums up an image.

Modules that are not transformers' are heard instead: of `nn.MultiheadAttention` the projections are known, and
whatever else calls torch's `scaled_dot_product_attention` is listened to while it runs, so that norms and rotary
positions of queries and keys are in the row as the kernel gets them.

Encoders are described by one line in `ENCODERS` or `LIBRARY_ENCODERS`; to support another one, add its line.
"""

import copy
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from acformer.errors import UsageError
from acformer.vision.families import EncoderFamily, Tower, encoder_family, num_prefix_tokens

RECORDING = "acformer_cls_row"


class ClsAttentionTap:
    """Reads the output of a tower's last block and the [CLS] row of that same block's attention.

    Wired into the tower once; `read()` after a forward pass gives (tokens (B, P+N, D), row (B, H, N)) and forgets
    them. The row is the softmax over all P+N keys with the P prefix columns dropped, in float32 at least. One
    pass at a time per tower: two threads that share one would read each other's images.

    hidden_layers: for each of the K further tensors that `read()` adds as (B, K, P+N, D) in this order, the blocks that
    it has been through: 0 is what the first block reads, k the output of the k-th.
    """

    def __init__(self, tower: Tower, hidden_layers: Sequence[int] = ()):
        family = encoder_family(tower.config)
        blocks: Any = tower.get_submodule(family.blocks)
        if "cls_attention_tap" in vars(blocks):
            raise UsageError("this vision model already belongs to an encoder; load another copy for a second one")
        vars(blocks)["cls_attention_tap"] = self
        self.tower_config = tower.config
        self.num_prefix_tokens = num_prefix_tokens(tower.config)
        self.tokens: Tensor | None = None
        self.row: Tensor | None = None
        self.hidden_layers: list[Tensor | None] = [None] * len(hidden_layers)
        blocks[-1].register_forward_hook(self._keep_tokens)
        for place, layer in enumerate(hidden_layers):
            if layer == 0:
                blocks[0].register_forward_pre_hook(partial(self._keep_embedding, place))
            else:
                blocks[layer - 1].register_forward_hook(partial(self._keep_hidden_layer, place))
        module = _asking_module(tower, family)
        self.has_row = module is not None
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_hook(self._keep_projected)
        elif module is not None and isinstance(tower, PreTrainedModel):
            self._record_attention(module)
        elif module is not None:
            self.listener = KernelListener()
            module.register_forward_pre_hook(self._start_listening)
            module.register_forward_hook(self._stop_listening, always_call=True)

    def read(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the last pass left: tokens, row (None for a SigLIP without its pooling head), hidden layers."""
        tokens, row, hidden_layers = self.tokens, self.row, [layer for layer in self.hidden_layers if layer is not None]
        self.tokens = self.row = None
        self.hidden_layers = [None] * len(self.hidden_layers)
        if tokens is None:
            raise RuntimeError("the vision tower has not run since the last read")
        if row is None and self.has_row:
            raise UsageError("the encoder's attention ran through no kernel that is known; of timm: TIMM_FUSED_ATTN=1")
        if row is not None:
            row = row[:, :, self.num_prefix_tokens - tokens.shape[1] :]
        return tokens, row, torch.stack(hidden_layers, dim=1) if hidden_layers else None

    def _record_attention(self, attention: Any) -> None:
        self.eager = import_module(type(attention).__module__).eager_attention_forward
        # A config of its own for this one module: the rest of the tower keeps its kernel.
        attention.config = copy.deepcopy(attention.config)
        attention.config._attn_implementation = RECORDING
        attention.cls_attention_tap = self

    def _keep_tokens(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.tokens = output[0] if isinstance(output, tuple) else output

    def _keep_embedding(self, place: int, module: nn.Module, args: tuple) -> None:
        self.hidden_layers[place] = args[0]

    def _keep_hidden_layer(self, place: int, module: nn.Module, args: tuple, output: Any) -> None:
        self.hidden_layers[place] = output[0] if isinstance(output, tuple) else output

    def _keep_projected(self, module: nn.MultiheadAttention, args: tuple, output: Any) -> None:
        """The row from the first query and the keys: the weights that the module returns are rounded to its dtype."""
        weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
        with torch.autocast(args[0].device.type, enabled=False):
            query, key = (
                F.linear(x.to(weight.dtype), weight, bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
                for x, weight, bias in zip((args[0][:, :1], args[1]), weights, biases, strict=False)
            )
        self.row = cls_row(query, key, query.shape[-1] ** -0.5)

    def _start_listening(self, module: nn.Module, args: tuple) -> None:
        self.listener.__enter__()

    def _stop_listening(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.listener.__exit__(None, None, None)
        self.row, self.listener.row = self.listener.row, None


class KernelListener(TorchFunctionMode):
    """While entered: the row of the first query of every `scaled_dot_product_attention` call, the last one kept."""

    def __init__(self) -> None:
        super().__init__()
        self.row: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.row = kernel_row(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def kernel_row(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """`cls_row` of what `scaled_dot_product_attention` is called with."""
    if attn_mask is not None:
        raise UsageError("this encoder masks its attention; the [CLS] row is read without a mask only")
    scale = kwargs.get("scale")
    return cls_row(query, key, query.shape[-1] ** -0.5 if scale is None else scale)


def _asking_module(tower: Tower, family: EncoderFamily) -> nn.Module | None:
    """The module whose first query's row is wanted: the last block's attention, or the pooling head's, if any."""
    if family.probe is not None:
        has_head = tower.config.to_dict().get("vision_use_head", True)
        return tower.get_submodule(family.probe) if has_head else None
    blocks: Any = tower.get_submodule(family.blocks)
    attention = blocks[-1].get_submodule(family.attention)
    # transformers < 5.19 nests DINOv2's one level deeper.
    return dict(attention.named_children()).get("attention", attention)


def cls_row(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """softmax(q_cls . K^T * scaling): (B, H, L, d), (B, H, L, d) -> (B, H, L), in float32 at least.

    Rounded to bf16 the scores of many patches would tie, so the dot products are formed in float32, also where
    autocast would round them.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = query[:, :, :1].to(dtype) @ key.to(dtype).transpose(-1, -2) * scaling
        return scores.softmax(dim=-1)[:, :, 0]


def recording_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention function of the tapped block: keeps its [CLS] row, then runs the kernel the tower is set to."""
    tap = vars(module).get("cls_attention_tap")
    if tap is None or tap.tower_config._attn_implementation == RECORDING:
        raise UsageError(f"attn_implementation {RECORDING!r} is the tapped block's alone; choose 'sdpa' or another")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    tap.row = cls_row(query, key, scaling)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(tap.tower_config._attn_implementation, tap.eager)
    own_config = module.config
    module.config = tap.tower_config  # FlashAttention asks the module which kernel it is
    try:
        return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    finally:
        module.config = own_config


AttentionInterface.register(RECORDING, recording_attention)
