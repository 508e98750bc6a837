"""Where queries come from: the one idea in which `acformer`, `perceiver` and their kin differ (Table 3).

A query source turns `VisionFeatures` into T vectors of the encoder's width D. `StackConnector` lets them read all
tokens through a `CrossAttentionStack`; `QueryConnector` alone takes them straight to the projector (Table 4).
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from acformer.anchors.selectors import SELECTORS, check_num, mean_cls_attention
from acformer.connectors.base import Geometry
from acformer.connectors.merging import fuse_rest, merge_rest, take
from acformer.connectors.token_grid import nearest_num_tokens, token_grid
from acformer.errors import UsageError
from acformer.vision.features import VisionFeatures


class QuerySource(nn.Module, ABC):
    """features -> (B, num_tokens, D). `elastic`: any number of tokens may be asked of the same weights."""

    elastic = False
    num_tokens: int

    @classmethod
    @abstractmethod
    def for_budget(cls, geometry: Geometry, num_tokens: int) -> dict[str, Any]:
        """See `Connector.for_budget`."""

    @abstractmethod
    def forward(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T D"]:
        """The queries of a batch of images."""


class LearnedQueries(QuerySource):
    """T learned vectors, the same for every image (BLIP-2, Flamingo; the paper's PR baseline)."""

    def __init__(self, geometry: Geometry, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.latents = nn.Parameter(torch.randn(num_tokens, geometry.vision_hidden_size))

    @classmethod
    def for_budget(cls, geometry: Geometry, num_tokens: int) -> dict[str, Any]:
        """Any T."""
        return {"num_queries": num_tokens}

    def forward(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T D"]:
        """(T, D) learned -> (B, T, D)."""
        return self.latents.expand(features.tokens.shape[0], -1, -1)


class PooledQueries(QuerySource):
    """[CLS] and the means of h' x w' regions of the patches, (h', w') = `token_grid(T, (h, w), extra=1)`.

    Adaptive average pooling: where h' does not divide h, neighbouring regions share patches. Registers are left
    out; without [CLS] the T tokens are all regions. `UsageError` where T - 1 cannot be laid out so.
    """

    elastic = True

    def __init__(self, geometry: Geometry, num_tokens: int):
        super().__init__()
        self.num_cls = min(1, geometry.num_prefix_tokens)
        self.num_tokens = num_tokens
        self.layout = token_grid(num_tokens, geometry.grid, self.num_cls)

    @classmethod
    def for_budget(cls, geometry: Geometry, num_tokens: int) -> dict[str, Any]:
        """The nearest T for which T - 1 has a layout."""
        num_cls = min(1, geometry.num_prefix_tokens)
        return {"num_tokens": nearest_num_tokens(num_tokens - num_cls, geometry.grid) + num_cls}

    def forward(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T D"]:
        """(B, P+N, D) -> (B, T, D)."""
        own = num_tokens == self.num_tokens
        layout = self.layout if own else token_grid(num_tokens, features.grid, self.num_cls)
        pooled = F.adaptive_avg_pool2d(features.patches.mT.unflatten(-1, features.grid), layout)
        return torch.cat([features.tokens[:, : self.num_cls], pooled.flatten(2).mT], dim=1)


class SelectedQueries(QuerySource):
    """[CLS] and R_v at the patches that a selector chooses, in raster order; by default the anchors (Sec. 3.3).

    Registers are never queries. Without [CLS] (SigLIP) the patches alone are. Where the selector has a share of
    contextual tokens, so many of the `num_anchors` are means of the other patches, after the chosen ones.

    Args:
        geometry: D, E, grid and prefix tokens.
        num_anchors: patches beside [CLS], 1..N.
        selector: a name in `acformer.anchors.selectors.SELECTORS`.
        stochastic: while training, draw the patches (Gumbel top-k) instead of taking the best; in evaluation the
            choice is the deterministic one.
    """

    elastic = True
    num_fused = 0

    def __init__(self, geometry: Geometry, num_anchors: int, selector: str = "anchors", stochastic: bool = False):
        super().__init__()
        most = geometry.num_patches - self.num_fused
        if not 1 <= num_anchors <= most:
            h, w = geometry.grid
            raise UsageError(f"num_anchors={num_anchors} is outside 1..{most}: the image has {h} x {w} patches")
        sample = SELECTORS[selector].sample
        if stochastic and sample is None:
            able = ", ".join(sorted(name for name, other in SELECTORS.items() if other.sample is not None))
            raise UsageError(f"selector {selector!r} cannot draw its patches; stochastic ones: {able}")
        self.selector, self.stochastic = selector, stochastic
        self.num_cls = min(1, geometry.num_prefix_tokens)
        self.num_tokens = num_anchors + self.num_fused + self.num_cls

    @classmethod
    def for_budget(cls, geometry: Geometry, num_tokens: int) -> dict[str, Any]:
        """Any T from 2 to N + 1."""
        num_anchors = num_tokens - min(1, geometry.num_prefix_tokens) - cls.num_fused
        return {"num_anchors": min(max(num_anchors, 1), geometry.num_patches - cls.num_fused)}

    def forward(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T D"]:
        """[CLS], the chosen patches, what is merged of the rest: (B, T, D)."""
        num = num_tokens - self.num_cls
        check_num(num - self.num_fused, features.patches.shape[1])  # contextual tokens too need a patch each
        share = SELECTORS[self.selector].contextual
        num_merged = self.num_fused or min(round(share * num_tokens), max(num - 1, 0))
        index = self.choose(features, num - num_merged)
        tokens = [features.tokens[:, : self.num_cls], take(features.patches, index)]
        if num_merged > 0:
            tokens.append(self.merge(features, index, num_merged))
        return torch.cat(tokens, dim=1)

    def choose(self, features: VisionFeatures, num: int) -> Int[Tensor, "B K"]:
        """Indices of `num` patches an image, ascending."""
        selector = SELECTORS[self.selector]
        if selector.sample is not None and self.training and (self.stochastic or selector.redraws):
            return selector.sample(features, num)
        return selector(features, num)

    def merge(self, features: VisionFeatures, index: Int[Tensor, "B K"], num: int) -> Float[Tensor, "B M D"]:
        """`num` tokens that stand for the patches not in `index`."""
        return merge_rest(features.patches, index, num)


class FusedQueries(SelectedQueries):
    """As `SelectedQueries`, and one token more: the other patches' mean, weighted by the heads' mean attention."""

    num_fused = 1

    def merge(self, features: VisionFeatures, index: Int[Tensor, "B K"], num: int) -> Float[Tensor, "B M D"]:
        """(B, 1, D)."""
        num_patches = features.patches.shape[1]
        if index.shape[1] == num_patches:
            raise UsageError(f"all {num_patches} patches are chosen and none is left to fuse: ask for fewer tokens")
        return fuse_rest(features.patches, index, mean_cls_attention(features).squeeze(1))
