"""What a benchmark is: its questions, LLaVA's prompt for them, and the measure of answers to them.

A benchmark of your own is a subclass, an instance of it and an entry point; see CONTRIBUTING.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from acformer.benchmarks.answers import Answer, Question, read_answers
from acformer.benchmarks.blind import blind_texts
from acformer.benchmarks.records import File, Folder, expecting, read_records
from acformer.errors import UsageError
from acformer.evaluate.scorers import Sums

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."

PROTOCOLS = LLAVA, LMMS_EVAL, OFFICIAL = ("llava", "lmms-eval", "official")
T = TypeVar("T")

Texts = Sequence[str | None]
"""Answers in the order of their questions; None where an image could not be read, which is wrong by any measure."""


@dataclass(frozen=True)
class ByProtocol(Generic[T]):
    """Something of each of `PROTOCOLS`."""

    llava: T
    official: T
    lmms_eval: T

    def __getitem__(self, protocol: str) -> T:
        return getattr(self, protocol.replace("-", "_"))


@dataclass(frozen=True)
class Measure:
    """What answers are worth.

    counts: (questions, counts), of each answer. score: sums of counts -> the score in the paper's unit. points: of each
    question, 0 to 1. parts: the score in parts, computed when asked for. unparsed: the places of answers in which
    nothing was recognised. units: what `points` are of, where that is several questions (MMBench's rotations).
    """

    counts: np.ndarray
    score: Callable[[Sums], np.ndarray]
    points: np.ndarray
    parts: Callable[[], dict[str, Any]]
    unparsed: Sequence[int] = ()
    units: Sequence[str] | None = None


class Benchmark(ABC):
    """One of the benchmarks. Scores are in the unit of the paper: per cent, MME in points."""

    name: str
    column: ClassVar[str]
    """Its name in the paper's tables."""
    metric: ClassVar[str]
    """What the score is, in words."""
    suffix: ClassVar[str] = SHORT_ANSWER
    """What LLaVA appends to a question."""
    max_new_tokens: ClassVar[int] = 128
    protocols: ClassVar[ByProtocol[str]]
    """What each of them does to answers, in a sentence."""

    @abstractmethod
    def questions(self, folder: Folder) -> list[Question]:
        """The questions in a folder of its published files, with the right answers if they are there.

        Raises:
            DataError: a file that is missing or none of its own, or files that do not fit one another.
        """

    @abstractmethod
    def measure(self, questions: Sequence[Question], texts: Texts, protocol: str) -> Measure:
        """What the answers are worth under one of `PROTOCOLS`."""

    def prompt(self, question: Question) -> str:
        """What a model is asked, without a chat template around it."""
        return question.prompt or question.text + self.suffix

    def read_answers(self, path: Path) -> list[Answer]:
        """A file of answers, in any layout that is known."""
        return read_answers(path)

    def answered(self, questions: Sequence[Question], answers: Sequence[Answer]) -> Sequence[Question]:
        """The questions that the answers are to, where a published part of them may be answered alone."""
        return questions

    def blind_texts(self, questions: Sequence[Question]) -> list[str]:
        """An answer to each question, given without a look at its image."""
        return blind_texts(questions)

    def not_scored_because(self, questions: Sequence[Question], texts: Texts) -> str:
        """Why there is no score; "" if there is one."""
        if all(question.answers for question in questions):
            return ""
        return "the right answers are not published: --submission writes what the test server takes"

    def submission(self, folder: Folder, questions: Sequence[Question], texts: Texts) -> Any:
        """What the test server takes: a value that is written as JSON, or rows of a table, the first its head."""
        raise UsageError(f"{self.name} has no test server that takes a file of answers")

    def note(self, answers: Sequence[Answer]) -> str:
        """What else of the protocol shows in the answers; "" for nothing."""
        return ""

    def llava_questions(self, file: File) -> list[Question]:
        """A question file of LLaVA's: JSON lines with question_id, image and text, which is the prompt."""
        with expecting(file, "question file of LLaVA's"):
            return [
                Question(
                    id=str(record["question_id"]),
                    text=record["text"].removesuffix(self.suffix),
                    image=record["image"],
                    category=record.get("category", ""),
                    prompt=record["text"],
                )
                for record in read_records(file)
            ]


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """0 where nothing was counted."""
    return np.divide(above, below, out=np.zeros(np.shape(above)), where=np.asarray(below) > 0)


def percent(sums: Sums) -> np.ndarray:
    """100 x the first count over the second."""
    return 100 * ratio(sums[..., 0], sums[..., 1])


def mean_measure(
    points: Sequence[float],
    parts: Callable[[], dict[str, Any]],
    unparsed: Sequence[int] = (),
    *,
    weights: Sequence[float] | None = None,
    units: Sequence[str] | None = None,
) -> Measure:
    """100 x the mean of the points, each with its weight (1 each by default)."""
    array = np.asarray(points, dtype=float)
    each = np.ones(len(array)) if weights is None else np.asarray(weights, dtype=float)
    return Measure(np.stack([array * each, each], axis=1), percent, array, parts, unparsed, units)  # (questions, 2)


def by_group(points: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """100 x the mean of the points of each group, in order of their names."""
    sums: dict[str, list[float]] = {}
    for group, point in zip(groups, points, strict=True):
        entry = sums.setdefault(group, [0.0, 0])
        entry[0] += point
        entry[1] += 1
    return {group: float(100 * total / count) for group, (total, count) in sorted(sums.items())}


def is_empty(texts: Texts) -> list[int]:
    """The places of answers that say nothing."""
    return [place for place, text in enumerate(texts) if not (text or "").strip()]
