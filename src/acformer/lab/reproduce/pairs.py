"""Rows compared seed by seed: of one seed, two rows see the same samples in the same order, so what they share cancels.

Two means side by side, each with its interval, say less: much of what a seed brings (which scenes come late, say) is
common to both rows. Here the differences of the seeds that both rows have are averaged, with Student's interval and
the p of its paired test. p is for one comparison; of twenty rows, one is below 0.05 by chance.
"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from acformer.lab.markdown import markdown_table
from acformer.lab.reproduce.measured import AVERAGE, Measured, mean_interval, shown_scores


class Difference(NamedTuple):
    """values: a row's score less another's, a value a seed (0 to 1). mean, half: of them, and half its interval.

    p: of the paired t-test that there is none; nan with one seed, and where all are equal.
    """

    values: list[float]
    mean: float
    half: float
    p: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Difference":
        """From the seeds' differences, at least one."""
        mean, half = mean_interval(values)
        return cls([*values], mean, half, paired_p(values))

    def __str__(self) -> str:
        """`+1.2 ± 0.4`, in points of percent; without the interval where it is not known."""
        interval = "" if math.isnan(self.half) else f" ± {100 * self.half:.1f}"
        return f"{100 * self.mean:+.1f}{interval}"


def paired_p(values: Sequence[float]) -> float:
    """Two-sided p of Student's test that differences have mean 0: t = mean / (s / sqrt(n)), n - 1 freedom."""
    from scipy.stats import t

    n = len(values)
    if n < 2 or stdev(values) == 0:
        return math.nan
    return float(2 * t.sf(abs(fmean(values)) / (stdev(values) / math.sqrt(n)), n - 1))


def common_seeds(row: Measured, other: Measured) -> list[int]:
    """Seeds that both have, ascending."""
    return sorted(row.by_seed().keys() & other.by_seed().keys())


def difference(row: Measured, other: Measured, data: str, column: str = AVERAGE, *, kinds: bool = False) -> Difference:
    """Of a family's score (or, of `kinds`, of the accuracy on one kind of questions) in the seeds that both have."""
    ours, theirs = row.by_seed(), other.by_seed()

    def value(record: dict) -> float:
        scores = record["scores"][data]
        return scores["accuracy_by_kind"][column] if kinds else shown_scores(scores)[column].value

    return Difference.of([value(ours[seed]) - value(theirs[seed]) for seed in common_seeds(row, other)])


def pairs_table(cells: Sequence[Measured], against: str, data: str) -> str:
    """Every row less the row `against`, best first: seed by seed, on average, and by kind; empty without pairs."""
    base = next((cell for cell in cells if cell.name == against and cell.records), None)
    rows = [cell for cell in cells if base and cell.name != against and common_seeds(cell, base)]
    if base is None or not rows:
        return ""
    kinds = base.kinds(data)
    compared = sorted(((difference(row, base, data), row) for row in rows), key=lambda pair: -pair[0].mean)
    lines = []
    for found, row in compared:
        seeds = ", ".join(f"{100 * value:+.1f}" for value in found.values)
        p = "" if math.isnan(found.p) else f"{found.p:.2g}"
        by_kind = [str(difference(row, base, data, kind, kinds=True)) for kind in kinds]
        lines.append([f"`{row.name}`", str(found), p, seeds, *by_kind])
    head = [f"less `{against}`", AVERAGE, "p", "seed by seed", *kinds]
    return markdown_table(head, lines)
