"""Which patches stand for an image: the visual anchors and their rivals, by name, under one signature.

Four of them are one search over different scores: with a single row of scores the paper's progressive search is an
ordinary top-k. Scores can also be drawn instead of sorted (`sample`): dividing them by exponential noise before the
search is Gumbel top-k (Kool et al. 2019; log score + Gumbel noise has the same order), so that a patch comes first
in proportion to its score. Unlike most releases everything is batched, equal scores go to the lower patch
index, the result is in raster order, and nothing waits for the device (on the CPU alone, the search looks for NaN).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from acformer.anchors.search import check_num_anchors, refuse_nan, select_anchors
from acformer.errors import UsageError
from acformer.registry import Alias, Registry
from acformer.vision.features import VisionFeatures

Select = Callable[[VisionFeatures, int], Tensor]
Scores = Callable[[VisionFeatures], Tensor]


@dataclass(frozen=True)
class Selector:
    """A way to choose `num` patches of every image: (features, num) -> (B, num) int64 indices, ascending, distinct.

    summary: what it chooses by, in one line.
    select: the choice that depends on the image alone, whatever else is in the batch.
    sample: its random counterpart, another choice in every call; None where there is nothing to draw.
    samples_in_training: draw while training without being asked to.
    """

    summary: str
    select: Select
    sample: Select | None = None
    samples_in_training: bool = False

    def __call__(self, features: VisionFeatures, num: int) -> Int[Tensor, "B K"]:
        """`select`.

        Raises:
            UsageError: `num` outside 1..N, or no [CLS] attention where the selector reads it.
            ValueError: NaN, in a CPU tensor, in what the search compares.
        """
        return self.select(features, num)

    @property
    def drawn(self) -> str:
        """Whether it draws at random while training: `always`, `if asked` (`stochastic_anchors`) or `no`."""
        return "always" if self.samples_in_training else "if asked" if self.sample else "no"

    @property
    def needs_cls_attention(self) -> bool:
        """Whether it refuses an encoder that gives none."""
        nothing = torch.zeros(1, 2, 1, device="meta")
        return refuses_no_cls_attention(lambda features: self(features, 1), VisionFeatures(nothing, None, (1, 2), 0))


def by_score(scores: Scores) -> Selector:
    """The patches with the best scores (B, H, N) >= 0, as the progressive search takes them from H rows.

    The first line of the function's docstring is the selector's summary.
    """

    def select(features: VisionFeatures, num: int) -> Tensor:
        return select_anchors(scores(features), num)

    def sample(features: VisionFeatures, num: int) -> Tensor:
        known = scores(features)
        # exponential noise: score / noise has the order of log score + Gumbel noise
        return select_anchors(known / torch.empty_like(known, dtype=torch.float32).exponential_(), num)

    return Selector((scores.__doc__ or "").partition("\n")[0], select, sample)


def refuses_no_cls_attention(read: Callable[[VisionFeatures], Any], features: VisionFeatures) -> bool:
    """Whether `read` raises `UsageError` for features of an encoder that gives no [CLS] attention."""
    try:
        read(features._replace(cls_attention=None))
    except UsageError:
        return True
    return False


def cls_attention(features: VisionFeatures) -> Float[Tensor, "B H N"]:
    """The [CLS] attention of each head: searched head by head, the paper's visual anchors (Sec. 3.3)."""
    if features.cls_attention is None:
        raise UsageError(
            "this encoder gives no [CLS] attention, so it has no anchors; a selector that does not read it: "
            "diverse, grid, norm, random"
        )
    return features.cls_attention


def mean_cls_attention(features: VisionFeatures) -> Float[Tensor, "B 1 N"]:
    """The [CLS] attention's mean over heads: a top-k, as EViT, VisionZip and most others have it."""
    return cls_attention(features).mean(dim=1, keepdim=True)


def norms(features: VisionFeatures) -> Float[Tensor, "B 1 N"]:
    """The L2 norm of every patch's features, in float32."""
    lengths = features.patches.detach().float().norm(dim=-1)
    refuse_nan(lengths, "features.patches")
    return lengths.unsqueeze(1)


def uniform(features: VisionFeatures) -> Float[Tensor, "B 1 N"]:
    """1 for every patch: what is drawn from it is a uniformly random set."""
    return features.patches.new_ones(features.patches.shape[:2], dtype=torch.float32).unsqueeze(1)


def image_noise(features: VisionFeatures) -> Float[Tensor, "B 1 N"]:
    """Uniform noise whose seed is the image: the patches at which its first four channels peak.

    The places of maxima and not, say, the bits of the features: these differ in the last digit between batches of
    different sizes, and the same image would have other patches.
    """
    num_patches = features.patches.shape[1]
    seed = features.patches.new_zeros(features.patches.shape[0], 1, dtype=torch.int64)  # (B, 1)
    for peak in features.patches[..., :4].argmax(dim=1).split(1, dim=1):  # (B, 4) in columns of (B, 1)
        seed = _hash(seed * num_patches + peak)
    index = torch.arange(num_patches, device=seed.device)
    bits = _hash(_hash(seed + 0x9E3779B1 * index)).unsqueeze(1)  # (B, N) -> (B, 1, N)
    return (bits >> 7).float()  # 24 bits, all of which float32 holds


def _hash(x: Tensor) -> Tensor:
    """A permutation of the integers below 2^31 that looks random (xor-shift, multiply); nothing overflows."""
    x = x & 0x7FFFFFFF
    return (x ^ (x >> 16)) * 0x45D9F3B & 0x7FFFFFFF


def spread_points(features: VisionFeatures, num: int) -> Int[Tensor, "B K"]:
    """`num` points spread evenly over the (h, w) grid, the same for every image.

    R rows, R the integer nearest to sqrt(num h / w) that has room for all; row i stands at floor((i + 1/2) h / R) and
    its c points, c differing by at most 1 from row to row, at floor((j + 1/2) w / c).
    """
    h, w = features.grid
    check_num_anchors(num, h * w)
    rows = min(max(round(sqrt(num * h / w)), -(-num // w)), num, h)
    point = torch.arange(num, device=features.tokens.device)  # (num,), as all that follows
    row = ((point + 1) * rows - 1) // num
    first = row * num // rows  # point of its row
    count = (row + 1) * num // rows - first  # points in its row
    y = (2 * row + 1) * h // (2 * rows)
    x = (2 * (point - first) + 1) * w // (2 * count)
    return (y * w + x).expand(features.tokens.shape[0], -1)  # (num,) -> (B, num)


def farthest_points(features: VisionFeatures, num: int) -> Int[Tensor, "B K"]:
    """Patches as unlike each other as a greedy search finds them: max-min distance (DivPrune, Alvar et al. 2025).

    d(i, j) = 1 - cos(R_i, R_j) in float32 (DivPrune: of the projected tokens). The first patch is the one whose
    nearest neighbour is farthest; then always the one whose nearest chosen patch is farthest. `num` steps in a row,
    each for the whole batch at once. Where looking for NaN would wait for the device it counts as 0: a distance that
    is no number would win every comparison, and its patch be chosen again and again.
    """
    batch, num_patches, _ = features.patches.shape
    check_num_anchors(num, num_patches)
    refuse_nan(features.patches, "features.patches")
    patches = F.normalize(features.patches.detach().float().nan_to_num(), dim=-1)
    self_pairs = torch.eye(num_patches, dtype=torch.bool, device=patches.device)
    with without_autocast(patches.device):
        distance = 1 - patches @ patches.mT  # (B, N, N)
    nearest = distance.masked_fill(self_pairs, torch.inf).amin(dim=-1)  # (B, N)
    best = nearest.argmax(dim=-1, keepdim=True)  # (B, 1)
    chosen, distance = [best], distance.masked_fill(self_pairs, -torch.inf)  # -inf: never chosen again
    nearest = torch.full_like(nearest, torch.inf)
    for _ in range(num - 1):
        # (B, N) distances to the patch that was chosen last
        row = distance.gather(1, best.unsqueeze(-1).expand(batch, 1, num_patches)).squeeze(1)
        nearest = nearest.minimum(row)
        best = nearest.argmax(dim=-1, keepdim=True)
        chosen.append(best)
    return torch.cat(chosen, dim=-1).sort(dim=-1).values


SPACING = 0.35  # of sqrt(N / K): of 0.2 to 0.6 it and 0.4 cover most of drawn scenes (results/anchors/coverage.md)


def spaced_points(
    scores: Float[Tensor, "B H N"], grid: tuple[int, int], num: int, spacing: float = SPACING
) -> Int[Tensor, "B K"]:
    """The best patches one by one, each of which takes score from its surroundings (soft non-maximum suppression).

    s is the heads' mean, in float32. s_n <- s_n (1 - exp(-|p_n - p_best|^2 / (2 sigma^2))), p in patches, sigma =
    spacing sqrt(N / K): that share of the side of the square that a choice has for itself where K of them divide the
    image evenly. K steps in a row, each for the whole batch, so torch.compile makes a graph for every K.
    """
    check_num_anchors(num, scores.shape[-1])
    refuse_nan(scores, "cls_attention")
    (h, w), order = grid, torch.arange(scores.shape[-1], device=scores.device)  # (N,)
    y, x = (order // w).float(), (order % w).float()
    apart = (y.unsqueeze(1) - y).square() + (x.unsqueeze(1) - x).square()  # (N, N)
    damping = -torch.expm1(-apart / (2 * spacing**2 * h * w / num))  # (N, N), above 0 but for a patch and itself
    left, chosen = scores.float().mean(dim=1).nan_to_num(), []  # (B, N); NaN would win every comparison
    for _ in range(num):
        best = left.argmax(dim=-1, keepdim=True)  # (B, 1)
        chosen.append(best)
        left = (left * damping[best.squeeze(-1)]).scatter(-1, best, -torch.inf)  # times what is above 0 it stays so
    return torch.cat(chosen, dim=-1).sort(dim=-1).values


def spaced(features: VisionFeatures, num: int) -> Int[Tensor, "B K"]:
    """`spaced_points` of the [CLS] attention."""
    return spaced_points(cls_attention(features), features.grid, num)


def sample_spaced(features: VisionFeatures, num: int) -> Int[Tensor, "B K"]:
    """The same of scores that were divided by noise, as `by_score` has it."""
    known = cls_attention(features).float().mean(dim=1, keepdim=True)
    return spaced_points(known / torch.empty_like(known).exponential_(), features.grid, num)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Where products of matrices keep their dtype: autocast would round them, and so change what is chosen."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


SELECTORS = Registry[Selector](
    "selector",
    "acformer.selectors",
    {
        "anchors": by_score(cls_attention),
        "cls_topk": by_score(mean_cls_attention),
        "diverse": Selector("Patches as unlike each other as a greedy search finds them (DivPrune).", farthest_points),
        "grid": Selector("Points spread evenly over the grid, the same for every image.", spread_points),
        "norm": by_score(norms),
        "random": Selector(
            "Random patches, drawn anew while training; in evaluation the image is the seed.",
            by_score(image_noise).select,
            by_score(uniform).sample,
            samples_in_training=True,
        ),
        "spaced": Selector(
            "The [CLS] attention's mean, damped around every choice (soft non-maximum suppression).",
            spaced,
            sample_spaced,
        ),
    },
    # VisionZip (Yang et al. 2025) chooses as `cls_topk` does. What it adds, tokens that are means of the other patches
    # (10 of 64, 20 of 128, 30 of 192 for LLaVA-1.5), is made by `SelectedQueries`, whose option this sets.
    aliases={"dominant_contextual": Alias("cls_topk", {"contextual": 5 / 32})},
)
