"""Patches outlined on the image that they were cut from.

Patches are counted on the square that the encoder is fed. LLaVA's image processor pads the image to that
square (`pad_to_square=True`: patches are mapped back, the padding is cut off); others squash the image.
"""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from acformer.errors import UsageError
from acformer.images import ImageSource, load_image

MIN_SIDE = 640  # pixels of the longer side, at least: a patch of 24 x 24 is then 26 wide

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
BRIGHT: Colour = (255, 214, 0)
DARK: Colour = (0, 0, 0)


def draw_anchors(
    image: ImageSource, indices: Sequence[int], grid: tuple[int, int], *, pad_to_square: bool = False
) -> Image.Image:
    """A copy of the image, enlarged if small, with the patches outlined: bright on a dark rim.

    Args:
        image: whatever `load_image` reads.
        indices: patches, 0..h*w-1.
        grid: (h, w) patches.
        pad_to_square: the encoder sees the image padded to a square, not squashed into one.

    Raises:
        UsageError: an index outside the grid.
    """
    outside = [index for index in indices if not 0 <= index < grid[0] * grid[1]]
    if outside:
        raise UsageError(f"patch {outside[0]} is outside the grid of {grid[0]} x {grid[1]}")
    drawn = _enlarge(load_image(image))
    boxes = [patch_box(index, grid, drawn.size, pad_to_square) for index in indices]
    line = max(2, round(max(drawn.size) / 320))
    draw = ImageDraw.Draw(drawn)
    # Every rim first: the outline of one patch is never hidden by the rim of its neighbour.
    for box in boxes:
        _outline(draw, box, 0, DARK, 2 * line)
    for box in boxes:
        _outline(draw, box, line // 2, BRIGHT, line)
    return drawn


def _enlarge(image: Image.Image) -> Image.Image:
    scale = MIN_SIDE / max(image.size)
    if scale <= 1:
        return image.copy()
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def padded_square(size: tuple[int, int], pad_to_square: bool) -> Box:
    """(left, top, right, bottom) of what the patch grid covers, in the image's own pixels."""
    width, height = size
    if not pad_to_square:
        return 0, 0, width, height
    side = max(size)
    left, top = -((side - width) // 2), -((side - height) // 2)
    return left, top, left + side, top + side


def patch_box(index: int, grid: tuple[int, int], size: tuple[int, int], pad_to_square: bool) -> Box:
    """The patch in the image's pixels, clipped to the image: empty (right <= left) in the padding."""
    left, top, right, bottom = padded_square(size, pad_to_square)
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
