"""`c_abstractor`: convolutions before and after an average pool, a baseline of the paper (Table 3)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from acformer.connectors.base import Geometry
from acformer.connectors.blocks import Projector
from acformer.connectors.grid_connector import GridConnector
from acformer.connectors.regnet import RegNetStage
from acformer.vision.features import VisionFeatures


class CAbstractorConnector(GridConnector):
    """Honeybee's convolutional abstractor: RegNet stages around an average pool, a baseline of Table 3.

    Proj(Stage_2(Pool(Stage_1(patches)))), pooled to T = h' x w' tokens. Prefix tokens are dropped. No weight
    depends on T, so one checkpoint serves any budget that has a layout. Source: Honeybee (Cha et al., arXiv
    2312.06742) as in AcFormer's release: without Honeybee's learned positions on the patches, and read out by
    LLaVA's projector, with GELU where Honeybee has SiLU.
    """

    elastic = True

    def __init__(self, geometry: Geometry, *, num_tokens: int = 144, depth: int = 3):
        super().__init__(geometry, num_tokens)
        self.stage1 = RegNetStage(geometry.vision_hidden_size, depth)
        self.stage2 = RegNetStage(geometry.vision_hidden_size, depth)
        self.projector = Projector(geometry.vision_hidden_size, geometry.text_hidden_size)

    def aggregate(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T E"]:
        """(B, N, D) -> (B, T, E); `UsageError` for a `num_tokens` that has no layout on the grid."""
        return self.projector(self.abstract(features, num_tokens))

    def abstract(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T D"]:
        """What the release calls C-Abstractor, before the projector: (B, N, D) -> (B, T, D)."""
        image = self.stage1(features.patches.unflatten(1, features.grid))  # (B, N, D) -> (B, h, w, D)
        # Pooling wants channels first, the stages want them last: (B, D, h, w) -> (B, D, h', w') -> (B, h', w', D)
        pooled = F.adaptive_avg_pool2d(image.movedim(-1, 1), self.layout_of(num_tokens)).movedim(1, -1)
        return self.stage2(pooled).flatten(1, 2)  # (B, h', w', D) -> (B, T, D)
