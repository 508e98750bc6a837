"""What the records of a row come to: scores by family and kind, their mean and interval over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from acformer.errors import UsageError
from acformer.lab.reproduce.records import read_record
from acformer.lab.reproduce.runs import Cell, Job, Timing, job_path, job_record, records_of

AVERAGE = "average"


@dataclass(frozen=True)
class Measured:
    """What is known of a cell: the records of its seeds, that of its row's timing, and what went wrong."""

    name: str
    budget: int
    fraction: float
    records: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    timing: dict[str, Any] | None = None

    @classmethod
    def of(cls, cell: Cell, results: Path) -> "Measured":
        """Read the records of a cell in the folder of its table."""
        timings = [Timing(run) for run in cell.runs[:1]]
        jobs: list[Job] = [*cell.runs, *timings]
        failed = [(job, read_record(job_path(results, job)).get("error")) for job in jobs]
        errors = [f"{job.folder}/{job.name}: {error}" for job, error in failed if error]
        if cell.error:
            errors.append(f"{cell.row.name} at T = {cell.budget}: {cell.error}")
        timing = job_record(results, timings[0]) if timings else None
        return cls(cell.row.name, cell.budget, cell.fraction, records_of(cell, results), errors, timing)

    def values(self, data: str, family: str = AVERAGE) -> list[float]:
        """The score of a family of questions in every seed; by default the average of all families."""
        return [shown_scores(record["scores"][data])[family].value for record in self.records]

    def by_seed(self) -> dict[int, dict[str, Any]]:
        """The records by their seeds."""
        return {record["seed"]: record for record in self.records if "seed" in record}

    def kinds(self, data: str) -> list[str]:
        """The kinds of questions whose accuracy stands beside the families' scores; none without families."""
        scores = self.records[0]["scores"][data] if self.records else {}
        return sorted(scores.get("accuracy_by_kind", ())) if "families" in scores else []

    def accuracies(self, data: str, kind: str) -> list[float]:
        """The accuracy on one kind of questions in every seed."""
        return [record["scores"][data]["accuracy_by_kind"][kind] for record in self.records]

    def median(self, key: str) -> float:
        """Of a number that the records hold."""
        return median(record[key] for record in self.records)

    def step(self) -> float:
        """Seconds of a training step; nan if it was not timed."""
        return self.timing["step_seconds"] if self.timing else math.nan

    def learned(self, data: str) -> bool:
        """Whether the average is above the blind one by more than its interval (of one seed: that over images)."""
        scores = [shown_scores(record["scores"][data])[AVERAGE] for record in self.records]
        mean, half = mean_interval([score.value for score in scores])
        low = scores[0].low if math.isnan(half) else mean - half
        return low > max(score.blind for score in scores)


class Score(NamedTuple):
    """A score, the lower end of its interval over images, and what is scored without a look; nan if not known."""

    value: float
    low: float = math.nan
    blind: float = math.nan


def shown_scores(scores: dict[str, Any]) -> dict[str, Score]:
    """The columns of a table: `average`, then every family with its own measure.

    Of a data set without families (see `acformer.evaluate.families`) the accuracy over all questions, and of each kind.
    """
    if "families" not in scores:
        kinds = {kind: Score(value) for kind, value in scores["accuracy_by_kind"].items()}
        return {AVERAGE: Score(scores["accuracy"], scores["interval"][0], scores["blind_accuracy"]), **kinds}
    columns = {AVERAGE: scores["average"], **scores["families"]}
    return {name: Score(column["score"], column["interval"][0], column["blind"]) for name, column in columns.items()}


def student_t(freedom: int, confidence: float = 0.95) -> float:
    """t with P(|T| < t) = `confidence`. `UsageError` without scipy."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise UsageError(f"intervals over seeds need scipy ({error}): pip install 'acformer[lab]'") from error
    return float(t.ppf((1 + confidence) / 2, freedom))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval, t_(n-1) s / sqrt(n); nan for the latter of a single value."""
    n = len(values)
    half = student_t(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return fmean(values), half


def percent(values: Sequence[float]) -> str:
    """`85.2 ± 1.3`; without the interval where it is not known."""
    mean, half = (100 * value for value in mean_interval(values))
    return f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}"
