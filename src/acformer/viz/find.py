"""The anchors of one image: what the progressive search keeps, and the [CLS] attention that it goes by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from acformer.anchors.search import quotas, select_anchors
from acformer.errors import UsageError
from acformer.images import ImageSource, load_image
from acformer.vision.features import VisionFeatures


@dataclass(frozen=True, eq=False)
class Anchors:
    """The anchors of one image.

    indices: patches in raster order, as the connector sees them. grid: (h, w) patches.
    scores: (H, N) attention of [CLS] to every patch, by head.
    """

    indices: tuple[int, ...]
    grid: tuple[int, int]
    scores: Float[Tensor, "H N"]

    @property
    def positions(self) -> tuple[tuple[int, int], ...]:
        """(row, column) of each anchor on the grid."""
        return tuple(divmod(index, self.grid[1]) for index in self.indices)

    @property
    def heat(self) -> Float[Tensor, "h w"]:
        """The mean of the heads on the grid."""
        return self.scores.mean(dim=0).reshape(self.grid)  # (H, N) -> (N,) -> (h, w)

    @property
    def by_head(self) -> tuple[tuple[int, ...], ...]:
        """The patches that each head took, in raster order: those which the search without the later heads adds."""
        return anchors_by_head(self.scores, len(self.indices))


def anchors_by_head(scores: Float[Tensor, "H N"], num_anchors: int) -> tuple[tuple[int, ...], ...]:
    """The anchors of `select_anchors`, by the head that chose them (Sec. 3.3): H tuples, disjoint, each ascending.

    The search visits the heads in order, so what the first k of them choose is the search over their rows alone.
    """
    chosen: list[tuple[int, ...]] = []
    taken: set[int] = set()
    num = 0
    for head, quota in enumerate(quotas(num_anchors, len(scores)), start=1):
        num += quota
        found = set(select_anchors(scores[None, :head], num)[0].tolist()) if num else set()
        chosen.append(tuple(sorted(found - taken)))
        taken |= found
    return tuple(chosen)


def find_anchors(
    image: ImageSource, encoder: Callable[[Tensor], VisionFeatures], image_processor: Any, num_anchors: int = 64
) -> Anchors:
    """The anchors of an image, by the progressive search over the encoder's [CLS] attention (Sec. 3.3).

    Args:
        image: whatever `load_image` reads.
        encoder: from `load_vision_encoder`, or a model's `get_vision_features`.
        image_processor: what makes its pixels, such as `square_image_processor(...)` or a model's own.
        num_anchors: how many patches to keep.

    Raises:
        UsageError: the encoder gives no [CLS] attention, or has fewer patches than that.
        ImageError: no such image.
    """
    pixels = image_processor(load_image(image), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        features = encoder(pixels)
    return anchors_of(features, num_anchors)


def anchors_of(features: VisionFeatures, num_anchors: int | None = None) -> Anchors:
    """The anchors of the first image of a batch.

    Args:
        features: of the encoder, or of a model's `get_vision_features`.
        num_anchors: how many; by default a patch in nine, the paper's 64 of 576.

    Raises:
        UsageError: no [CLS] attention, or fewer patches than that.
    """
    scores = features.cls_attention
    if scores is None:
        raise UsageError("this encoder gives no [CLS] attention, so it has no anchors")
    num_patches = scores.shape[-1]
    num_anchors = max(1, num_patches // 9) if num_anchors is None else num_anchors
    indices = select_anchors(scores[:1], num_anchors)[0]
    return Anchors(tuple(indices.tolist()), features.grid, scores[0].cpu())
