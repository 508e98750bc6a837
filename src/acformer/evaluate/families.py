"""Families of questions, each scored as the benchmark of the paper that it mirrors (Table 7).

A family is what a question's `kind` says before the first `-`. Those that `MEASURES` names are scored, whatever the
data set; a data set with none of them (easy-VQA) has no family scores.

A measure turns each reply into a row of counts and the sum of rows into a score, so that a bootstrap over images
need only add up rows, also for F1 and for circles of questions.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from acformer.evaluate.scorers import (
    Sums,
    bootstrap,
    exact_match,
    first_known,
    most_frequent,
    normalise,
    same_words,
    sum_by_group,
)


@dataclass(frozen=True)
class Reply:
    """A question, its answer and what was said; `image` groups the questions that stand or fall together."""

    id: str
    image: str
    kind: str | None
    question: str
    answer: str
    prediction: str = ""

    @cached_property
    def family(self) -> str:
        """`exist` of `exist-random`; "" without a kind."""
        return (self.kind or "").partition("-")[0]

    @cached_property
    def right(self) -> bool:
        """Exact match."""
        return exact_match(self.prediction, self.answer)


@dataclass(frozen=True)
class Measure:
    """rows: counts of each reply. score: sums of rows -> what ranks models, 0 to 1. details: reported besides."""

    rows: Float[np.ndarray, "replies counts"]
    score: Callable[[Sums], np.ndarray]
    details: Mapping[str, Any] = field(default_factory=dict)

    def by_image(self, replies: Sequence[Reply]) -> "Measure":
        """A row for each image in place of one for each reply."""
        images = [reply.image for reply in replies]
        return replace(self, rows=sum_by_group(self.rows, images, list(dict.fromkeys(images))))


def accuracy(replies: Sequence[Reply]) -> Measure:
    """Exact match (GQA)."""
    return Measure(np.array([[reply.right, 1.0] for reply in replies]), _ratio)


def pope(replies: Sequence[Reply]) -> Measure:
    """F1 with `yes` as the positive, in each sampling (`exist-SAMPLING`) and on average (POPE, Li et al. 2023).

    F1 = 2 both / (said + true): answers that are, said or truly, yes. Saying always yes to balanced questions has F1
    2/3 and accuracy 1/2, so both are reported. Differs from POPE's script in that only the very word `yes` is yes.
    """
    kinds = list(dict.fromkeys(reply.kind for reply in replies))
    rows = np.zeros((len(replies), len(kinds), 5))
    for row, reply in zip(rows, replies, strict=True):
        said, true = normalise(reply.prediction) == "yes", normalise(reply.answer) == "yes"
        row[kinds.index(reply.kind)] = (1, reply.right, said, true, said and true)
    details = {
        (kind or "").partition("-")[2]: _pope_details(sums) for kind, sums in zip(kinds, rows.sum(0), strict=True)
    }
    details["mean"] = {
        name: float(np.mean([of[name] for of in details.values()])) for name in _pope_details(rows[0, 0])
    }

    def score(sums: Sums) -> np.ndarray:
        # (..., kinds * 5) -> (..., kinds, 5) -> five of (..., kinds)
        _, _, said, true, both = np.moveaxis(sums.reshape(*sums.shape[:-1], len(kinds), 5), -1, 0)
        return _safe(2 * both, said + true).mean(axis=-1)

    return Measure(rows.reshape(len(replies), -1), score, details)  # rows (replies, kinds * 5)


def _pope_details(sums: Float[np.ndarray, "5"]) -> dict[str, float]:
    count, right, said, true, both = sums
    pairs = {
        "accuracy": (right, count),
        "precision": (both, said),
        "recall": (both, true),
        "f1": (2 * both, said + true),
        "yes_ratio": (said, count),
    }
    return {name: float(_safe(above, below)) for name, (above, below) in pairs.items()}


def reading(replies: Sequence[Reply]) -> Measure:
    """The same words (`same_words`, a measure of ours: there is one answer, and no VQA score of one); exact match."""
    points = [[float(same_words(reply.prediction, reply.answer)), 1.0] for reply in replies]
    return Measure(np.array(points), _ratio, {"exact_match": _mean_right(replies)})


def circular(replies: Sequence[Reply]) -> Measure:
    """Right only where all orders of the options are (MMBench, Liu et al. 2023); plain accuracy besides.

    The askings of one question are about one image and have ids that end in `/0` to `/3`, the same before that.
    Any other question stands alone: its id may be a path.
    """
    circles = [(reply.image, re.sub(r"/[0-3]\Z", "/", reply.id)) for reply in replies]
    sizes = Counter(circles)
    wrong = {circle for circle, reply in zip(circles, replies, strict=True) if not reply.right}
    # Each asking bears its share, so that the rows of a circle add up to one question.
    rows = [[(circle not in wrong) / sizes[circle], 1 / sizes[circle]] for circle in circles]
    return Measure(np.array(rows), _ratio, {"accuracy": _mean_right(replies)})


MEASURES: dict[str, Callable[[Sequence[Reply]], Measure]] = {
    "exist": pope,
    "relate": accuracy,
    "count": accuracy,
    "attribute": accuracy,
    "read": reading,
    "choose": circular,
}


def family_scores(replies: Sequence[Reply], blind: Sequence[Reply]) -> dict[str, Any]:
    """`families` (score, interval, blind, questions and details of each) and `average` over them; {} if there are none.

    Args:
        replies: the model's.
        blind: to the same questions, from `blind_replies`.
    """
    asked = Counter(reply.family for reply in replies)
    families = [family for family in MEASURES if asked[family]]
    if not families:
        return {}
    model, guess = ([_of_family(family, said).by_image(said) for family in families] for said in (replies, blind))
    scores = {
        family: {**_summary(seen, blindly), "questions": asked[family], **seen.details}
        for family, seen, blindly in zip(families, model, guess, strict=True)
    }
    return {"families": scores, "average": _summary(_mean(model), _mean(guess))}


def overall(replies: Sequence[Reply]) -> Measure:
    """What ranks models, a row for each reply: the mean of the families; exact match where there are none."""
    families = [family for family in MEASURES if any(reply.family == family for reply in replies)]
    return _mean([_of_family(family, replies) for family in families]) if families else accuracy(replies)


def _of_family(family: str, replies: Sequence[Reply]) -> Measure:
    """The measure of a family, with a row of zeros for each reply of another."""
    places = [place for place, reply in enumerate(replies) if reply.family == family]
    measure = MEASURES[family]([replies[place] for place in places])
    rows = np.zeros((len(replies), measure.rows.shape[-1]))
    rows[places] = measure.rows
    return replace(measure, rows=rows)


def _mean(measures: Sequence[Measure]) -> Measure:
    """The mean of the scores: the counts side by side."""
    ends = np.cumsum([measure.rows.shape[-1] for measure in measures])[:-1]

    def score(sums: Sums) -> np.ndarray:
        blocks = np.split(sums, ends, axis=-1)
        # A score (...) of each family's block (..., counts).
        return np.mean([measure.score(block) for measure, block in zip(measures, blocks, strict=True)], axis=0)

    return Measure(np.concatenate([measure.rows for measure in measures], axis=-1), score)


def _summary(measure: Measure, blind: Measure) -> dict[str, Any]:
    return {
        "score": float(measure.score(measure.rows.sum(axis=0))),
        "interval": list(bootstrap(measure.rows, measure.score)),
        "blind": float(blind.score(blind.rows.sum(axis=0))),
    }


def blind_replies(known: Sequence[Reply], asked: Sequence[Reply]) -> list[Reply]:
    """What is answered without looking: the most frequent answer to the same question, else of its family, else of all.

    `known`: the questions that the frequencies are of; what a model may have learnt from, not what it is tested on.
    """
    answers = [reply.answer for reply in known]
    keys = [(reply.question, reply.family, "") for reply in known]
    tables = [most_frequent([key[i] for key in keys], answers) for i in range(3)]
    return [replace(reply, prediction=first_known(tables, (reply.question, reply.family, ""))) for reply in asked]


def _mean_right(replies: Sequence[Reply]) -> float:
    return sum(reply.right for reply in replies) / len(replies)


def _ratio(sums: Sums) -> np.ndarray:
    return _safe(sums[..., 0], sums[..., 1])


def _safe(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """0 where nothing was counted."""
    return np.divide(above, below, out=np.zeros(np.shape(above)), where=np.asarray(below) > 0)
