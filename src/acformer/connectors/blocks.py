"""The two blocks of the paper's information aggregation module (Sec. 3.3, eq. 4-5) and its projector.

Unlike Flamingo's Perceiver, the queries are not appended to the keys; unlike an ordinary decoder layer there is no
self-attention among the queries.
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Attn(query = LN(queries), key = value = LN(features)), no biases; inner width num_heads * head_dim (eq. 4)."""

    def __init__(self, dim: int, num_heads: int, head_dim: int):
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.norm_queries = nn.LayerNorm(dim)
        self.norm_features = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.kv_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.o_proj = nn.Linear(inner, dim, bias=False)

    def forward(
        self,
        queries: Float[Tensor, "B T D"],
        features: Float[Tensor, "B L D"],
        mask: Bool[Tensor, "B 1 T L"] | Float[Tensor, "B H T L"] | None = None,
        added_values: Float[Tensor, "L I"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """(B, T, D), (B, L, D) -> (B, T, D); `mask`: which features a query may read, by default all; or
        what is added to the logits of every head.

        added_values: to the values of every image (I = H d), by default nothing; the keys do without.
        """
        query = self._split_heads(self.q_proj(self.norm_queries(queries)))
        key, value = self.kv_proj(self.norm_features(features)).chunk(2, dim=-1)  # (B, L, H d) each
        value = value if added_values is None else value + added_values
        key, value = self._split_heads(key), self._split_heads(value)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)  # which autocast may have changed
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # (B, H, T, d)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # (B, T, H d) -> (B, T, D)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, L, H d) -> (B, H, L, d)


class FeedForward(nn.Sequential):
    """FF(LN(x)) of eq. 5: LayerNorm, D -> ff_mult * D, GELU, back to D, no biases."""

    def __init__(self, dim: int, ff_mult: float):
        hidden = round(dim * ff_mult)
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden, bias=False),
            nn.GELU(),
            nn.Linear(hidden, dim, bias=False),
        )


class CrossAttentionLayer(nn.Module):
    """A = Q + Attn(LN(Q), LN(R_v)); H = A + FF(LN(A)) (eq. 4-5)."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, ff_mult: float):
        super().__init__()
        self.attention = CrossAttention(dim, num_heads, head_dim)
        self.feed_forward = FeedForward(dim, ff_mult)

    def forward(self, queries: Float[Tensor, "B T D"], features: Float[Tensor, "B L D"]) -> Float[Tensor, "B T D"]:
        """(B, T, D), (B, L, D) -> (B, T, D)."""
        queries = queries + self.attention(queries, features)
        return queries + self.feed_forward(queries)


class CrossAttentionStack(nn.Module):
    """`depth` layers of eq. 4-5 and a final LayerNorm: what `acformer`, `perceiver` and their like share.

    The paper: depth 6, 8 heads of 64. Its text gives a feed-forward width of 2048 at D = 1024 (`ff_mult=2`); the
    release, which produced the numbers, has 4096 (`ff_mult=4`, the default).
    """

    def __init__(self, dim: int, depth: int = 6, num_heads: int = 8, head_dim: int = 64, ff_mult: float = 4):
        super().__init__()
        self.layers = nn.ModuleList(CrossAttentionLayer(dim, num_heads, head_dim, ff_mult) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Float[Tensor, "B T D"], features: Float[Tensor, "B L D"]) -> Float[Tensor, "B T D"]:
        """Queries (B, T, D) read features (B, L, D), prefix tokens included -> (B, T, D)."""
        for layer in self.layers:
            queries = layer(queries, features)
        return self.norm(queries)


class Projector(nn.Sequential):
    """LLaVA-1.5's two-layer MLP: Linear(D, E), GELU, Linear(E, E)."""

    def __init__(self, vision_hidden_size: int, text_hidden_size: int):
        super().__init__(
            nn.Linear(vision_hidden_size, text_hidden_size),
            nn.GELU(),
            nn.Linear(text_hidden_size, text_hidden_size),
        )
