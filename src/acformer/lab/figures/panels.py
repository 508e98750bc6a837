"""What a panel shows: an image, a map over its patches, and its anchors, outlined or circled.

Maps cover the square that the encoder was fed; what lies in the padding is cut off, as everywhere in `acformer.viz`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from acformer.viz.overlay import BRIGHT, padded_square

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLATTEST, HIGHEST = 0.5, 1.6  # height over width of a panel; an image beyond stands in it with room beside
YELLOW = tuple(value / 255 for value in BRIGHT)


def small(image: Image.Image, number: int = 1) -> Image.Image:
    """The image as a figure of so many images shows it: in 480 pixels a side for one, fewer for more.

    All images of a figure together weigh about the same, or a sheet of them would be an SVG of many megabytes.
    """
    side = max(160, round(480 / number**0.5))
    image = image.convert("RGB")  # a copy
    image.thumbnail((side, side))
    return image


def panel_ratio(size: tuple[int, int]) -> float:
    """Height over width of the panels of an image of (width, height)."""
    return min(max(size[1] / size[0], FLATTEST), HIGHEST)


def within_image(size: tuple[int, int], grid: tuple[int, int], pad_to_square: bool = True) -> Bool[Tensor, "N"]:
    """(N,) patches whose centre lies in the image, and not in the padding around it."""
    left, top, right, bottom = padded_square(size, pad_to_square)
    ys = top + (torch.arange(grid[0]) + 0.5) / grid[0] * (bottom - top)
    xs = left + (torch.arange(grid[1]) + 0.5) / grid[1] * (right - left)
    rows, columns = (ys >= 0) & (ys <= size[1]), (xs >= 0) & (xs <= size[0])
    return (rows.unsqueeze(1) & columns).flatten()


def draw_image(axes: "Axes", image: Image.Image) -> None:
    """The image alone."""
    axes.imshow(image, interpolation="antialiased")
    _frame(axes, image.size)


def draw_map(axes: "Axes", values: Tensor, size: tuple[int, int]) -> None:
    """Patch by patch over the padded square, cut off where an image of that size ends.

    values: (h, w) numbers from 0 in the colours of heat, the greatest brightest; or (h, w, 3) colours.
    """
    left, top, right, bottom = padded_square(size, pad_to_square=True)
    extent = (left - 0.5, right - 0.5, bottom - 0.5, top - 0.5)
    greatest = float(values.max()) or 1.0
    axes.imshow(values.numpy(), cmap="inferno", vmin=0, vmax=greatest, extent=extent, interpolation="none")
    _frame(axes, size)


def draw_rings(axes: "Axes", indices: Sequence[int], grid: tuple[int, int], size: tuple[int, int]) -> None:
    """A white ring on a dark rim around the centre of each patch."""
    _mark(axes, "o", "white", 0.9, indices, grid, size)


def draw_boxes(axes: "Axes", indices: Sequence[int], grid: tuple[int, int], size: tuple[int, int]) -> None:
    """The outline of each patch, bright on a dark rim, as `draw_anchors` has it, in lines that scale."""
    _mark(axes, "s", YELLOW, 1.0, indices, grid, size)


def _mark(
    axes: "Axes",
    marker: str,
    colour: Any,
    share: float,
    indices: Sequence[int],
    grid: tuple[int, int],
    size: tuple[int, int],
) -> None:
    """Outlines of a share of a patch's width, every rim first; lines as wide as the patches allow, up to a point.

    They are matplotlib's markers, of which an SVG keeps one shape a panel instead of one a patch.
    """
    left, top, right, bottom = padded_square(size, pad_to_square=True)
    wide, high = (right - left) / grid[1], (bottom - top) / grid[0]
    xs = [left + (index % grid[1] + 0.5) * wide - 0.5 for index in indices]
    ys = [top + (index // grid[1] + 0.5) * high - 0.5 for index in indices]
    room = axes.get_window_extent()
    points = 72 / axes.figure.dpi * min(room.width / size[0], room.height / size[1]) * wide
    line = min(0.14 * points, 1.2)
    for edge, width in (("black", 2.2 * line), (colour, line)):
        axes.plot(
            xs, ys, ls="", marker=marker, markersize=share * points, mec=edge, mew=width, mfc="none", scalex=False,
            scaley=False,
        )  # fmt: skip


def _frame(axes: "Axes", size: tuple[int, int]) -> None:
    axes.set_xlim(-0.5, size[0] - 0.5)
    axes.set_ylim(size[1] - 0.5, -0.5)
