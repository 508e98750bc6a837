"""`d_abstractor`: pooled patches look around themselves; the paper names it beside the C-Abstractor."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from acformer.connectors.base import Geometry
from acformer.connectors.blocks import Projector
from acformer.connectors.deformable import DeformableLayer, uniform_points
from acformer.connectors.grid_connector import GridConnector
from acformer.vision.features import VisionFeatures


class DAbstractorConnector(GridConnector):
    """Honeybee's deformable abstractor: each token looks at a few points around its own region.

    Proj of T = h' x w' pooled patches that went through `depth` layers of deformable attention. Each query begins
    as the average patch of its cell, has a learned position, and looks around a learned reference point that begins
    at the centre of the cell. Source: Honeybee (Cha et al., arXiv 2312.06742), "v-pooled" queries and manually set
    reference points, on Deformable DETR's layers (6 layers, 4 points a head). Differs from the release in reference
    points at the cells' centres, where it spreads them from the first patch to the last; in having no learned
    positions on the patches; in reading out by LLaVA's projector, not one Linear. Not elastic: positions and
    reference points are weights of one layout.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        num_tokens: int = 144,
        depth: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        ff_mult: float = 4,
    ):
        super().__init__(geometry, num_tokens)
        width = geometry.vision_hidden_size
        self.positions = nn.Parameter(torch.randn(self.num_tokens, width))
        self.shifts = nn.Parameter(torch.zeros(self.num_tokens, 2))  # from the cells' centres
        self.layers = nn.ModuleList(DeformableLayer(width, num_heads, num_points, ff_mult) for _ in range(depth))
        self.projector = Projector(width, geometry.text_hidden_size)

    def aggregate(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T E"]:
        """(B, N, D) -> (B, T, E)."""
        patches, grid = features.patches, features.grid
        image = patches.mT.unflatten(-1, grid)  # (B, N, D) -> (B, D, h, w)
        queries = F.adaptive_avg_pool2d(image, self.layout).flatten(2).mT  # (B, D, h', w') -> (B, T, D)
        points = uniform_points(self.layout, patches.device) + self.shifts  # (T, 2)
        for layer in self.layers:
            queries = layer(queries, self.positions, points, patches, grid)
        return self.projector(queries)
