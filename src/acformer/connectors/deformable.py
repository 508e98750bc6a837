"""Deformable attention over one feature map: each query reads a few points that it chooses, between the patches.

Unlike ordinary attention there are no keys: offsets and weights of the points come from the query alone. Unlike
Deformable DETR there is one level, and no mask.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from acformer.connectors.attention import MultiHeadAttention, check_divisible


class DeformableAttention(nn.Module):
    """W_o Concat_i(sum_k a_ik(q) (W_v x)_i[p + o_ik(q)]) + b_o, x[.] bilinear, 0 outside the map.

    Of each head i, `num_points` offsets o, in patches, and weights a, a softmax over k, are linear in the query.
    At the start the weights are equal and the offsets the same for every query: head i looks in one of `num_heads`
    directions, its k-th point k patches away. Source: Deformable DETR (Zhu et al., arXiv 2010.04159, eq. 2 and
    appendix A.4). Offsets, weights and positions are computed in float32 at least: bf16 cannot tell 24 patches apart
    by less than a tenth.
    """

    def __init__(self, dim: int, num_heads: int, num_points: int):
        super().__init__()
        self.num_heads, self.num_points = check_divisible(dim, num_heads), num_points
        self.offset_proj = nn.Linear(dim, num_heads * num_points * 2)
        self.weight_proj = nn.Linear(dim, num_heads * num_points)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self._init_weights()

    def _init_weights(self) -> None:
        """Offsets and weights as the class says; values and outputs Xavier."""
        for linear in (self.offset_proj, self.weight_proj):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.offset_proj.bias.data.copy_(_initial_offsets(self.num_heads, self.num_points).flatten())
        for linear in (self.v_proj, self.o_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        queries: Float[Tensor, "B T D"],
        points: Float[Tensor, "T 2"],
        patches: Float[Tensor, "B N D"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "B T D"]:
        """(B, T, D) queries at reference points (x, y) in [0, 1] read the patches of an (h, w) grid -> (B, T, D)."""
        dtype = torch.promote_types(queries.dtype, torch.float32)
        offsets = self.offset_proj(queries).to(dtype).unflatten(-1, (self.num_heads, self.num_points, 2))
        weights = self.weight_proj(queries).to(dtype).unflatten(-1, (self.num_heads, -1)).softmax(-1)  # (B, T, H, K)
        x, y = offsets.unbind(-1)  # (B, T, H, K) each, in patches
        positions = points[:, None, None] + torch.stack([x / grid[1], y / grid[0]], dim=-1)  # (B, T, H, K, 2)
        value = self.v_proj(patches).mT.unflatten(1, (self.num_heads, -1)).unflatten(-1, grid)  # (B, H, d, h, w)
        # Every head has an image of its own, so heads stand in the batch: (B H, d, h, w) and (B H, T, K, 2)
        values = sample(value.to(dtype).flatten(0, 1), positions.transpose(1, 2).flatten(0, 1))  # (B H, d, T, K)
        mixed = (values * weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)).sum(-1)  # (B H, d, T)
        # (B, H, d, T) -> (B, H d, T) -> (B, T, D)
        return self.o_proj(mixed.unflatten(0, (-1, self.num_heads)).flatten(1, 2).mT.to(queries.dtype))


class DeformableLayer(nn.Module):
    """x = LN(x + SelfAttn(x + p, x + p, x)); x = LN(x + DeformAttn(x + p)); x = LN(x + W_2 ReLU(W_1 x)).

    A decoder layer of Deformable DETR, norms after the sums; p are the queries' positions. No dropout.
    """

    def __init__(self, dim: int, num_heads: int, num_points: int, ff_mult: float):
        super().__init__()
        self.self_attention = MultiHeadAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = DeformableAttention(dim, num_heads, num_points)
        self.norm2 = nn.LayerNorm(dim)
        hidden = round(dim * ff_mult)
        self.feed_forward = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        queries: Float[Tensor, "B T D"],
        positions: Float[Tensor, "T D"],
        points: Float[Tensor, "T 2"],
        patches: Float[Tensor, "B N D"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "B T D"]:
        """(B, T, D), patches (B, N, D) -> (B, T, D)."""
        positioned = queries + positions
        queries = self.norm1(queries + self.self_attention(positioned, positioned, queries))
        queries = self.norm2(queries + self.attention(queries + positions, points, patches, grid))
        return self.norm3(queries + self.feed_forward(queries))


def sample(image: Float[Tensor, "B C h w"], positions: Float[Tensor, "B T K 2"]) -> Float[Tensor, "B C T K"]:
    """Bilinear values of (B, C, h, w) at (x, y): (0, 0) is the image's outer corner, (1, 1) the opposite one."""
    # `grid_sample` counts from -1 to 1.
    return F.grid_sample(image, 2 * positions - 1, mode="bilinear", padding_mode="zeros", align_corners=False)


def uniform_points(layout: tuple[int, int], device: torch.device) -> Float[Tensor, "T 2"]:
    """Centres (x, y) in [0, 1] of the h' x w' cells of an image, in raster order."""
    y, x = ((torch.arange(count, device=device) + 0.5) / count for count in layout)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)  # (h', w', 2) -> (T, 2)


def _initial_offsets(num_heads: int, num_points: int) -> Float[Tensor, "H K 2"]:
    """Point k of head i: k + 1 patches away in direction i, distances in the maximum norm."""
    angle = torch.arange(num_heads) * (2 * math.pi / num_heads)
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (H, 2)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    return direction[:, None] * torch.arange(1, num_points + 1)[:, None]  # (H, 1, 2) * (K, 1)
