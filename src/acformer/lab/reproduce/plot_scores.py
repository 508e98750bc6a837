"""A table as a figure: accuracy of every row against the time of its training step; and against the samples.

The paper's Figure 1 has the step time as its axis; here every table has its figure, with the interval over seeds and
the blind level, and a second panel where rows were trained with fewer samples. Rows that did not learn are left out,
of the first panel also those that were not timed.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from acformer.lab.figures.sheet import save
from acformer.lab.reproduce.measured import AVERAGE, Measured, mean_interval, shown_scores
from acformer.lab.reproduce.plans import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_scores(plan: Plan, cells: Sequence[Measured], path: Path) -> None:
    """Write `<path>.png` and `<path>.svg` of the first data set; nothing as long as nothing is measured."""
    data = plan.scale.data[0]
    known = [cell for cell in cells if cell.records]
    full = [cell for cell in known if cell.fraction == 1]
    if not full:
        return
    names = list(dict.fromkeys(cell.name for cell in cells))
    blind = 100 * shown_scores(full[0].records[0]["scores"][data])[AVERAGE].blind
    figure = Figure(figsize=(12 if plan.fractions else 8, 5), layout="constrained")
    panels = figure.subplots(1, 2 if plan.fractions else 1, sharey=True, squeeze=False)[0]
    shown = [cell for cell in known if cell.learned(data)]
    timed = [cell for cell in shown if cell.fraction == 1 and cell.timing]
    _lines(panels[0], names, timed, data, Measured.step)
    panels[0].set(xscale="log", xlabel="seconds a training step (median)", ylabel="score, average of families, %")
    panels[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].xaxis.set_major_formatter("{x:g}")
    if plan.fractions:
        scaled = [cell for cell in shown if cell.budget == plan.scale.scaling_budget]
        _lines(panels[1], names, scaled, data, lambda cell: cell.fraction)
        panels[1].set(xscale="log", xlabel="share of the training samples")
        panels[1].set_xticks([*plan.fractions, 1.0], [f"{share:g}" for share in (*plan.fractions, 1.0)])
        panels[1].set_xticks([], minor=True)
    for panel in panels:
        panel.xaxis.set_minor_formatter(NullFormatter())  # between the decades the labels would overlap
        panel.axhline(blind, color="black", linestyle=":", linewidth=1, label=f"blind: {blind:.1f}")
        panel.grid(alpha=0.3)
    panels[0].set_ylim(*_range([cell.values(data) for cell in shown]))
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small", frameon=False)
    figure.suptitle(f"{plan.name}, {plan.scale.name} scale: {data}")
    save(figure, path, dpi=150)


def _lines(
    axes: "Axes", names: Sequence[str], cells: Sequence[Measured], data: str, along: Callable[[Measured], float]
) -> None:
    """One line a row, through its cells, with error bars; rows keep their colour and mark in every panel."""
    marks = "osD^v<>PX*"
    for number, name in enumerate(names):
        points = sorted((along(cell), *mean_interval(cell.values(data))) for cell in cells if cell.name == name)
        if points:
            x, mean, half = zip(*points, strict=True)
            errors = [0.0 if math.isnan(h) else 100 * h for h in half]
            axes.errorbar(
                x,
                [100 * m for m in mean],
                yerr=errors,
                fmt=f"{marks[number % len(marks)]}-",
                color=colormaps["turbo"](number / max(1, len(names) - 1)),
                label=name,
                capsize=3,
                markersize=6,
            )


def _range(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """In percent, where the rows are: the blind level is far below most, and its number stands in the legend."""
    means = [100 * mean_interval(values)[0] for values in scores]
    return (min(means) - 4, max(means) + 4) if means else (0.0, 100.0)
