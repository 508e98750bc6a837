"""A file of answers -> the score of a benchmark, with its interval, parts and doubts; two files side by side."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from acformer.benchmarks import BENCHMARKS
from acformer.benchmarks.answers import Answer, Question, match
from acformer.benchmarks.benchmark import LLAVA, PROTOCOLS, Benchmark, Measure
from acformer.benchmarks.hub import open_folder
from acformer.benchmarks.records import Folder
from acformer.errors import DataError, UsageError, unknown_name
from acformer.evaluate.scorers import Sums, bootstrap, sum_by_group
from acformer.files import whole_file, write_text

NUM_EXAMPLES = 3
"""So many answers that were not recognised are shown."""


@dataclass(frozen=True)
class Answered:
    """A benchmark's questions, in order, each with its answer."""

    benchmark: Benchmark
    folder: Folder
    questions: Sequence[Question]
    answers: Sequence[Answer]
    protocol: str = LLAVA

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise unknown_name("protocol", self.protocol, PROTOCOLS)

    @property
    def texts(self) -> list[str | None]:
        """What was answered."""
        return [answer.text for answer in self.answers]

    @cached_property
    def measure(self) -> Measure:
        """`DataError` where the right answers are not known."""
        if reason := self.benchmark.not_scored_because(self.questions, self.texts):
            raise DataError(f"{self.folder.root}: {reason}")
        return self.benchmark.measure(self.questions, self.texts, self.protocol)

    def read_others(self, answers: Path) -> "Answered":
        """The same questions with the answers of another file."""
        given = self.benchmark.read_answers(answers)
        return replace(self, answers=[given[i] for i in match(self.questions, given, answers)])

    def by_group(self, measure: Measure) -> np.ndarray:
        """(groups, counts): sums over the questions about one image."""
        groups = [question.group for question in self.questions]
        return sum_by_group(measure.counts, groups, list(dict.fromkeys(groups)))


def read_answered(name: str | Benchmark, answers: Path, truth: Path | None = None, protocol: str = LLAVA) -> Answered:
    """A file of answers and the questions that they are to.

    Args:
        truth: a folder of the benchmark's published files, a data set of the hub (see `hub.open_folder`), or the file
            with the answers; by default the answers' own table if it holds them, else the folder in which it lies.

    Raises:
        DataError: a file that is not what it should be; answers that are missing, double or to no question.
        UsageError: an unknown benchmark or protocol.
    """
    benchmark = BENCHMARKS[name] if isinstance(name, str) else name
    holds_truth = answers.is_dir() or answers.suffix in (".xlsx", ".zip")
    folder = open_folder(truth or (answers if holds_truth else answers.parent))
    all_questions, given = benchmark.questions(folder), benchmark.read_answers(answers)
    if not all_questions:
        raise DataError(f"{folder.root} holds no questions of {benchmark.name}")
    questions = benchmark.answered(all_questions, given)
    return Answered(benchmark, folder, questions, [given[i] for i in match(questions, given, answers)], protocol)


def score_answers(answered: Answered) -> dict[str, Any]:
    """What `acformer score --json` prints: the score, its 95 % interval, parts and doubts."""
    benchmark, measure = answered.benchmark, answered.measure
    by_group = answered.by_group(measure)
    known = all(question.answers for question in answered.questions)
    return {
        "benchmark": benchmark.name,
        "protocol": answered.protocol,
        "protocol_does": benchmark.protocols[answered.protocol],
        "metric": benchmark.metric,
        "score": float(measure.score(by_group.sum(axis=0))),
        "interval": list(bootstrap(by_group, measure.score)),
        "blind": _blind(answered) if known else None,
        "num_questions": len(answered.questions),
        "num_images": len({question.image for question in answered.questions} - {""}),
        "unparsed": len(measure.unparsed),
        "unparsed_examples": _examples(answered, measure.unparsed),
        "unreadable_images": sum(text is None for text in answered.texts),
        "note": benchmark.note(answered.answers),
        "parts": measure.parts(),
    }


def _blind(answered: Answered) -> float:
    blind = answered.benchmark.blind_texts(answered.questions)
    measure = answered.benchmark.measure(answered.questions, blind, answered.protocol)
    return float(measure.score(measure.counts.sum(axis=0)))


def _examples(answered: Answered, places: Sequence[int]) -> list[dict[str, str]]:
    return [
        {"id": answered.questions[place].id, "answer": answered.answers[place].text or ""}
        for place in places[:NUM_EXAMPLES]
    ]


def compare(one: Answered, other: Answered) -> dict[str, Any]:
    """The paired difference of two models' scores, its 95 % interval, and McNemar's exact p.

    Images are drawn for both at once. `better` and `worse` count the questions (in MMBench with all their rotations) on
    which the first model has more or less points than the other; where points are right or wrong, p is McNemar's, and
    elsewhere that of the sign test, which is the same sum.
    """
    ours, theirs = one.measure, other.measure
    width = ours.counts.shape[1]

    def difference(sums: Sums) -> np.ndarray:
        return ours.score(sums[..., :width]) - theirs.score(sums[..., width:])

    both = np.concatenate([one.by_group(ours), other.by_group(theirs)], axis=1)
    points = _points_by_unit(one) - _points_by_unit(other)
    better, worse = int((points > 0).sum()), int((points < 0).sum())
    return {
        "score": float(theirs.score(both[:, width:].sum(axis=0))),
        "difference": float(difference(both.sum(axis=0))),
        "interval": list(bootstrap(both, difference)),
        "better": better,
        "worse": worse,
        "p": two_sided_p(better, worse),
    }


def _points_by_unit(answered: Answered) -> np.ndarray:
    measure = answered.measure
    if measure.units is None:
        return measure.points
    return np.array([*dict(zip(measure.units, measure.points, strict=True)).values()])


def two_sided_p(better: int, worse: int) -> float:
    """How likely a split of `better + worse` fair coins is that is no less one-sided; 1 for none."""
    total, fewer = better + worse, min(better, worse)
    whole = math.lgamma(total + 1) - total * math.log(2)
    tail = sum(math.exp(whole - math.lgamma(k + 1) - math.lgamma(total - k + 1)) for k in range(fewer + 1))
    return min(1.0, 2 * tail)


def write_questions(path: Path, one: Answered, other: Answered | None = None) -> None:
    """One JSON line a question: what was right, what was answered, and how many points it is worth."""
    lines = []
    for place, (question, answer) in enumerate(zip(one.questions, one.answers, strict=True)):
        line = {
            "id": question.id,
            "image": question.image,
            "question": question.text,
            "truth": question.answers[0] if len(question.answers) == 1 else list(question.answers),
            "answer": answer.text,
            "points": float(one.measure.points[place]),
        }
        if other is not None:
            line |= {"other_answer": other.answers[place].text, "other_points": float(other.measure.points[place])}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def write_submission(path: Path, answered: Answered) -> int:
    """What the test server takes, whole or not at all; returns the number of rows.

    Raises:
        UsageError: the benchmark has no server, or takes another kind of file.
    """
    benchmark = answered.benchmark
    rows = benchmark.submission(answered.folder, answered.questions, answered.texts)
    is_table = isinstance(rows, list) and isinstance(rows[0], list)
    ending = ".xlsx" if is_table else ".json"
    if path.suffix != ending:
        raise UsageError(f"{benchmark.name}'s server takes a {ending} file, not {path.name}")
    if is_table:
        _write_spreadsheet(path, rows)
    else:
        write_text(path, json.dumps(rows, ensure_ascii=False))
    return len(rows) - is_table


def _write_spreadsheet(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    try:
        from openpyxl import Workbook
    except ImportError as error:
        raise UsageError(f"{path}: writing .xlsx needs openpyxl: pip install 'acformer[benchmarks]'") from error
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for row in rows:
        sheet.append(row)
    with whole_file(path) as part:
        book.save(part)
