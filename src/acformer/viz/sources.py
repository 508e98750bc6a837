"""Which patches a visual token was made of: a connector as a table of shares, tokens by patches.

Where tokens read the patches by cross-attention the shares are its weights. Where a token is a weighted mean of patches
(one of them, chosen ones, a region, a merger) they are that mean's, found by differentiating what the
projector is given.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from acformer.connectors import Connector
from acformer.connectors.blocks import CrossAttention
from acformer.connectors.mlp import MLPConnector
from acformer.connectors.resampler import QueryConnector
from acformer.errors import UsageError
from acformer.vision.features import VisionFeatures


def token_sources(
    connector: Connector, features: VisionFeatures, num_tokens: int | None = None
) -> Float[Tensor, "T L"]:
    """(T, P+N) shares of each visual token of the first image; a row sums to 1.

    With a stack of M layers: 1/M sum_m 1/H sum_h softmax(Q_mh K_mh^T / sqrt(d)), its cross-attention, every layer and
    head counting alike. A query's own origin is left out (in attention rollout, Abnar & Zuidema 2020, the residual
    stream would bring it in): the anchors would then be read by construction. Without a stack token t is linear in
    the encoder's tokens R, and its share of patch n is dt / dR_n, the same in every channel.

    Raises:
        UsageError: a connector that does neither, such as a convolution.
    """
    image = features.rows([0])
    if isinstance(connector, QueryConnector) and connector.stack is not None:
        return _cross_attention(connector, image, num_tokens)
    if isinstance(connector, QueryConnector | MLPConnector):
        return _derivative(connector, image, num_tokens)
    raise UsageError(
        f"{type(connector).__name__} mixes patches by more than attention and means, so its tokens cannot be mapped "
        "back to them; connectors that can: acformer, direct, e_vit, linear, mlp, perceiver, pooling, pooling_pr"
    )


def _cross_attention(connector: QueryConnector, features: VisionFeatures, num_tokens: int | None) -> Tensor:
    weights: list[Tensor] = []

    def keep(attention: CrossAttention, args: tuple[Tensor, Tensor]) -> None:
        weights.append(attention_weights(attention, *args)[0].mean(dim=0))

    with ExitStack() as hooks, torch.no_grad():
        for module in connector.modules():
            if isinstance(module, CrossAttention):
                hooks.callback(module.register_forward_pre_hook(keep).remove)
        connector(features, num_tokens)
    return torch.stack(weights).mean(dim=0)  # (layers, T, L) -> (T, L)


def attention_weights(
    attention: CrossAttention, queries: Float[Tensor, "B T D"], features: Float[Tensor, "B L D"]
) -> Float[Tensor, "B H T L"]:
    """softmax(Q K^T / sqrt(d)) of eq. 4, which the fused kernel does not give, in float32."""
    query = attention.q_proj(attention.norm_queries(queries))
    key = attention.kv_proj(attention.norm_features(features)).chunk(2, dim=-1)[0]
    # (B, T, D), (B, L, D) -> (B, H, T, d), (B, H, L, d)
    query, key = (x.float().unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (query, key))
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)


def _derivative(connector: Connector, features: VisionFeatures, num_tokens: int | None) -> Tensor:
    given: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        given.append(args[0])

    def mixed(channel: Tensor) -> Tensor:
        tokens = torch.cat([channel[None, :, None], features.tokens[..., 1:]], dim=-1)
        connector(features._replace(tokens=tokens), num_tokens)
        return given.pop()[0, :, 0]

    hook = connector.get_submodule("projector").register_forward_pre_hook(keep)
    try:
        return _jacobian(mixed, features.tokens[0, :, 0].detach().clone()).float()
    finally:
        hook.remove()


def _jacobian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    with torch.enable_grad():
        return torch.autograd.functional.jacobian(function, at)
