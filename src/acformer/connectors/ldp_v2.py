"""`ldp_v2`: LLaVA's MLP, an average pool, and a convolution that tells the tokens where they are."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from acformer.connectors.base import Geometry
from acformer.connectors.blocks import Projector
from acformer.connectors.grid_connector import GridConnector
from acformer.vision.features import VisionFeatures


class LDPv2Connector(GridConnector):
    """MobileVLM V2's lightweight projector: LLaVA's MLP, average-pooled, and a depth-wise convolution added.

    y + DW_3x3(y) with y = Pool(Linear(GELU(Linear(patches)))). The depth-wise convolution, with bias, is a positional
    encoding generator (PEG, arXiv 2102.10882). Prefix tokens are dropped, and no weight depends on T. Source:
    MobileVLM V2 (Chu et al., arXiv 2402.03766), whose two point-wise convolutions are the Linears. Differs in taking
    any T that has a layout; 144 of 24 x 24 patches is their pool of 2 x 2.
    """

    elastic = True

    def __init__(self, geometry: Geometry, *, num_tokens: int = 144):
        super().__init__(geometry, num_tokens)
        width = geometry.text_hidden_size
        self.projector = Projector(geometry.vision_hidden_size, width)
        self.positions = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def aggregate(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T E"]:
        """(B, N, D) -> (B, T, E); `UsageError` for a `num_tokens` that has no layout on the grid."""
        image = self.projector(features.patches).mT.unflatten(-1, features.grid)  # (B, N, E) -> (B, E, h, w)
        pooled = F.adaptive_avg_pool2d(image, self.layout_of(num_tokens))  # (B, E, h', w')
        return (pooled + self.positions(pooled)).flatten(2).mT  # (B, E, T) -> (B, T, E)
