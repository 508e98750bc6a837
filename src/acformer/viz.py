"""Pictures of what the anchor search sees: the patches it keeps, and the [CLS] attention that it goes by.

Patches are counted on the square that the encoder is fed. LLaVA's image processor pads the picture to that
square (`pad_to_square=True`: patches are mapped back, the padding is cut off); others squash the picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor, nn

from acformer.anchors import select_anchors
from acformer.build import square_image_processor
from acformer.embedded import resolve
from acformer.errors import UsageError
from acformer.images import ImageSource, load_image
from acformer.vision import VisionEncoder, VisionFeatures, load_vision_encoder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIN_SIDE = 640  # pixels of the longer side, at least: a patch of 24 x 24 is then 26 wide

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
BRIGHT: Colour = (255, 214, 0)
DARK: Colour = (0, 0, 0)


@dataclass(frozen=True, eq=False)
class Anchors:
    """The anchors of one picture.

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
        return self.scores.mean(dim=0).reshape(self.grid)


def find_anchors(
    image: Image.Image, encoder: Callable[[Tensor], VisionFeatures], image_processor: Any, num_anchors: int = 64
) -> Anchors:
    """The anchors of a picture, by the progressive search over the encoder's [CLS] attention (Sec. 3.3).

    Args:
        image: RGB, as `load_image` gives it.
        encoder: from `load_vision_encoder`, or a model's `get_vision_features` (with the model on the CPU, in float32).
        image_processor: what makes its pixels, such as `square_image_processor(...)` or a model's own.
        num_anchors: how many patches to keep.

    Raises:
        UsageError: the encoder gives no [CLS] attention, or has fewer patches than that.
    """
    pixels = image_processor(image, return_tensors="pt")["pixel_values"]
    if isinstance(encoder, nn.Module):
        weight = next(encoder.parameters())
        pixels = pixels.to(weight.device, weight.dtype)
    with torch.inference_mode():
        features = encoder(pixels)
    scores = features.cls_attention
    if scores is None:
        raise UsageError("this encoder gives no [CLS] attention, so it has no anchors")
    if not 1 <= num_anchors <= scores.shape[-1]:
        raise UsageError(f"num_anchors={num_anchors} is outside 1..{scores.shape[-1]}, the number of patches")
    indices = select_anchors(scores, num_anchors)[0]
    return Anchors(tuple(indices.tolist()), features.grid, scores[0].cpu())


def draw_anchors(
    image: Image.Image, indices: Sequence[int], grid: tuple[int, int], *, pad_to_square: bool = False
) -> Image.Image:
    """A copy of the picture, enlarged if small, with the patches outlined: bright on a dark rim.

    Args:
        image: RGB, as `load_image` gives it.
        indices: patches, 0..h*w-1.
        grid: (h, w) patches.
        pad_to_square: the encoder sees the picture padded to a square, not squashed into one.

    Raises:
        UsageError: an index outside the grid.
    """
    outside = [index for index in indices if not 0 <= index < grid[0] * grid[1]]
    if outside:
        raise UsageError(f"patch {outside[0]} is outside the grid of {grid[0]} x {grid[1]}")
    drawn = _enlarge(image.convert("RGB"))
    boxes = [_patch_box(index, grid, drawn.size, pad_to_square) for index in indices]
    line = max(2, round(max(drawn.size) / 320))
    draw = ImageDraw.Draw(drawn)
    # Every rim first: the outline of one patch is never hidden by the rim of its neighbour.
    for box in boxes:
        _outline(draw, box, 0, DARK, 2 * line)
    for box in boxes:
        _outline(draw, box, line // 2, BRIGHT, line)
    return drawn


def show_anchors(
    image: Image.Image | ImageSource,
    encoder: VisionEncoder | str = "embedded:dinov2-s14",
    num_anchors: int = 64,
    *,
    image_size: int = 336,
) -> "Figure":
    """The picture, its anchors outlined, and the mean [CLS] attention, side by side.

    Args:
        image: a picture, or whatever `load_image` reads.
        encoder: a hub name, a folder, `embedded:dinov2-s14`, or one that `load_vision_encoder` made.
        num_anchors: how many patches to keep.
        image_size: pixels a side that the encoder is fed; the picture is padded to a square, as LLaVA does.

    Raises:
        ImageError: the picture cannot be read. CheckpointError: no such encoder. UsageError: see `find_anchors`.
    """
    from matplotlib.figure import Figure

    picture = image.convert("RGB") if isinstance(image, Image.Image) else load_image(image)
    name = encoder if isinstance(encoder, str) else encoder.tower.name_or_path
    image_processor = square_image_processor(resolve(name), image_size)
    loaded = load_vision_encoder(encoder) if isinstance(encoder, str) else encoder
    anchors = find_anchors(picture, loaded, image_processor, num_anchors)

    height = min(max(3.6 * picture.height / picture.width, 2.0), 6.0)
    figure = Figure(figsize=(11, height + 0.35), layout="constrained")
    original, outlined, attention = figure.subplots(1, 3)
    _panel(original, "picture").imshow(picture)
    drawn = draw_anchors(picture, anchors.indices, anchors.grid, pad_to_square=True)
    h, w = anchors.grid
    _panel(outlined, f"{len(anchors.indices)} anchors of {h * w} patches").imshow(drawn)
    _draw_heat(_panel(attention, "[CLS] attention (√ of the heads' mean)"), picture, anchors.heat)
    return figure


def _panel(axes: "Axes", title: str) -> "Axes":
    axes.set_title(title, fontsize=11)
    axes.set_axis_off()
    return axes


def _draw_heat(axes: "Axes", picture: Image.Image, heat: Tensor) -> None:
    """The heat map over the picture in grey, cut off where the padding begins."""
    axes.imshow(picture.convert("L"), cmap="gray", vmin=0, vmax=255)
    left, top, right, bottom = _square(picture.size, pad_to_square=True)
    extent = (left - 0.5, right - 0.5, bottom - 0.5, top - 0.5)
    # The square root, or the few strongest patches would leave all others black.
    values = heat.float().sqrt().numpy()
    axes.imshow(values, cmap="inferno", extent=extent, alpha=0.8, interpolation="nearest")
    axes.set_xlim(-0.5, picture.width - 0.5)
    axes.set_ylim(picture.height - 0.5, -0.5)


def _enlarge(image: Image.Image) -> Image.Image:
    scale = MIN_SIDE / max(image.size)
    if scale <= 1:
        return image.copy()
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _square(size: tuple[int, int], pad_to_square: bool) -> Box:
    """(left, top, right, bottom) of what the patch grid covers, in the picture's own pixels."""
    width, height = size
    if not pad_to_square:
        return 0, 0, width, height
    side = max(size)
    left, top = -((side - width) // 2), -((side - height) // 2)
    return left, top, left + side, top + side


def _patch_box(index: int, grid: tuple[int, int], size: tuple[int, int], pad_to_square: bool) -> Box:
    """The patch in the picture's pixels, clipped to the picture: empty (right <= left) in the padding."""
    left, top, right, bottom = _square(size, pad_to_square)
    row, column = divmod(index, grid[1])
    high, wide = (bottom - top) / grid[0], (right - left) / grid[1]
    return (
        max(left + column * wide, 0),
        max(top + row * high, 0),
        min(left + (column + 1) * wide, size[0]),
        min(top + (row + 1) * high, size[1]),
    )


def _outline(draw: ImageDraw.ImageDraw, box: Box, inset: int, colour: Colour, width: int) -> None:
    """The border of a box, inside it; nothing for a box that is empty after the inset."""
    left, top, right, bottom = (round(value) for value in box)
    left, top, right, bottom = left + inset, top + inset, right - 1 - inset, bottom - 1 - inset
    if left <= right and top <= bottom:
        draw.rectangle((left, top, right, bottom), outline=colour, width=width)
