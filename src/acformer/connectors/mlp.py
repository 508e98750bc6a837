"""`mlp` and `linear`, LLaVA's own connectors: every patch becomes a visual token; the baselines that cost the most."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from acformer.connectors.base import Connector, Geometry
from acformer.connectors.blocks import Projector
from acformer.vision.features import VisionFeatures


class MLPConnector(Connector):
    """LLaVA-1.5's connector: every patch becomes a visual token, by a two-layer MLP.

    Proj(R_v): the N patches, one token each; with `include_prefix` [CLS] and registers too. LLaVA-1.5 drops [CLS]
    (576 tokens of CLIP-L/14-336, the default here); the paper counts 577 (`include_prefix`).
    """

    projector_type: ClassVar[type[nn.Module]] = Projector

    def __init__(self, geometry: Geometry, *, include_prefix: bool = False):
        super().__init__(geometry)
        self.include_prefix = include_prefix
        self.projector = self.projector_type(geometry.vision_hidden_size, geometry.text_hidden_size)

    @property
    def num_tokens(self) -> int:
        """N, or P + N."""
        return self.geometry.num_patches + self.include_prefix * self.geometry.num_prefix_tokens

    def aggregate(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T E"]:
        """(B, N, D) -> (B, N, E)."""
        return self.projector(features.tokens if self.include_prefix else features.patches)


class LinearConnector(MLPConnector):
    """The first LLaVA's connector: every patch becomes a visual token, by one matrix.

    W R_v + b: as `mlp`, with Linear(D, E) alone (Liu et al. 2023).
    """

    projector_type = nn.Linear
