"""`pixel_shuffle`: space to depth, as in InternVL and Idefics."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from acformer.connectors.base import Connector, Geometry
from acformer.connectors.blocks import Projector
from acformer.connectors.patch_blocks import as_block, nearest_block, split_blocks
from acformer.vision.features import VisionFeatures


class PixelShuffleConnector(Connector):
    """Neighbouring patches side by side in one token (space to depth): nothing is dropped before the first matrix.

    Proj of the k_h x k_w patches of a block, row by row in one vector of k_h k_w D: T = N / (k_h k_w); prefix
    tokens are dropped. Differs from InternVL 1.5 (Chen et al. 2024) in having no LayerNorm before the MLP, from
    Idefics3 (Laurençon et al. 2024) in having an MLP, there one matrix.

    Args:
        geometry: where it stands.
        kernel: k, or (k_h, k_w); must divide the grid, else `UsageError`.
    """

    def __init__(self, geometry: Geometry, *, kernel: int | Sequence[int] = 2):
        super().__init__(geometry)
        self.block = as_block("kernel", kernel, geometry.grid)
        width = self.block[0] * self.block[1] * geometry.vision_hidden_size
        self.projector = Projector(width, geometry.text_hidden_size)

    @classmethod
    def for_budget(cls, geometry: Geometry, num_tokens: int) -> dict[str, Any]:
        """The kernel that gives the number of tokens nearest to `num_tokens`."""
        return {"kernel": list(nearest_block(num_tokens, geometry.grid))}

    @property
    def num_tokens(self) -> int:
        """N / (k_h k_w)."""
        return self.geometry.num_patches // (self.block[0] * self.block[1])

    def aggregate(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T E"]:
        """(B, N, D) -> (B, T, k_h k_w D) -> (B, T, E)."""
        blocks = split_blocks(features.patches, features.grid, self.block)  # (B, T, k_h k_w, D)
        return self.projector(blocks.flatten(2))
