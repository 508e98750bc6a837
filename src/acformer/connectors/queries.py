"""Where queries come from: the one idea in which `acformer`, `perceiver` and their like differ (Table 3).

A query source turns `VisionFeatures` into T vectors of the encoder's width D. `Resampler` lets them read all tokens
through a `CrossAttentionStack`; `QueryConnector` takes them straight to the projector (Table 4).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from acformer.anchors.search import check_num_anchors
from acformer.anchors.selectors import SELECTORS, mean_cls_attention
from acformer.connectors.base import Geometry
from acformer.connectors.merging import fuse_rest, merge_rest, take
from acformer.connectors.token_grid import grid_sizes, nearest_num_tokens, token_grid
from acformer.errors import UsageError
from acformer.vision.features import VisionFeatures


class QuerySource(nn.Module, ABC):
    """features -> (B, num_tokens, D). `elastic`: any number of tokens may be asked of the same weights."""

    elastic = False
    num_tokens: int

    @property
    def budgets(self) -> Sequence[int]:
        """See `Connector.budgets`."""
        return (self.num_tokens,)

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
        self.num_cls = geometry.num_cls
        self.num_tokens = num_tokens
        self.grid = geometry.grid
        self.layout = token_grid(num_tokens, geometry.grid, self.num_cls)

    @property
    def budgets(self) -> Sequence[int]:
        """[CLS] and every number of regions that has a layout."""
        return [number + self.num_cls for number in grid_sizes(self.grid)]

    @classmethod
    def for_budget(cls, geometry: Geometry, num_tokens: int) -> dict[str, Any]:
        """The nearest T for which T - 1 has a layout."""
        num_regions = nearest_num_tokens(num_tokens - geometry.num_cls, geometry.grid)
        return {"num_tokens": num_regions + geometry.num_cls}

    def forward(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T D"]:
        """(B, P+N, D) -> (B, T, D)."""
        own = num_tokens == self.num_tokens  # that layout was found when this was built
        layout = self.layout if own else token_grid(num_tokens, features.grid, self.num_cls)
        image = features.patches.mT.unflatten(-1, features.grid)  # (B, N, D) -> (B, D, h, w)
        pooled = F.adaptive_avg_pool2d(image, layout)  # (B, D, h', w')
        return torch.cat([features.tokens[:, : self.num_cls], pooled.flatten(2).mT], dim=1)


class SelectedQueries(QuerySource):
    """[CLS] and R_v at the patches that a selector chooses, in raster order; by default the anchors (Sec. 3.3).

    Registers are never queries. Without [CLS] (SigLIP) the patches alone are.

    Args:
        geometry: D, E, grid and prefix tokens.
        num_anchors: patches beside [CLS], 1..N.
        selector: a name in `acformer.anchors.selectors.SELECTORS`, or an alias, which may set `contextual`.
        stochastic: while training, draw the patches (Gumbel top-k) instead of taking the best; in evaluation the
            choice is the deterministic one.
        contextual: share of the T tokens that are means of the patches which were not chosen, after the chosen ones
            (VisionZip's contextual tokens); default the alias's, or none.

    Raises:
        UsageError: no such selector or number of patches, or `stochastic` with a selector that cannot draw.
    """

    elastic = True
    num_fused = 0
    """Tokens beside [CLS] and the `num_anchors`."""

    def __init__(
        self,
        geometry: Geometry,
        num_anchors: int,
        selector: str = "anchors",
        stochastic: bool = False,
        contextual: float | None = None,
    ):
        super().__init__()
        check_num_anchors(num_anchors, geometry.num_patches, self.num_fused)
        if stochastic and SELECTORS[selector].sample is None:
            able = ", ".join(sorted(name for name, other in SELECTORS.items() if other.sample is not None))
            raise UsageError(f"selector {selector!r} cannot draw its patches; stochastic ones: {able}")
        self.selector, preset = SELECTORS.resolve(selector)
        self.contextual = preset.get("contextual", 0.0) if contextual is None else contextual
        self.stochastic = stochastic or SELECTORS[selector].samples_in_training
        self.num_cls = geometry.num_cls
        self.num_tokens = num_anchors + self.num_fused + self.num_cls
        self.num_patches = geometry.num_patches

    @property
    def budgets(self) -> Sequence[int]:
        """From one patch to all of them, and what stands beside."""
        return range(1 + self.num_fused + self.num_cls, self.num_patches + self.num_cls + 1)

    @classmethod
    def for_budget(cls, geometry: Geometry, num_tokens: int) -> dict[str, Any]:
        """Any T from 2 to N + 1."""
        num_anchors = num_tokens - geometry.num_cls - cls.num_fused
        return {"num_anchors": min(max(num_anchors, 1), geometry.num_patches - cls.num_fused)}

    def forward(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T D"]:
        """[CLS], the chosen patches, what is merged of the rest: (B, T, D)."""
        num_anchors = num_tokens - self.num_cls - self.num_fused
        check_num_anchors(num_anchors, features.patches.shape[1], self.num_fused)
        num_contextual = min(round(self.contextual * num_tokens), num_anchors - 1)  # at least one patch is chosen
        index = self.choose(features, num_anchors - num_contextual)  # (B, K)
        tokens = [features.tokens[:, : self.num_cls], take(features.patches, index)]
        if num_merged := num_contextual + self.num_fused:
            tokens.append(self.merge(features, index, num_merged))
        return torch.cat(tokens, dim=1)

    def choose(self, features: VisionFeatures, num: int) -> Int[Tensor, "B K"]:
        """Indices of `num` patches an image, ascending."""
        selector = SELECTORS[self.selector]
        if selector.sample is not None and self.training and self.stochastic:
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
        return fuse_rest(features.patches, index, mean_cls_attention(features).squeeze(1))
