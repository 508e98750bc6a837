"""A data set or a file of conversations as a benchmark, so that files of answers to it are scored and compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acformer.benchmarks.answers import Answer, Question
from acformer.benchmarks.benchmark import Benchmark, ByProtocol, Measure, Texts, by_group, is_empty
from acformer.benchmarks.records import Folder
from acformer.evaluate.families import Reply, overall
from acformer.evaluate.report import as_reply, evaluation_samples
from acformer.evaluate.scorers import Sums

AS_EVAL = "as `acformer eval`: the mean of the families' measures, exact match of questions without a family"


class DataSetBenchmark(Benchmark):
    """What `acformer eval` gives under `average`, in per cent; of questions without families its accuracy.

    Args:
        data: as `--data` of `acformer eval`.
        image_root: the folder of a file's images.
    """

    column = metric = "per cent"
    protocols = ByProtocol(llava=AS_EVAL, official=AS_EVAL, lmms_eval=AS_EVAL)

    def __init__(self, data: str, image_root: Path | None = None):
        self.name, self.image_root = data, image_root

    def questions(self, folder: Folder) -> list[Question]:
        """All questions of the data; `folder` is not looked at."""
        replies = map(as_reply, evaluation_samples(self.name, image_root=self.image_root))
        return [
            Question(reply.id, reply.question, reply.image, (reply.answer,), category=reply.kind or "")
            for reply in replies
        ]

    def answered(self, questions: Sequence[Question], answers: Sequence[Answer]) -> Sequence[Question]:
        """Those that `acformer eval --limit` has asked."""
        ids = {answer.id for answer in answers}
        return [question for question in questions if question.id in ids]

    def measure(self, questions: Sequence[Question], texts: Texts, protocol: str) -> Measure:
        """The families' counts side by side, (questions, counts); points are exact matches."""
        replies = [
            Reply(
                question.id, question.image, question.category or None, question.text, question.answers[0], text or ""
            )
            for question, text in zip(questions, texts, strict=True)
        ]
        found, right = overall(replies), [float(reply.right) for reply in replies]

        def score(sums: Sums) -> np.ndarray:
            return 100 * found.score(sums)

        def parts() -> dict[str, Any]:
            kinds = by_group(right, [question.category or "without a kind" for question in questions])
            return {"all_questions": 100 * float(np.mean(right)), "exact_match_by_kind": kinds}

        return Measure(found.rows, score, np.asarray(right), parts, is_empty(texts))
