"""Where queries come from: the one idea in which `acformer`, `perceiver` and their kin differ (Table 3).

A query source turns `VisionFeatures` into T vectors of the encoder's width D; `StackConnector` then lets them read
all tokens through a `CrossAttentionStack`.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from acformer.anchors import select_anchors
from acformer.connectors.base import Geometry
from acformer.errors import UsageError
from acformer.vision import VisionFeatures


class QuerySource(nn.Module, ABC):
    """features -> (B, num_tokens, D). `elastic`: any number of tokens may be asked of the same weights."""

    elastic = False
    num_tokens: int

    @abstractmethod
    def forward(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T D"]:
        """The queries of a batch of images."""


class LearnedQueries(QuerySource):
    """T learned vectors, the same for every image (BLIP-2, Flamingo; the paper's PR baseline)."""

    def __init__(self, geometry: Geometry, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.latents = nn.Parameter(torch.randn(num_tokens, geometry.vision_hidden_size))

    def forward(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T D"]:
        """(T, D) learned -> (B, T, D)."""
        return self.latents.expand(features.tokens.shape[0], -1, -1)


class AnchorQueries(QuerySource):
    """[CLS] and the visual anchors: R_v at the patches that `select_anchors` finds, in raster order (Sec. 3.3).

    Registers are never queries. Without [CLS] (SigLIP) the anchors alone are the queries.
    """

    elastic = True

    def __init__(self, geometry: Geometry, num_anchors: int):
        super().__init__()
        if not 1 <= num_anchors <= geometry.num_patches:
            h, w = geometry.grid
            raise UsageError(f"num_anchors={num_anchors} is outside 1..{h * w}: the image has {h} x {w} patches")
        self.num_cls = min(1, geometry.num_prefix_tokens)
        self.num_tokens = num_anchors + self.num_cls

    def forward(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T D"]:
        """Tokens at [CLS] and the anchors: (B, T, D)."""
        if features.cls_attention is None:
            raise UsageError("this encoder gives no [CLS] attention, so it has no anchors; use another connector")
        index = select_anchors(features.cls_attention, num_tokens - self.num_cls).unsqueeze(-1)
        anchors = features.patches.gather(1, index.expand(-1, -1, features.tokens.shape[-1]))
        return torch.cat([features.tokens[:, : self.num_cls], anchors], dim=1)
