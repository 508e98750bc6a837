"""Multi-head attention with queries, keys and values of its own: the textbook's, without a bias on the keys.

`blocks.CrossAttention` is another thing: the paper's, with norms inside and no biases at all.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from acformer.errors import UsageError


class MultiHeadAttention(nn.Module):
    """Concat_i(softmax(q_i k_i^T / sqrt(d)) v_i) W_o, with q = x W_q + b_q and so on (Vaswani et al., 2017, eq. 1).

    Differs from `nn.MultiheadAttention` in separate weights for q, k and v, and in keys without a bias, which the
    softmax would not see: it adds the same score to every key.

    Args:
        dim: width of queries, keys, values and output.
        num_heads: must divide it, else `UsageError`.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = check_divisible(dim, num_heads)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def forward(
        self, query: Float[Tensor, "B T D"], key: Float[Tensor, "B L D"], value: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B T D"]:
        """(B, T, D), (B, L, D), (B, L, D) -> (B, T, D)."""
        query = self._split_heads(self.q_proj(query))
        key, value = self._split_heads(self.k_proj(key)), self._split_heads(self.v_proj(value))
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, H, T, d)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # (B, T, H d), H d = D

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, H, L, d)


def check_divisible(dim: int, num_heads: int) -> int:
    """`num_heads`, or `UsageError` where a width of `dim` does not split into that many heads."""
    if dim % num_heads:
        raise UsageError(f"num_heads={num_heads} does not divide the width {dim}; choose one that does")
    return num_heads
