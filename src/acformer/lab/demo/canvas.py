"""The image with its anchors, as one SVG that scales to any width; `canvas.js` turns clicks and keys into patches.

Outlines are vectors over the image, not pixels in it as `viz.draw_anchors` makes them: sharp on a phone, and their
colours can follow the page.
"""

import base64
from collections.abc import Iterable, Sequence
from enum import StrEnum
from html import escape
from io import BytesIO

import matplotlib
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from acformer.lab.demo.encoded_image import EncodedImage
from acformer.lab.demo.pins import Pins
from acformer.lab.figures.panels import within_image
from acformer.lab.figures.pca import pca_colours
from acformer.viz.overlay import padded_square


class View(StrEnum):
    """What is drawn over the image; the values are the page's words."""

    ANCHORS = "Anchors"
    HEAD = "One head"
    PCA = "Features as colours"


def draw(
    encoded: EncodedImage, chosen: Sequence[Sequence[int]], pins: Pins, view: View = View.ANCHORS, head: int = 1
) -> str:
    """The image under its view, anchors outlined, pins marked, as SVG.

    Args:
        encoded: the image and its features.
        chosen: anchors, head by head (`anchors_by_head`).
        pins: pinned patches get a dot, removed ones a cross.
        view: ANCHORS darkens all patches but the anchors; HEAD lays the square root of a head's [CLS] attention over
            a grey image and outlines what that head chose strongly; PCA paints patches by their features.
        head: 1..H, of the HEAD view.
    """
    size, grid = encoded.image.size, encoded.features.grid
    cells = _Cells(grid, padded_square(size, encoded.pad_to_square))
    anchors = sorted(patch for patches in chosen for patch in patches)
    strong = list(chosen[head - 1]) if view is View.HEAD else anchors
    outlines = _outlines(cells, "weak", set(anchors) - set(strong)) + _outlines(cells, "anchor", strong)
    marks = "".join(_dot(cells, patch) for patch in sorted(pins.pinned))
    marks += "".join(_cross(cells, patch) for patch in sorted(pins.removed))
    what = f"Image of {grid[0]} by {grid[1]} patches, {len(anchors)} of them anchors. Arrow keys move, Enter pins."
    left, top, right, bottom = cells.square
    return (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" tabindex="0" role="application" aria-label="{what}" '
        f'style="--ratio: {size[0] / size[1]:.4f}" '
        f'data-grid="{grid[0]} {grid[1]}" data-square="{left} {top} {right - left} {bottom - top}" '
        f'data-heads="{_heads(chosen, encoded.num_patches)}" data-pins="{escape(_states(pins, encoded.num_patches))}">'
        f"{_ground(encoded, size, cells, view, head)}{_shade(size, cells, anchors) if view is View.ANCHORS else ''}"
        f'{outlines}{marks}<rect class="cursor" width="{cells.wide:.2f}" height="{cells.high:.2f}"/></svg>'
    )


class _Cells:
    """Where patches lie on the image."""

    def __init__(self, grid: tuple[int, int], square: tuple[float, float, float, float]):
        self.columns, self.square = grid[1], square
        self.wide, self.high = (square[2] - square[0]) / grid[1], (square[3] - square[1]) / grid[0]

    def corner(self, patch: int) -> tuple[float, float]:
        """Left and top."""
        row, column = divmod(patch, self.columns)
        return self.square[0] + column * self.wide, self.square[1] + row * self.high

    def paths(self, patches: Iterable[int]) -> str:
        """Rectangles in SVG's path language."""
        corners = map(self.corner, patches)
        return "".join(f"M{x:.2f} {y:.2f}h{self.wide:.2f}v{self.high:.2f}h{-self.wide:.2f}z" for x, y in corners)


def _ground(encoded: EncodedImage, size: tuple[int, int], cells: _Cells, view: View, head: int) -> str:
    href, kind = _uri(encoded.image, "JPEG"), view.name.lower()
    found = f'<image href="{href}" width="{size[0]}" height="{size[1]}" class="{kind}"/>'
    if view is View.ANCHORS:
        return found
    colours = _heat(encoded, head) if view is View.HEAD else _features(encoded)
    left, top, right, bottom = cells.square
    return (
        f'{found}<image href="{_uri(Image.fromarray(colours), "PNG")}" x="{left}" y="{top}" width="{right - left}" '
        f'height="{bottom - top}" preserveAspectRatio="none" class="map"/>'
    )


def _uri(image: Image.Image, kind: str) -> str:
    buffer = BytesIO()
    image.save(buffer, kind, quality=92, subsampling=0)  # PNG knows neither and ignores them
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _heat(encoded: EncodedImage, head: int) -> UInt8[np.ndarray, "h w 3"]:
    """The square root, or the few strongest patches would leave all others black."""
    assert encoded.features.cls_attention is not None  # `ImageEncoder` refuses encoders without
    scores = encoded.features.cls_attention[0, head - 1].float().cpu().sqrt().reshape(encoded.features.grid)
    return matplotlib.colormaps["inferno"](scores.numpy() / max(float(scores.max()), 1e-30), bytes=True)[..., :3]


def _features(encoded: EncodedImage) -> UInt8[np.ndarray, "h w 3"]:
    seen = within_image(encoded.image.size, encoded.features.grid, encoded.pad_to_square)
    return pca_colours(encoded.features.patches, seen)[0].reshape(*encoded.features.grid, 3).numpy()


def _shade(size: tuple[int, int], cells: _Cells, anchors: Iterable[int]) -> str:
    """All but the anchors, darkened: rectangles cut out of the image's own."""
    return f'<path class="shade" fill-rule="evenodd" d="M0 0h{size[0]}v{size[1]}h{-size[0]}z{cells.paths(anchors)}"/>'


def _outlines(cells: _Cells, kind: str, patches: Iterable[int]) -> str:
    """Every rim first: the outline of one patch is never hidden by the rim of its neighbour."""
    path = cells.paths(sorted(patches))
    return f'<path class="rim" d="{path}"/><path class="{kind}" d="{path}"/>' if path else ""


def _dot(cells: _Cells, patch: int) -> str:
    x, y = cells.corner(patch)
    radius = min(cells.wide, cells.high) * 0.24
    middle = f'cx="{x + cells.wide / 2:.2f}" cy="{y + cells.high / 2:.2f}" r="{radius:.2f}"'
    return f'<path class="pinned" d="{cells.paths([patch])}"/><circle class="pinned" {middle}/>'


def _cross(cells: _Cells, patch: int) -> str:
    x, y = cells.corner(patch)
    arms = f"m0 0l{cells.wide:.2f} {cells.high:.2f}m0 {-cells.high:.2f}l{-cells.wide:.2f} {cells.high:.2f}"
    path = f"{cells.paths([patch])}M{x:.2f} {y:.2f}{arms}"
    return f'<path class="removed rim" d="{path}"/><path class="removed" d="{path}"/>'


def _heads(chosen: Sequence[Sequence[int]], num_patches: int) -> str:
    """For every patch the head that chose it, from 1; 0: none did."""
    heads = [0] * num_patches
    for head, patches in enumerate(chosen, start=1):
        for patch in patches:
            heads[patch] = head
    return " ".join(map(str, heads))


def _states(pins: Pins, num_patches: int) -> str:
    """For every patch a letter: p(inned), r(emoved) or - (free)."""
    return "".join(
        "p" if patch in pins.pinned else "r" if patch in pins.removed else "-" for patch in range(num_patches)
    )
