"""A RegNet stage as Honeybee's C-Abstractor uses it: every block keeps width and size.

Unlike the RegNet of its paper: SiLU for ReLU, LayerNorm over the channels for BatchNorm (so that no image sees
another), no stride, and groups of one channel. Point-wise convolutions are Linears on (B, h, w, C).
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RegNetStage(nn.Sequential):
    """`depth` blocks in a row: (B, h, w, C) -> (B, h, w, C)."""

    def __init__(self, channels: int, depth: int):
        super().__init__(*(RegNetBlock(channels) for _ in range(depth)))


class RegNetBlock(nn.Module):
    """SiLU(x + LN(W_3 SE(SiLU(LN(DW_3x3(SiLU(LN(W_1 x)))))))), DW a depth-wise convolution, no biases.

    The Y block of "Designing Network Design Spaces" (Radosavovic et al., 2020): bottleneck ratio 1, squeeze and
    excitation to a quarter of the channels. Differs in what the file's first lines say.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.linear1 = nn.Linear(channels, channels, bias=False)
        self.norm1 = nn.LayerNorm(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm2 = nn.LayerNorm(channels)
        self.squeeze_excite = SqueezeExcite(channels, max(1, round(channels / 4)))
        self.linear3 = nn.Linear(channels, channels, bias=False)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        """(B, h, w, C) -> (B, h, w, C)."""
        y = F.silu(self.norm1(self.linear1(x)))
        y = self.depthwise(y.movedim(-1, 1)).movedim(1, -1)  # channels first for the convolution alone
        y = self.squeeze_excite(F.silu(self.norm2(y)))
        return F.silu(x + self.norm3(self.linear3(y)))


class SqueezeExcite(nn.Module):
    """x * sigmoid(W_2 SiLU(W_1 mean(x) + b_1) + b_2), the mean over the whole image (Hu et al., 2018, with SiLU)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)

    def forward(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        """(B, h, w, C) -> (B, h, w, C)."""
        return x * self.linear2(F.silu(self.linear1(x.mean((1, 2), keepdim=True)))).sigmoid()  # mean: (B, 1, 1, C)
