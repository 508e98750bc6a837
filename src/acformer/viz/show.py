"""One image and its anchors, for a notebook: `show_anchors`."""

from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from acformer.hf.build import square_image_processor
from acformer.images import ImageSource, load_image
from acformer.vision.encoder import VisionEncoder, load_vision_encoder
from acformer.vision.families import require_whole_patches
from acformer.viz.find import find_anchors
from acformer.viz.overlay import draw_anchors, padded_square

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def show_anchors(
    image: ImageSource,
    encoder: VisionEncoder | str = "embedded:dinov2-s14",
    num_anchors: int = 64,
    *,
    image_size: int = 336,
) -> "Figure":
    """The image, its anchors outlined, and the mean [CLS] attention, side by side: a matplotlib figure.

    Args:
        image: whatever `load_image` reads.
        encoder: a hub name, a folder, `embedded:dinov2-s14`, or one that `load_vision_encoder` made.
        num_anchors: how many patches to keep.
        image_size: pixels a side that the encoder is fed; the image is padded to a square, as LLaVA does.

    Raises:
        ImageError: the image cannot be read.
        CheckpointError: no such encoder.
        UsageError: see `find_anchors`.
    """
    from acformer.viz.drawing import Drawing  # matplotlib is slow to import

    opened = load_image(image)
    loaded = load_vision_encoder(encoder) if isinstance(encoder, str) else encoder
    require_whole_patches(loaded.tower.config, image_size)
    anchors = find_anchors(opened, loaded, square_image_processor(loaded.tower, image_size), num_anchors)

    height = min(max(3.6 * opened.height / opened.width, 2.0), 6.0)
    figure = Drawing(figsize=(11, height + 0.35), layout="constrained")
    original, outlined, attention = figure.subplots(1, 3)
    _panel(original, "image").imshow(opened)
    drawn = draw_anchors(opened, anchors.indices, anchors.grid, pad_to_square=True)
    h, w = anchors.grid
    _panel(outlined, f"{len(anchors.indices)} anchors of {h * w} patches").imshow(drawn)
    _draw_heat(_panel(attention, "[CLS] attention (√ of the heads' mean)"), opened, anchors.heat)
    return figure


def _panel(axes: "Axes", title: str) -> "Axes":
    axes.set_title(title, fontsize=11)
    axes.set_axis_off()
    return axes


def _draw_heat(axes: "Axes", image: Image.Image, heat: Tensor) -> None:
    """The heat map over the image in grey, cut off where the padding begins."""
    axes.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
    left, top, right, bottom = padded_square(image.size, pad_to_square=True)
    extent = (left - 0.5, right - 0.5, bottom - 0.5, top - 0.5)
    # The square root, or the few strongest patches would leave all others black.
    values = heat.float().sqrt().numpy()
    axes.imshow(values, cmap="inferno", extent=extent, alpha=0.8, interpolation="nearest")
    axes.set_xlim(-0.5, image.width - 0.5)
    axes.set_ylim(image.height - 0.5, -0.5)
