"""The table of `acformer stats`: measures down, runs across, each mean with its interval and its level by chance."""

from collections.abc import Sequence
from math import isnan

from acformer.lab.paper import OVERLAP
from acformer.lab.stats.overlap import ACTIVATIONS, MAIN, SALIENCES, SHARES, overlap_name
from acformer.lab.stats.stability import VIEWS
from acformer.lab.stats.summary import Level, Summary

WORDS = {
    "mass_anchors": "attention mass on the anchors",
    "mass_best": "the most it could be on as many patches",
    "heads_shared": "patches in a head's best that another head has too",
    "outliers": "patches with outlying norm",
    "outlier_anchors": "anchors with outlying norm",
    "anchor_outliers": "outlying patches that are anchors",
    "max_norm": "greatest norm over median norm",
    "distance": "patches to the next anchor",
    "distance_grid": "the same of points spread evenly",
}
NO_SHARES = {"max_norm", "distance", "distance_grid"}


def table_text(runs: Sequence[Summary]) -> str:
    """Markdown; the first run's settings above, its machine below. Shares are in per cent."""
    first = runs[0].settings
    lines = [
        f"{first['num_anchors']} anchors of {first['grid'][0]} x {first['grid'][1]} patches; mean [95 % interval over "
        "groups] (by chance); shares in %",
        "",
        _line(["", *(f"{run.name}" for run in runs)]),
        _line(["---"] * (len(runs) + 1)),
        _line(["images (groups)", *(f"{run.settings['num_images']} ({run.settings['num_groups']})" for run in runs)]),
    ]
    for name, words in measures().items():
        if any(name in run.levels for run in runs):
            lines.append(_line([words, *(_cell(run.levels.get(name), name not in NO_SHARES) for run in runs)]))
    facts = ", ".join(f"{key} {value}" for key, value in first["made_on"].items())
    return "\n".join([*lines, "", f"{first['vision']}; {facts}. The paper's overlap: up to {OVERLAP} %."])


def measures() -> dict[str, str]:
    """The measures of the table, by name, in words."""
    words = {
        overlap_name(*MAIN, share, share): f"overlap, best {share:.0%} of both (`{MAIN[0]}`, `{MAIN[1]}`)"
        for share in SHARES
    }
    for activation in ACTIVATIONS:
        for salience in SALIENCES:
            if (activation, salience) != MAIN:
                words[overlap_name(activation, salience, 0.1, 0.1)] = f"overlap, 10% (`{activation}`, `{salience}`)"
    words |= WORDS
    for view in (*VIEWS, "other"):
        said = "anchors of another picture" if view == "other" else view
        words[f"{view}_kept_0"] = f"{said}: kept in place"
        words[f"{view}_kept_1"] = f"{said}: kept within 1 patch"
        words[f"{view}_jaccard"] = f"{said}: Jaccard"
    return words


def _cell(level: Level | None, share: bool) -> str:
    """`69.4 [68.1, 70.6] (10.1)`, what is not known left out."""
    if level is None or isnan(level.mean):
        return "-"
    mean, low, high, chance = (
        f"{100 * value:.1f}" if share else f"{value:.2f}" for value in (level.mean, level.low, level.high, level.chance)
    )
    interval = "" if isnan(level.low) else f" [{low}, {high}]"
    return f"{mean}{interval}" + ("" if isnan(level.chance) else f" ({chance})")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
