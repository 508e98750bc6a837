"""A `Reading` as a figure: the picture, its anchors, where the answer looked, and that layer by layer."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from acformer.lab.figures.panels import draw_boxes, draw_map, draw_picture, draw_rings, panel_ratio, small
from acformer.lab.figures.reading import Reading
from acformer.lab.figures.sheet import GAP, LINE, MARGIN, Draw, Drawing, Words, compose, rows, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 10.0  # inches
FEWEST, MOST = 6, 12  # layers a row


def draw_reading(reading: Reading) -> Drawing:
    """Four large panels (the last: all visual tokens read alike), below them a small one a middle layer.

    Maps show the square root of a share; anchors are boxed in the picture and circled in the maps.
    """
    grid, picture = reading.anchors.grid, small(reading.picture)
    indices, size, ratio = reading.anchors.indices, picture.size, panel_ratio(picture.size)

    def outlined(axes: "Axes") -> None:
        draw_picture(axes, picture)
        draw_boxes(axes, indices, grid, size)

    def heat(axes: "Axes", shares: Tensor, ringed: Sequence[int] = indices) -> None:
        draw_map(axes, shares.sqrt().unflatten(0, grid), size)
        draw_rings(axes, ringed, grid, size)

    first, last = reading.layers[0], reading.layers[-1]
    large: list[tuple[str, Draw]] = [
        ("picture", lambda axes: draw_picture(axes, picture)),
        (f"{len(indices)} anchors", outlined),
        (f"read by the answer, layers {first} to {last}", partial(heat, shares=reading.read)),
        ("if all visual tokens were read alike", partial(heat, shares=reading.alike)),
    ]
    layers: list[tuple[str, Draw]] = [
        (f"layer {layer}", partial(heat, shares=shares))
        for layer, shares in zip(reading.layers, reading.maps, strict=True)
    ]
    inner = WIDTH - 2 * MARGIN
    words = [
        Words(MARGIN, MARGIN, f"{shortened(reading.question, 70)}  →  {shortened(reading.answer, 60)}", bold=True),
        Words(MARGIN, MARGIN + LINE, _figures(reading)),
    ]
    panels = rows(large, MARGIN, MARGIN + 2 * LINE, inner, len(large), ratio)
    panels += rows(layers, MARGIN, panels[-1].bottom + 2 * GAP, inner, min(max(len(layers), FEWEST), MOST), ratio)
    return compose(WIDTH, panels, words)


def _figures(reading: Reading) -> str:
    overlap = {name: f"{100 * value:.1f} %" for name, value in reading.overlap().items()}
    return (
        f"{overlap['on_anchors']} of what is read lies on the anchors (read alike: {overlap['alike']}, "
        f"chance: {overlap['chance']}); {overlap['most_read']} of the most-read patches are anchors; "
        f"{reading.num_tokens} visual tokens"
    )
