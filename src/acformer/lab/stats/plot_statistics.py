"""Six panels: overlap over both thresholds and under other definitions, heads, attention mass, stability, places.

The first run has the first and the last panel for itself; in the others every run has its colour. Bars and bands are
95 % intervals over groups of images, grey marks what is expected by chance.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from acformer.lab.figures.sheet import save
from acformer.lab.paper import OVERLAP
from acformer.lab.stats.overlap import ACTIVATIONS, MAIN, SHARES, overlap_name
from acformer.lab.stats.stability import VIEWS
from acformer.lab.stats.summary import Estimate, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHANCE = "0.55"
PER_CENT = [100 * share for share in SHARES]


def plot_statistics(runs: Sequence[Summary], path: Path) -> None:
    """Write `<path>.png` and `<path>.svg`."""
    figure = Figure(figsize=(15, 9), layout="constrained")
    thresholds, definitions, heads, mass, stable, places = figure.subplots(2, 3).flat
    _thresholds(thresholds, runs[0])
    _definitions(definitions, runs)
    _heads(heads, runs)
    _shares(mass, runs, {"mass_anchors": "attention\non anchors", "mass_best": "most\npossible"})
    mass.set_title("share of the [CLS] attention")
    kept = {f"{view}_kept_0": view for view in VIEWS} | {"other_kept_0": "another\nimage"}
    _shares(stable, runs, kept)
    stable.set_title("anchors kept in place")
    _places(places, runs[0])
    handles, labels = stable.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    settings = runs[0].settings
    figure.suptitle(f"{settings['vision']}: {settings['num_anchors']} anchors of {len(runs[0].places)} patches")
    save(figure, path, dpi=130)


def _thresholds(axes: "Axes", run: Summary) -> None:
    shades = colormaps["viridis"](np.linspace(0, 0.85, len(SHARES)))
    for share, shade in zip(SHARES, shades, strict=True):
        estimates = [run.estimates[overlap_name(*MAIN, share, other)] for other in SHARES]
        _curve(axes, estimates, shade, f"best {share:.0%}")
    _chance_line(axes)
    axes.set(title=f"{run.name}: {MAIN[0]} against {MAIN[1]}", xlabel="salient patches, % of all")
    axes.set_ylabel("of the activated patches, % salient")
    axes.legend(title="activated", fontsize="small", frameon=False, loc="lower right")


def _definitions(axes: "Axes", runs: Sequence[Summary]) -> None:
    """Every run by the main pair; the first run also by the other scores of activation, dashed."""
    for place, run in enumerate(runs):
        _curve(axes, [run.estimates[overlap_name(*MAIN, share, share)] for share in SHARES], f"C{place}")
    styles = [":", "--", "-.", (0, (1, 3))]
    for activation, style in zip([name for name in ACTIVATIONS if name != MAIN[0]], styles, strict=True):
        estimates = [runs[0].estimates[overlap_name(activation, MAIN[1], share, share)] for share in SHARES]
        axes.plot(PER_CENT, [100 * each.mean for each in estimates], color="black", ls=style, lw=1, label=activation)
    _chance_line(axes)
    axes.set(title="equal shares: runs, and other scores", xlabel="activated = salient patches, % of all")
    axes.set_ylabel("overlap, %")
    axes.legend(title=f"{runs[0].name}, by", fontsize="small", frameon=False, loc="lower right")


def _curve(axes: "Axes", estimates: Sequence[Estimate], colour: Any, label: str | None = None) -> None:
    axes.plot(PER_CENT, [100 * each.mean for each in estimates], "o-", color=colour, label=label, markersize=4)
    low, high = ([100 * getattr(each, end) for each in estimates] for end in ("low", "high"))
    axes.fill_between(PER_CENT, low, high, color=colour, alpha=0.2, linewidth=0)


def _chance_line(axes: "Axes") -> None:
    axes.plot([0, 50], [0, 50], color=CHANCE, lw=1)
    axes.text(48, 46, "chance", color=CHANCE, ha="right", va="top", fontsize="small")
    axes.axhline(OVERLAP, color="crimson", lw=1, ls=":")
    axes.text(51, OVERLAP + 1, f"paper: up to {OVERLAP} %", color="crimson", ha="right", fontsize="small")
    axes.set(xlim=(0, 52), ylim=(0, 101))


def _heads(axes: "Axes", runs: Sequence[Summary]) -> None:
    columns = {f"heads_{heads}": str(heads) for heads in range(1, runs[0].settings["num_heads"] + 1)}
    _bars(axes, runs, columns, 1)
    axes.set(title="patches shared by heads (grey: independent heads)")
    axes.set(xlabel="heads that have the patch in their best", ylabel="patches an image", yscale="log")
    axes.set_ylim(1e-2, None)


def _shares(axes: "Axes", runs: Sequence[Summary], names: dict[str, str]) -> None:
    _bars(axes, runs, names, 100)
    axes.set(ylabel="%", ylim=(0, 100))


def _bars(axes: "Axes", runs: Sequence[Summary], names: dict[str, str], scale: float) -> None:
    """A group of bars a measure, a bar a run, each with its interval and what is expected by chance."""
    width = 0.8 / len(runs)
    for place, run in enumerate(runs):
        x = np.arange(len(names)) + (place - (len(runs) - 1) / 2) * width
        estimates = np.array([run.estimates.get(name, Estimate(0.0)) for name in names]) * scale
        mean, low, high, _, chance = estimates.T
        axes.bar(x, mean, width, color=f"C{place}", label=run.name)
        axes.errorbar(x, mean, np.nan_to_num([mean - low, high - mean]), fmt="none", ecolor="black", capsize=2, lw=1)
        axes.hlines(chance, x - width / 2, x + width / 2, color=CHANCE, lw=2)
    axes.set_xticks(np.arange(len(names)), list(names.values()))


def _places(axes: "Axes", run: Summary) -> None:
    grid = np.array(run.places).reshape(run.settings["grid"]) * 100
    image = axes.imshow(grid, cmap="magma", vmin=0)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    even = 100 * run.settings["num_anchors"] / grid.size
    axes.set_title(f"{run.name}: anchors by place")
    axes.set_xlabel(f"% of images with an anchor there; {even:.1f} if even")
    axes.set_xticks([])
    axes.set_yticks([])
