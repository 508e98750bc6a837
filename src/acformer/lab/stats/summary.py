"""Rows of many pictures -> means with 95 % intervals, and what each would be by chance.

Pictures of one group (crops of one photograph) are not independent, so whole groups are drawn: the interval is from
the 2.5th to the 97.5th percentile of the mean over 2,000 bootstrap samples of as many groups, drawn with replacement.
Of a single group there is none. The samples are the same for every measure, and for every run of as many groups.
"""

import json
from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from acformer.lab.stats.measure import chance_levels, grid_distance
from acformer.lab.stats.rows import Row, group
from acformer.lab.stats.stability import Grid, agreement

SAMPLES, LEVEL = 2000, 0.95


class Level(NamedTuple):
    """A measure over all pictures: mean, its interval, the greatest of one picture, and the level by chance."""

    mean: float
    low: float = nan
    high: float = nan
    greatest: float = nan
    chance: float = nan


class Summary(NamedTuple):
    """A run: what it is called, how it was made, its measures by name, and how often each place was an anchor."""

    name: str
    settings: dict[str, Any]
    levels: dict[str, Level]
    places: list[float]


def summarise(name: str, settings: Mapping[str, Any], rows: Mapping[str, Row]) -> Summary:
    """The measures of a run over `rows`; `settings` tells its heads, its anchors and its grid."""
    grid: Grid = tuple(settings["grid"])
    columns = {column for row in rows.values() for column, value in row.items() if isinstance(value, float)}
    table = {column: [float(row[column]) for row in rows.values()] for column in sorted(columns)}
    table |= _other_pictures(rows, grid)
    groups = [group(picture) for picture in rows]
    intervals = _bootstrap(table, groups)
    known = chance_levels(settings["num_heads"], settings["num_anchors"], grid)
    known |= {column.removesuffix("_chance"): level.mean for column, level in intervals.items() if "_chance" in column}
    known |= {f"other_{measure}": known[f"jpeg_{measure}"] for measure in ("jaccard", "kept_0", "kept_1")}
    known["outlier_anchors"] = intervals["outliers"].mean
    levels = {
        column: level._replace(chance=known.get(column, nan))
        for column, level in intervals.items()
        if not column.endswith("_chance")
    }
    levels["distance_grid"] = Level(grid_distance(settings["num_anchors"], grid))
    counts = {"num_images": len(rows), "num_groups": len(set(groups))}
    places = torch.zeros(grid[0] * grid[1])
    for row in rows.values():
        places[_anchors(row)] += 1 / len(rows)
    return Summary(name, {**settings, **counts}, levels, places.tolist())


def write_summary(path: Path, summary: Summary) -> None:
    """As JSON, NaN as null, six digits."""
    levels = {
        column: {key: None if value != value else float(f"{value:.6g}") for key, value in level._asdict().items()}
        for column, level in summary.levels.items()
    }
    record = {
        "name": summary.name,
        "settings": summary.settings,
        "levels": levels,
        "places": [round(place, 4) for place in summary.places],
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_summary(path: Path) -> Summary:
    """What `write_summary` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    levels = {
        column: Level(**{key: nan if value is None else value for key, value in level.items()})
        for column, level in record["levels"].items()
    }
    return Summary(record["name"], record["settings"], levels, record["places"])


def _anchors(row: Row) -> torch.Tensor:
    return torch.tensor([int(index) for index in str(row["anchors"]).split()])


def _other_pictures(rows: Mapping[str, Row], grid: Grid) -> dict[str, list[float]]:
    """`agreement` of each picture's anchors with those of the next picture of another group (NaN without one)."""
    pictures = list(rows)
    found: dict[str, list[float]] = {"other_jaccard": [], "other_kept_0": [], "other_kept_1": []}
    for place, picture in enumerate(pictures):
        later = (pictures[(place + step) % len(pictures)] for step in range(1, len(pictures)))
        other = next((one for one in later if group(one) != group(picture)), None)
        second = torch.empty(0, dtype=torch.int64) if other is None else _anchors(rows[other])
        for measure, value in agreement(_anchors(rows[picture]), second, grid).items():
            found[f"other_{measure}"].append(nan if other is None else value)
    return found


def _bootstrap(table: Mapping[str, list[float]], groups: list[str]) -> dict[str, Level]:
    """Mean, interval and greatest value of every column; NaN is passed over."""
    values = np.array(list(table.values())).T
    _, member = np.unique(groups, return_inverse=True)
    num_groups = int(member.max()) + 1
    known = ~np.isnan(values)
    sums, counts = (np.zeros((num_groups, values.shape[1])) for _ in range(2))
    np.add.at(sums, member, np.where(known, values, 0))
    np.add.at(counts, member, known)
    drawn = np.random.default_rng(0).multinomial(num_groups, np.full(num_groups, 1 / num_groups), SAMPLES)
    with np.errstate(invalid="ignore"):  # a sample, or all, may hold no value of a measure that is seldom defined
        means = sums.sum(axis=0) / counts.sum(axis=0)
        sampled = (drawn @ sums) / (drawn @ counts)
    levels = {}
    for column, name in enumerate(table):
        inside = sampled[~np.isnan(sampled[:, column]), column]
        alone = num_groups == 1 or not len(inside)
        low, high = (nan, nan) if alone else np.quantile(inside, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        greatest = values[known[:, column], column].max(initial=-np.inf) if known[:, column].any() else nan
        levels[name] = Level(float(means[column]), low, high, float(greatest))
    return levels
