"""A figure of panels that are placed in inches: pictures of any shape stand in rows, close and without overlaps.

Matplotlib's own layout engines share out what room there is; with panels of a fixed shape they leave gaps.
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
MOST_INCHES = 65_535 / DPI  # Agg draws no more pixels

Draw = Callable[["Axes"], None]


@dataclass(frozen=True)
class Panel:
    """Where something is drawn (inches from the left and from the top), what, and the label above it."""

    left: float
    top: float
    width: float
    height: float
    draw: Draw
    label: str = ""

    @property
    def bottom(self) -> float:
        """Inches from the top."""
        return self.top + self.height


@dataclass(frozen=True)
class Words:
    """A line of text: its left end and its top in inches."""

    left: float
    top: float
    text: str
    bold: bool = False


def rows(
    draws: Sequence[tuple[str, Draw]], left: float, top: float, width: float, columns: int, ratio: float
) -> list[Panel]:
    """Panels of (label, what to draw), row by row, that fill a width in so many columns.

    ratio: height over width of a panel. Labels stand above their panels; a sheet without any leaves no room for them.
    """
    label = LABEL if any(text for text, _ in draws) else 0
    wide = (width - (columns - 1) * GAP) / columns
    high = wide * ratio
    panels = []
    for place, (text, draw) in enumerate(draws):
        row, column = divmod(place, columns)
        y = top + label + row * (high + label + GAP)
        panels.append(Panel(left + column * (wide + GAP), y, wide, high, draw, text))
    return panels


def compose(width: float, panels: Sequence[Panel], words: Sequence[Words] = ()) -> Drawing:
    """The figure, as high as its lowest panel."""
    height = max(panel.bottom for panel in panels) + MARGIN
    figure = Drawing(figsize=(width, height))
    for panel in panels:
        place = panel.left / width, 1 - panel.bottom / height, panel.width / width, panel.height / height
        axes = figure.add_axes(place)
        axes.set_axis_off()
        panel.draw(axes)
        if panel.label:
            x, y = (panel.left + panel.width / 2) / width, 1 - (panel.top - 0.03) / height
            figure.text(x, y, panel.label, fontsize=SIZE, ha="center", va="bottom", parse_math=False)
    for line in words:
        weight = "bold" if line.bold else "normal"
        x, y = line.left / width, 1 - line.top / height
        figure.text(x, y, line.text, fontsize=SIZE + line.bold, weight=weight, ha="left", va="top", parse_math=False)
    return figure


def shortened(text: str, most: int = 36) -> str:
    """The text in one line, without its middle where it is longer; a box for what the font does not have."""
    font = get_font(findfont(FontProperties()))
    text = "".join(char if font.get_char_index(ord(char)) else "□" for char in " ".join(text.split()))
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def near_square(number: int) -> int:
    """Columns of a block of that many panels, not fewer than its rows: 3 for 6, 4 for 12 and 16."""
    return math.ceil(math.sqrt(number))


def save(figure: "Figure", path: Path, dpi: int = DPI) -> list[Path]:
    """Write `path` as PNG and as SVG, equal figures as equal files; returns both."""
    files = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    with rc_context({"svg.hashsalt": "acformer"}):  # with it and without a date, equal figures are equal files
        figure.savefig(files[0], dpi=dpi)
        figure.savefig(files[1], metadata={"Date": None})
    return files
