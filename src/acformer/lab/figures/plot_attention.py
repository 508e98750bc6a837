"""An `AnswerAttention` as a figure: the image, its anchors, where the answer looked, and that layer by layer."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from acformer.lab.figures.answer_attention import AnswerAttention
from acformer.lab.figures.panels import draw_boxes, draw_image, draw_map, draw_rings, panel_ratio, small
from acformer.lab.figures.sheet import GAP, MARGIN, Block, Draw, compose, shortened
from acformer.viz.drawing import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 10.0  # inches
FEWEST, MOST = 6, 12  # layers a row


def plot_attention(found: AnswerAttention) -> Drawing:
    """Four large panels (the last: all visual tokens read alike), below them a small one a middle layer.

    Maps show the square root of a share; anchors are boxed in the image and circled in the maps.
    """
    grid, image = found.anchors.grid, small(found.image)
    indices, size, ratio = found.anchors.indices, image.size, panel_ratio(image.size)

    def outlined(axes: "Axes") -> None:
        draw_image(axes, image)
        draw_boxes(axes, indices, grid, size)

    def heat(axes: "Axes", shares: Tensor, ringed: Sequence[int] = indices) -> None:
        draw_map(axes, shares.sqrt().unflatten(0, grid), size)  # (N,) -> (h, w)
        draw_rings(axes, ringed, grid, size)

    large: list[tuple[str, Draw]] = [
        ("image", lambda axes: draw_image(axes, image)),
        (f"{len(indices)} anchors", outlined),
        (f"read by the answer, layers {found.layers[0]} to {found.layers[-1]}", partial(heat, shares=found.mean_map)),
        ("if all visual tokens were read alike", partial(heat, shares=found.uniform)),
    ]
    layers: list[tuple[str, Draw]] = [
        (f"layer {layer}", partial(heat, shares=shares)) for layer, shares in zip(found.layers, found.maps, strict=True)
    ]
    inner = WIDTH - 2 * MARGIN
    title = f"{shortened(found.question, 70)}  →  {shortened(found.answer, 60)}"
    above = Block(large, MARGIN, MARGIN, inner, len(large), ratio, title, _shares(found))
    columns = min(max(len(layers), FEWEST), MOST)
    return compose(WIDTH, [above, Block(layers, MARGIN, above.bottom + 2 * GAP, inner, columns, ratio)])


def _shares(found: AnswerAttention) -> str:
    overlap = {name: f"{100 * value:.1f} %" for name, value in found.overlap().items()}
    return (
        f"{overlap['on_anchors']} of what is read lies on the anchors (read alike: {overlap['alike']}, "
        f"chance: {overlap['chance']}); {overlap['most_read']} of the most-read patches are anchors; "
        f"{found.num_tokens} visual tokens"
    )
