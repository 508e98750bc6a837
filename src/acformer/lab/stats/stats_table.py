"""The table of `acformer stats`: measures down, runs across, each mean with its interval and its mean by chance."""

from collections.abc import Sequence
from math import isnan

from acformer.lab.markdown import markdown_table
from acformer.lab.paper import OVERLAP
from acformer.lab.stats.overlap import ACTIVATIONS, MAIN, SALIENCES, SHARES, overlap_name
from acformer.lab.stats.stability import VIEWS
from acformer.lab.stats.summary import Estimate, Summary

MEASURES = {
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
    rows = [["images (groups)", *(f"{run.settings['num_images']} ({run.settings['num_groups']})" for run in runs)]]
    for name, words in measures().items():
        if any(name in run.estimates for run in runs):
            rows.append([words, *(_cell(run.estimates.get(name), name not in NO_SHARES) for run in runs)])
    table = markdown_table(["", *(run.name for run in runs)], rows)
    made_on = ", ".join(f"{key} {value}" for key, value in first["made_on"].items())
    return (
        f"{first['num_anchors']} anchors of {first['grid'][0]} x {first['grid'][1]} patches; mean [95 % interval over "
        f"groups] (by chance); shares in %\n\n{table}\n\n"
        f"{first['vision']}; {made_on}. The paper's overlap: up to {OVERLAP} %."
    )


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
    words |= MEASURES
    for view in (*VIEWS, "other"):
        label = "anchors of another image" if view == "other" else view
        words[f"{view}_kept_0"] = f"{label}: kept in place"
        words[f"{view}_kept_1"] = f"{label}: kept within 1 patch"
        words[f"{view}_jaccard"] = f"{label}: Jaccard"
    return words


def _cell(estimate: Estimate | None, share: bool) -> str:
    """`69.4 [68.1, 70.6] (10.1)`, what is not known left out."""
    if estimate is None or isnan(estimate.mean):
        return "-"
    mean, low, high, _, chance = (f"{100 * value:.1f}" if share else f"{value:.2f}" for value in estimate)
    interval = "" if isnan(estimate.low) else f" [{low}, {high}]"
    return f"{mean}{interval}" + ("" if isnan(estimate.chance) else f" ({chance})")
