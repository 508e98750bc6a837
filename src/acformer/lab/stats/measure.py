"""One image in, one row of numbers out: all that is measured of its anchors.

Anchors are those of the progressive search (Sec. 3.3) on the image padded to a square, as the model is given it.
Beside the overlap (`acformer.lab.stats.overlap`) and the stability (`acformer.lab.stats.stability`):

mass_patches: share of the heads' mean attention that lies on patches, the rest being on the prefix tokens.
mass_anchors, mass_best: share of the heads' mean attention to patches that lies on the anchors, and on as many patches
    of greatest mean attention, which is the most it could be. By chance: the anchors' share of the area.
heads_M: patches that exactly M of H heads have among their best k = floor(num_anchors / H), M = 1..H: what a head
    would take if it went first. By chance, heads choosing independently: N Binomial(H, k / N)(M).
heads_shared: of the patches that any head has there, the share that more than one has.
outliers, outlier_anchors, anchor_outliers: share of all patches whose norm exceeds the median by more than 4 robust
    deviations (1.4826 times the median absolute deviation); share of the anchors that are such; share of such patches
    that are anchors. Large encoders without registers keep global facts in patches of high norm and attend to them
    (Darcet et al., ICLR 2024): anchors could be these artefacts.
max_norm: the greatest norm over the median norm.
distance: mean distance from an anchor to the nearest other one, in patches; by chance, of random patches.
"""

import zlib
from math import comb, nan
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from acformer.anchors.search import select_anchors
from acformer.anchors.selectors import cls_attention, spread_points
from acformer.lab.stats.overlap import ACTIVATIONS, MAIN, SALIENCES, SHARES, overlap_name, overlaps
from acformer.lab.stats.rows import ImageStats
from acformer.lab.stats.stability import DRAWS, VIEWS, Grid, neighbour_distance, stability
from acformer.vision.encoder import VisionEncoder
from acformer.vision.features import VisionFeatures

OUTLIER = 4.0


def encode_views(image: Image.Image, encoder: VisionEncoder, image_processor: Any, image_size: int) -> VisionFeatures:
    """Features (on the CPU, float32) of the image padded to a square, then of each of `VIEWS` of that square."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in image_processor.image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    square = square.resize((image_size, image_size), Image.Resampling.BICUBIC)
    images = [square, *(view.change(square) for view in VIEWS.values())]
    pixels = image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        features = encoder(pixels)
    kept = {name: value.float().cpu() for name, value in features.arrays.items()}
    return features._replace(**kept)


def measure(features: VisionFeatures, num_anchors: int, name: str) -> ImageStats:
    """The row of an image whose features, with those of its views, are a batch from `encode_views`.

    name: of the image; random sets are drawn from it. The row begins with the anchors, as indices with blanks
    between; the rest are numbers, a measure that is not defined for an image being NaN.

    Raises:
        UsageError: no [CLS] attention, or fewer patches than anchors.
    """
    attention, patches, grid = cls_attention(features), features.patches[0], features.grid
    anchors, *viewed = select_anchors(attention, num_anchors)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.rand(DRAWS, 1, len(patches), generator=generator)
    chance = select_anchors(noise, num_anchors)
    row: ImageStats = {"anchors": " ".join(map(str, anchors.tolist()))}
    row |= overlaps(patches, attention[0])
    row |= _mass(attention[0], anchors) | _heads(attention[0], num_anchors) | _outliers(patches, anchors)
    row["distance"] = neighbour_distance(anchors, grid)
    row["distance_chance"] = sum(neighbour_distance(drawn, grid) for drawn in chance) / DRAWS
    return row | stability(anchors, dict(zip(VIEWS, viewed, strict=True)), chance, grid)


def chance_levels(num_heads: int, num_anchors: int, grid: Grid) -> dict[str, float]:
    """What each measure would be by chance, where that is known without drawing."""
    num_patches = grid[0] * grid[1]
    picked = max(1, num_anchors // num_heads) / num_patches
    shared = [num_patches * _binomial(num_heads, picked, heads) for heads in range(num_heads + 1)]
    levels = {f"heads_{heads}": patches for heads, patches in enumerate(shared) if heads}
    levels["heads_shared"] = sum(shared[2:]) / sum(shared[1:])
    levels["mass_anchors"] = levels["anchor_outliers"] = num_anchors / num_patches
    pairs = {(feature, row): [(q, q) for q in SHARES] for feature in ACTIVATIONS for row in SALIENCES}
    pairs[MAIN] = [(ours, theirs) for ours in SHARES for theirs in SHARES]
    for pair, shares in pairs.items():
        for ours, theirs in shares:
            levels[overlap_name(*pair, ours, theirs)] = max(1, round(theirs * num_patches)) / num_patches
    return levels


def grid_distance(num_anchors: int, grid: Grid) -> float:
    """`distance` of as many points spread evenly."""
    nothing = VisionFeatures(torch.empty(1, grid[0] * grid[1], 1), None, grid, 0)
    return neighbour_distance(spread_points(nothing, num_anchors)[0], grid)


def _binomial(trials: int, probability: float, successes: int) -> float:
    return comb(trials, successes) * probability**successes * (1 - probability) ** (trials - successes)


def _mass(attention: Float[Tensor, "H N"], anchors: Int[Tensor, "K"]) -> ImageStats:
    mean = attention.mean(dim=0)
    share = mean / mean.sum()
    return {
        "mass_anchors": share[anchors].sum().item(),
        "mass_best": share.topk(len(anchors)).values.sum().item(),
        "mass_patches": mean.sum().item(),
    }


def _heads(attention: Float[Tensor, "H N"], num_anchors: int) -> ImageStats:
    num_heads = len(attention)
    best = select_anchors(attention[:, None], max(1, num_anchors // num_heads))
    votes = torch.zeros(attention.shape).scatter_(1, best, 1.0).sum(dim=0)
    counts = votes.long().bincount(minlength=num_heads + 1).tolist()
    by_number = {f"heads_{heads}": float(patches) for heads, patches in enumerate(counts) if heads}
    return {**by_number, "heads_shared": sum(counts[2:]) / sum(counts[1:])}


def _outliers(patches: Float[Tensor, "N D"], anchors: Int[Tensor, "K"]) -> ImageStats:
    norms = patches.norm(dim=-1)
    median = norms.median()
    deviation = 1.4826 * (norms - median).abs().median()
    outlying = norms > median + OUTLIER * deviation
    found = int(outlying.sum())
    return {
        "outliers": found / len(norms),
        "outlier_anchors": outlying[anchors].float().mean().item(),
        "anchor_outliers": int(outlying[anchors].sum()) / found if found else nan,
        "max_norm": (norms.max() / median).item(),
    }
