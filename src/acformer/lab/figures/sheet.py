"""A figure of blocks of panels that are placed in inches: images of any shape stand close, and without overlaps.

A block is a `GridSpec` of matplotlib's. Where blocks go is computed here, since its layout engines share out what room
there is, and leave gaps around panels of a fixed shape.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.font_manager import FontProperties, findfont, get_font

from acformer.viz.drawing import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAP, LABEL, LINE, MARGIN = 0.05, 0.16, 0.2, 0.08  # inches
SIZE = 7.0  # points, of a label
DPI = 160

Draw = Callable[["Axes"], None]


@dataclass(frozen=True)
class Block:
    """Panels row by row, (label, what to draw) of each, that fill a width in so many columns.

    left, top, width: inches from the left, from the top, across. ratio: height over width of a panel. Labels stand
    above their panels, `title` (bold) and `heading` above them all; what has no text takes no room.
    """

    panels: Sequence[tuple[str, Draw]]
    left: float
    top: float
    width: float
    columns: int
    ratio: float
    title: str = ""
    heading: str = ""

    @property
    def num_rows(self) -> int:
        """Of panels."""
        return math.ceil(len(self.panels) / self.columns)

    @property
    def panel_size(self) -> tuple[float, float]:
        """Width and height of a panel."""
        wide = (self.width - (self.columns - 1) * GAP) / self.columns
        return wide, wide * self.ratio

    @property
    def between(self) -> float:
        """From the lower edge of a panel to the upper edge of the next."""
        return GAP + (LABEL if any(label for label, _ in self.panels) else 0)

    @property
    def first_row(self) -> float:
        """Where the panels begin."""
        return self.top + LINE * (bool(self.title) + bool(self.heading)) + self.between - GAP

    @property
    def bottom(self) -> float:
        """Where they end."""
        return self.first_row + self.num_rows * (self.panel_size[1] + self.between) - self.between


def compose(width: float, blocks: Sequence[Block]) -> Drawing:
    """The figure, as high as its lowest block."""
    height = max(block.bottom for block in blocks) + MARGIN
    figure = Drawing(figsize=(width, height))
    for block in blocks:
        wide, high = block.panel_size
        grid = figure.add_gridspec(
            block.num_rows, block.columns, wspace=GAP / wide, hspace=block.between / high,
            left=block.left / width, right=(block.left + block.width) / width,
            top=1 - block.first_row / height, bottom=1 - block.bottom / height,
        )  # fmt: skip
        for number, (label, draw) in enumerate(block.panels):
            axes = figure.add_subplot(grid[number])
            axes.set_axis_off()
            axes.set_title(label, fontsize=SIZE, pad=4, parse_math=False)
            draw(axes)
        for place, text in enumerate(filter(None, (block.title, block.heading))):
            y, is_title = 1 - (block.top + place * LINE) / height, text == block.title
            line = figure.text(block.left / width, y, text, fontsize=SIZE + is_title, va="top", parse_math=False)
            line.set_fontweight("bold" if is_title else "normal")
    return figure


def shortened(text: str, most: int = 36) -> str:
    """The text in one line, without its middle where it is longer; a box for what the font does not have."""
    font = get_font(findfont(FontProperties()))
    text = "".join(char if font.get_char_index(ord(char)) else "□" for char in " ".join(text.split()))
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def save(figure: "Figure", path: Path, dpi: int = DPI) -> list[Path]:
    """Write `path` as PNG and as SVG, equal figures as equal files; returns both."""
    files = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    with rc_context({"svg.hashsalt": "acformer"}):  # with it and without a date, equal figures are equal files
        figure.savefig(files[0], dpi=dpi)
        figure.savefig(files[1], metadata={"Date": None})
    return files
