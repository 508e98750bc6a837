"""Which patches stand for an image: the visual anchors and their rivals, by name, under one signature.

Four of them are one search over different scores: with a single row of scores the paper's progressive search is an
ordinary top-k. Scores can also be drawn instead of sorted (`sample`): dividing them by exponential noise before the
search is Gumbel top-k (Kool et al. 2019; log score + Gumbel noise has the same order), so that a patch comes first
in proportion to its score. Unlike most releases everything is batched, equal scores go to the lower patch
index, the result is in raster order, and nothing waits for the device (on the CPU alone, the search looks for NaN).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import sqrt

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from acformer.anchors.search import refuse_nan, select_anchors
from acformer.errors import UsageError
from acformer.registry import Registry
from acformer.vision.features import VisionFeatures

Select = Callable[[VisionFeatures, int], Tensor]
Scores = Callable[[VisionFeatures], Tensor]


@dataclass(frozen=True)
class Selector:
    """A way to choose `num` patches of every image: (features, num) -> (B, num) int64 indices, ascending, distinct.

    select: the choice that depends on the image alone, whatever else is in the batch.
    sample: its random counterpart, another choice in every call; None where there is nothing to draw.
    redraws: sample while training without being asked to.
    contextual: share of an image's visual tokens that are means of the patches which were not chosen (VisionZip).
    """

    select: Select
    sample: Select | None = None
    redraws: bool = False
    contextual: float = 0.0

    def __call__(self, features: VisionFeatures, num: int) -> Int[Tensor, "B K"]:
        """`select`.

        Raises:
            UsageError: `num` outside 1..N, or no [CLS] attention where the selector reads it.
            ValueError: NaN, in a CPU tensor, in what the search compares.
        """
        return self.select(features, num)


def by_score(scores: Scores) -> Selector:
    """The patches with the best scores (B, H, N) >= 0, as the progressive search takes them from H rows."""

    def select(features: VisionFeatures, num: int) -> Tensor:
        return select_anchors(scores(features), num)

    def sample(features: VisionFeatures, num: int) -> Tensor:
        known = scores(features)
        return select_anchors(known / torch.empty_like(known, dtype=torch.float32).exponential_(), num)

    return Selector(select, sample)


def cls_attention(features: VisionFeatures) -> Float[Tensor, "B H N"]:
    """A, the [CLS] attention per head: with the search, the paper's visual anchors (Sec. 3.3)."""
    if features.cls_attention is None:
        raise UsageError(
            "this encoder gives no [CLS] attention, so it has no anchors; a selector that does not read it: "
            "diverse, grid, norm, random"
        )
    return features.cls_attention


def mean_cls_attention(features: VisionFeatures) -> Float[Tensor, "B 1 N"]:
    """The mean of A over heads: one joint top-k, as EViT, VisionZip and most others have it."""
    return cls_attention(features).mean(dim=1, keepdim=True)


def norms(features: VisionFeatures) -> Float[Tensor, "B 1 N"]:
    """The L2 norm of every patch's R_v, in float32."""
    lengths = features.patches.detach().float().norm(dim=-1)
    refuse_nan(lengths, "features.patches")
    return lengths.unsqueeze(1)


def equal(features: VisionFeatures) -> Float[Tensor, "B 1 N"]:
    """1 for every patch: what is drawn from it is a uniformly random set."""
    return features.patches.new_ones(features.patches.shape[:2], dtype=torch.float32).unsqueeze(1)


def own_noise(features: VisionFeatures) -> Float[Tensor, "B 1 N"]:
    """Uniform noise whose seed is the picture: the patches at which its first four channels peak.

    Places of maxima, not bits, so that the last digit, in which batches of another size differ, seldom matters.
    """
    num_patches = features.patches.shape[1]
    seed = features.patches.new_zeros(features.patches.shape[0], 1, dtype=torch.int64)
    for peak in features.patches[..., :4].argmax(dim=1).split(1, dim=1):
        seed = _scramble(seed * num_patches + peak)
    places = torch.arange(num_patches, device=seed.device)
    bits = _scramble(_scramble(seed + 0x9E3779B1 * places)).unsqueeze(1)
    return (bits >> 7).float()  # 24 bits, all of which float32 holds


def _scramble(x: Tensor) -> Tensor:
    """A permutation of the integers below 2^31 that looks random (xor-shift, multiply); nothing overflows."""
    x = x & 0x7FFFFFFF
    return (x ^ (x >> 16)) * 0x45D9F3B & 0x7FFFFFFF


def spread_points(features: VisionFeatures, num: int) -> Int[Tensor, "B K"]:
    """`num` points spread evenly over the (h, w) grid, the same for every image.

    R rows, R the integer nearest to sqrt(num h / w) that has room for all; row i stands at floor((i + 1/2) h / R) and
    its c points, c differing by at most 1 from row to row, at floor((j + 1/2) w / c).
    """
    h, w = features.grid
    check_num(num, h * w)
    rows = min(max(round(sqrt(num * h / w)), -(-num // w)), num, h)
    point = torch.arange(num, device=features.tokens.device)
    row = ((point + 1) * rows - 1) // num
    first = row * num // rows
    count = (row + 1) * num // rows - first
    y = (2 * row + 1) * h // (2 * rows)
    x = (2 * (point - first) + 1) * w // (2 * count)
    return (y * w + x).expand(features.tokens.shape[0], -1)


def farthest_points(features: VisionFeatures, num: int) -> Int[Tensor, "B K"]:
    """Patches as unlike each other as a greedy search finds them: max-min distance (DivPrune, Alvar et al. 2025).

    d(i, j) = 1 - cos(R_i, R_j) in float32 (DivPrune: of the projected tokens). The first patch is the one whose
    nearest neighbour is farthest; then always the one whose nearest chosen patch is farthest. `num` steps in a row,
    each for the whole batch at once. Where looking for NaN would wait for the device it counts as 0: a distance that
    is no number would win every comparison, and its patch be chosen again and again.
    """
    batch, num_patches, _ = features.patches.shape
    check_num(num, num_patches)
    refuse_nan(features.patches, "features.patches")
    patches = F.normalize(features.patches.detach().float().nan_to_num(), dim=-1)
    self_pairs = torch.eye(num_patches, dtype=torch.bool, device=patches.device)
    with unrounded(patches.device):
        distance = 1 - patches @ patches.mT
    nearest = distance.masked_fill(self_pairs, torch.inf).amin(dim=-1)
    best = nearest.argmax(dim=-1, keepdim=True)
    chosen, distance = [best], distance.masked_fill(self_pairs, -torch.inf)  # -inf: never chosen again
    nearest = torch.full_like(nearest, torch.inf)
    for _ in range(num - 1):
        row = distance.gather(1, best.unsqueeze(-1).expand(batch, 1, num_patches)).squeeze(1)
        nearest = nearest.minimum(row)
        best = nearest.argmax(dim=-1, keepdim=True)
        chosen.append(best)
    return torch.cat(chosen, dim=-1).sort(dim=-1).values


def unrounded(device: torch.device) -> AbstractContextManager:
    """Where products of matrices keep their dtype: autocast would round them, and so change what is chosen."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def check_num(num: int, num_patches: int) -> None:
    """`UsageError` unless an image of `num_patches` has `num` to choose."""
    if not 1 <= num <= num_patches:
        raise UsageError(f"num_anchors must be in 1..{num_patches} (the number of patches), got {num}")


# 10 of 64, 20 of 128, 30 of 192: VisionZip's settings for LLaVA-1.5 (Yang et al. 2025).
CONTEXTUAL = 5 / 32

SELECTORS = Registry[Selector](
    "selector",
    "acformer.selectors",
    {
        "anchors": by_score(cls_attention),
        "cls_topk": by_score(mean_cls_attention),
        "diverse": Selector(farthest_points),
        "dominant_contextual": replace(by_score(mean_cls_attention), contextual=CONTEXTUAL),
        "grid": Selector(spread_points),
        "norm": by_score(norms),
        "random": Selector(by_score(own_noise).select, by_score(equal).sample, redraws=True),
    },
)
