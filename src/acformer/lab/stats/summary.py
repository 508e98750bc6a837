"""Rows of many images -> means with 95 % intervals, and what each would be by chance.

Images of one group (crops of one photograph) are not independent, so the bootstrap draws whole groups
(`acformer.evaluate.scorers.interval`). Of a single group there is no interval.
"""

import json
from collections.abc import Mapping, Sequence
from math import isnan, nan
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from acformer.evaluate.scorers import interval
from acformer.files import write_text
from acformer.lab.stats.measure import chance_levels, grid_distance
from acformer.lab.stats.rows import ImageStats, group_of
from acformer.lab.stats.stability import Grid, set_agreement


class Estimate(NamedTuple):
    """A measure over all images: mean, its interval, the greatest of one image, and the mean by chance."""

    mean: float
    low: float = nan
    high: float = nan
    greatest: float = nan
    chance: float = nan


class Summary(NamedTuple):
    """A run: what it is called, how it was made, its measures by name, and how often each place was an anchor."""

    name: str
    settings: dict[str, Any]
    estimates: dict[str, Estimate]
    places: list[float]


def summarise(name: str, settings: Mapping[str, Any], rows: Mapping[str, ImageStats]) -> Summary:
    """The measures of a run over `rows`; `settings` tells its heads, its anchors and its grid."""
    grid: Grid = tuple(settings["grid"])
    columns = {column for row in rows.values() for column, value in row.items() if isinstance(value, float)}
    table = {column: [float(row[column]) for row in rows.values()] for column in sorted(columns)}
    table |= _against_other_images(rows, grid)
    groups = [group_of(image) for image in rows]
    every = {column: _estimate(values, groups) for column, values in table.items()}
    known = chance_levels(settings["num_heads"], settings["num_anchors"], grid)
    known |= {column.removesuffix("_chance"): each.mean for column, each in every.items() if "_chance" in column}
    known |= {f"other_{measure}": known[f"jpeg_{measure}"] for measure in ("jaccard", "kept_0", "kept_1")}
    known["outlier_anchors"] = every["outliers"].mean
    estimates = {
        column: each._replace(chance=known.get(column, nan))
        for column, each in every.items()
        if not column.endswith("_chance")
    }
    estimates["distance_grid"] = Estimate(grid_distance(settings["num_anchors"], grid))
    counts = {"num_images": len(rows), "num_groups": len(set(groups))}
    places = torch.zeros(grid[0] * grid[1])
    for row in rows.values():
        places[_anchors(row)] += 1 / len(rows)
    return Summary(name, {**settings, **counts}, estimates, places.tolist())


def write_summary(path: Path, summary: Summary) -> None:
    """As JSON, NaN as null, six digits."""
    levels = {
        column: {key: None if isnan(value) else float(f"{value:.6g}") for key, value in each._asdict().items()}
        for column, each in summary.estimates.items()
    }
    places = [round(place, 4) for place in summary.places]
    record = {"name": summary.name, "settings": summary.settings, "levels": levels, "places": places}
    write_text(path, json.dumps(record, indent=1) + "\n")


def read_summary(path: Path) -> Summary:
    """What `write_summary` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    estimates = {
        column: Estimate(**{key: nan if value is None else value for key, value in level.items()})
        for column, level in record["levels"].items()
    }
    return Summary(record["name"], record["settings"], estimates, record["places"])


def _anchors(row: ImageStats) -> torch.Tensor:
    return torch.tensor([int(index) for index in str(row["anchors"]).split()])


def _against_other_images(rows: Mapping[str, ImageStats], grid: Grid) -> dict[str, list[float]]:
    """`set_agreement` of each image's anchors with those of the next image of another group (NaN without one)."""
    images = list(rows)
    found: dict[str, list[float]] = {"other_jaccard": [], "other_kept_0": [], "other_kept_1": []}
    for place, image in enumerate(images):
        later = (images[(place + step) % len(images)] for step in range(1, len(images)))
        other = next((one for one in later if group_of(one) != group_of(image)), None)
        second = torch.empty(0, dtype=torch.int64) if other is None else _anchors(rows[other])
        for measure, value in set_agreement(_anchors(rows[image]), second, grid).items():
            found[f"other_{measure}"].append(nan if other is None else value)
    return found


def _estimate(values: Sequence[float], groups: Sequence[str]) -> Estimate:
    """Mean, interval and greatest value of a column; images without a value (NaN) take no part."""
    known = [(value, group) for value, group in zip(values, groups, strict=True) if not isnan(value)]
    if not known:
        return Estimate(nan)
    points, members = zip(*known, strict=True)
    low, high = interval(points, members) if len(set(members)) > 1 else (nan, nan)
    return Estimate(fmean(points), low, high, max(points))
