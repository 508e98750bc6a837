"""Where a patch was: its grid position, added to its features. Not in the paper.

In raster order a language model reads *that* one anchor came before another, not where either was, unless the encoder's
features happen to say so. A fixed code of sines and cosines, scaled by one learned gain a channel, says it outright.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from acformer.connectors.base import Geometry
from acformer.errors import UsageError
from acformer.vision import VisionFeatures


class GridPositions(nn.Module):
    """R_v + gain * code(row, column) for the patches; [CLS] and registers stay. The gain starts at 0: no change."""

    def __init__(self, geometry: Geometry):
        super().__init__()
        if geometry.vision_hidden_size % 4:
            raise UsageError(f"positions need an encoder width divisible by 4, not {geometry.vision_hidden_size}")
        self.gain = nn.Parameter(torch.zeros(geometry.vision_hidden_size))

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """The same features with positions in their patches; any grid."""
        code = position_code(features.grid, features.tokens.shape[-1]).to(features.tokens)
        prefix = features.tokens[:, : features.num_prefix_tokens]
        tokens = torch.cat([prefix, features.patches + self.gain.to(features.tokens.dtype) * code], dim=1)
        return features._replace(tokens=tokens)


def position_code(grid: tuple[int, int], dim: int) -> Float[Tensor, "N D"]:
    """sin and cos of row and column, each from 0 to 1 over the image, at D/4 frequencies from pi/2 to 16 pi."""
    frequencies = torch.pi / 2 * 32 ** torch.linspace(0, 1, dim // 4)
    rows, columns = (torch.linspace(0, 1, side) for side in grid)
    angles = torch.cartesian_prod(rows, columns).unsqueeze(-1) * frequencies  # (N, 2, D/4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
