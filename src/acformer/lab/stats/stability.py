"""Do anchors stay on the same things when the image changes a little? And how far apart are they?

An image is viewed again cropped, mirrored, darkened and compressed; where a patch of the view came from is known, so
its anchors are mapped back to the patches of the image. Two levels stand beside: random patches mapped the same way,
and the anchors of another image, which agree wherever anchors depend on the place alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import torch
from jaxtyping import Int
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

Grid = tuple[int, int]
DRAWS = 8  # random sets an image: their mean over hundreds of images has no visible error
EXACT = "donot_use_mm_for_euclid_dist"


@dataclass(frozen=True)
class View:
    """A change to a square image, and where its places come from.

    change: image -> view. margin: share of the side that the view leaves out at each of the four edges, after which
    it is enlarged again. mirrored: left and right are exchanged.
    """

    change: Callable[[Image.Image], Image.Image]
    margin: float = 0.0
    mirrored: bool = False

    def origin(self, patches: Int[Tensor, "K"], grid: Grid) -> Int[Tensor, "K"]:
        """The patches of the image that hold the centres of these patches of the view."""
        y, x = _centres(patches, grid)
        x = 1 - x if self.mirrored else x
        y, x = (self.margin + share * (1 - 2 * self.margin) for share in (y, x))
        return (y * grid[0]).long() * grid[1] + (x * grid[1]).long()

    def visible(self, patches: Int[Tensor, "K"], grid: Grid) -> Int[Tensor, "K"]:
        """Those patches of the image whose centres the view shows."""
        y, x = _centres(patches, grid)
        inside = [(self.margin <= share) & (share <= 1 - self.margin) for share in (y, x)]
        return patches[inside[0] & inside[1]]


def _crop(image: Image.Image) -> Image.Image:
    edge = image.width / 12
    box = (edge, edge, image.width - edge, image.height - edge)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def _darken(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(0.7)


def _compress(image: Image.Image) -> Image.Image:
    data = BytesIO()
    image.save(data, "JPEG", quality=50)
    return Image.open(data).convert("RGB")


VIEWS = {
    "crop": View(_crop, margin=1 / 12),  # 20 of 24 patches a side remain
    "flip": View(ImageOps.mirror, mirrored=True),
    "brightness": View(_darken),
    "jpeg": View(_compress),
}


def set_agreement(first: Int[Tensor, "K"], second: Int[Tensor, "L"], grid: Grid) -> dict[str, float]:
    """How far two sets of patches are the same; all NaN if the first is empty.

    jaccard: |A ∩ B| / |A ∪ B|. kept_0: share of A that is in B. kept_1: share of A with a patch of B at most one row
    and one column away.
    """
    if not len(first):
        return dict.fromkeys(("jaccard", "kept_0", "kept_1"), float("nan"))
    here, there = set(first.tolist()), set(second.tolist())
    rows, columns = (abs(_of(first, grid, axis)[:, None] - _of(second, grid, axis)) for axis in (0, 1))
    near = (torch.maximum(rows, columns) <= 1).any(dim=1)
    return {
        "jaccard": len(here & there) / len(here | there),
        "kept_0": len(here & there) / len(here),
        "kept_1": near.float().mean().item(),
    }


def stability(
    anchors: Int[Tensor, "K"], viewed: dict[str, Int[Tensor, "K"]], chance: Int[Tensor, "R K"], grid: Grid
) -> dict[str, float]:
    """`set_agreement` of the anchors of an image that a view still shows with those of the view, mapped back.

    viewed: the view's own anchors by its name in `VIEWS`. chance: random sets of patches; the mean over what they
    give in place of a view's anchors is beside each measure as `..._chance`.
    """
    row = {}
    for name, found in viewed.items():
        view = VIEWS[name]
        seen = view.visible(anchors, grid)
        for measure, value in set_agreement(seen, view.origin(found, grid), grid).items():
            row[f"{name}_{measure}"] = value
        by_chance = [set_agreement(seen, view.origin(drawn, grid), grid) for drawn in chance]
        for measure in by_chance[0]:
            row[f"{name}_{measure}_chance"] = sum(level[measure] for level in by_chance) / len(by_chance)
    return row


def neighbour_distance(patches: Int[Tensor, "K"], grid: Grid) -> float:
    """Mean distance, in patches, from each of these patches to the nearest other one; NaN for a single one."""
    places = torch.stack([_of(patches, grid, 0), _of(patches, grid, 1)], dim=1).float()
    distances = torch.cdist(places, places, compute_mode=EXACT).fill_diagonal_(torch.inf)
    return distances.amin(dim=1).mean().item() if len(patches) > 1 else float("nan")


def _of(patches: Tensor, grid: Grid, axis: int) -> Tensor:
    return patches % grid[1] if axis else patches // grid[1]


def _centres(patches: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(y, x) of their centres as shares of the square's sides."""
    return (_of(patches, grid, 0) + 0.5) / grid[0], (_of(patches, grid, 1) + 0.5) / grid[1]
