"""The least arithmetic (FLOP) and memory traffic (bytes) of each part, from shapes alone.

A product of (m, k) and (k, n) is 2 m k n FLOP; norms, activations and softmax count nothing. Unlike what a FLOP counter
sees, causal attention has its lower triangle alone, and a frozen weight has no gradient. `MeasuredPeak.roofline` turns
both into seconds.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from acformer.connectors import Connector
from acformer.vision.encoder import num_blocks
from acformer.vision.families import num_prefix_tokens


def encoder_flops(config: PreTrainedConfig, grid: tuple[int, int], feature_layer: int = -1) -> int:
    """FLOP for an image of h x w patches up to the feature layer: patch embedding, then blocks.

    A block of width D with a feed-forward width F over L = P + N tokens: 8 L D^2 + 4 L^2 D + 4 L D F.
    """
    sizes = config.to_dict()
    width, patches = config.hidden_size, grid[0] * grid[1]
    length = patches + num_prefix_tokens(config)
    inner = round(width * sizes["mlp_ratio"]) if "mlp_ratio" in sizes else sizes["intermediate_size"]
    block = 8 * length * width**2 + 4 * length**2 * width + 4 * length * width * inner
    embedding = 2 * patches * width * 3 * config.patch_size**2
    return embedding + num_blocks(config, feature_layer) * block


def cls_row_flops(config: PreTrainedConfig, grid: tuple[int, int]) -> int:
    """2 L D more: q_cls . K^T of all heads, for an image."""
    return 2 * (grid[0] * grid[1] + num_prefix_tokens(config)) * config.hidden_size


def text_flops(config: PreTrainedConfig, length: int, past: int = 0, logits: int = 1) -> int:
    """FLOP of a Llama for `length` new tokens of a row after `past` cached ones; the head for `logits` of them."""
    return _linear_flops(config) * length + _attention_flops(config, length, past) + _head_flops(config) * logits


def text_backward_flops(config: PreTrainedConfig, length: int, logits: int) -> int:
    """FLOP of the gradient with respect to the input, all weights frozen.

    A Linear costs its forward pass again (no weight gradient), attention twice its own.
    """
    return _linear_flops(config) * length + 2 * _attention_flops(config, length, 0) + _head_flops(config) * logits


def text_weights(config: PreTrainedConfig) -> int:
    """Weights that every pass reads: the layers' matrices and the head; of an untied embedding only rows are read."""
    return (_linear_flops(config) + _head_flops(config)) // 2


def kv_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the KV cache: 2 * layers * KV heads * head width * tokens * bytes a value."""
    heads = config.to_dict().get("num_key_value_heads") or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * _head_dim(config) * tokens * dtype.itemsize


def connector_bytes(connector: Connector) -> int:
    """Bytes of its weights, which a pass reads once."""
    return sum(weight.numel() * weight.itemsize for weight in connector.parameters())


def counted_flops(connector: Connector, run: Callable[[Connector, Any], Any]) -> int:
    """FLOP of `run(connector, features of one image)` as torch counts them; nothing is computed (meta device).

    Connectors are many and differ, so that they alone are counted instead of written down.
    """
    on_meta = _on_meta(connector)
    corrected = {torch.ops.aten.convolution_backward: _conv_backward}
    with FlopCounterMode(display=False, custom_mapping=corrected) as counter:
        run(on_meta, on_meta.zero_features())
    return counter.get_total_flops()


def connector_flops(connector: Connector) -> int:
    """FLOP of a forward pass for an image."""
    return counted_flops(connector, lambda on_meta, features: on_meta(features))


def connector_step_flops(connector: Connector) -> int:
    """FLOP of a forward and a backward pass for an image: gradients of the weights, none of the features."""
    return counted_flops(connector, lambda on_meta, features: on_meta(features).sum().backward())


def _on_meta(connector: Connector) -> Connector:
    """A copy on the meta device; the connector's weights stay where they are."""
    memo: dict[int, Any] = {}
    for tensor in (*connector.parameters(), *connector.buffers()):
        empty = torch.empty_like(tensor, device="meta", dtype=torch.float32)
        memo[id(tensor)] = torch.nn.Parameter(empty) if isinstance(tensor, torch.nn.Parameter) else empty
    return copy.deepcopy(connector, memo)


def _conv_backward(grad: Any, x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Each gradient asked for costs the forward pass; torch's own count forgets that groups do not mix.

    grad (B, out, ...) and weight (out, in / groups, ...) are shapes; the last argument says which gradients are wanted.
    """
    return 2 * math.prod(weight[1:]) * math.prod(grad) * sum(args[-1][:2])


def _linear_flops(config: PreTrainedConfig) -> int:
    """Of all layers' matrices, for a token: queries and output, keys and values, the gated feed-forward network."""
    width, inner = config.hidden_size, config.num_attention_heads * _head_dim(config)
    keys = config.num_key_value_heads * _head_dim(config)
    return config.num_hidden_layers * 2 * (2 * width * inner + 2 * width * keys + 3 * width * config.intermediate_size)


def _attention_flops(config: PreTrainedConfig, length: int, past: int) -> int:
    """Query i reads past + i + 1 keys and as many values."""
    pairs = length * past + length * (length + 1) // 2
    return config.num_hidden_layers * 4 * config.num_attention_heads * _head_dim(config) * pairs


def _head_flops(config: PreTrainedConfig) -> int:
    return 2 * config.hidden_size * config.vocab_size


def _head_dim(config: PreTrainedConfig) -> int:
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
