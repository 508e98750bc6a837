"""A data set or a file of conversations as a benchmark, so that files of answers to it are scored and compared."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from acformer.benchmarks.answers import Answer, Question
from acformer.benchmarks.benchmark import Benchmark, ByProtocol, Measure, Texts, by_group, is_empty
from acformer.benchmarks.records import Folder
from acformer.data.samples import Sample
from acformer.evaluate.families import Reply, blind_replies, overall
from acformer.evaluate.report import as_reply, evaluation_samples, training_questions
from acformer.evaluate.scorers import Sums

AS_EVAL = "as `acformer eval`: the mean of the families' measures, exact match of questions without a family"


class DataSetBenchmark(Benchmark):
    """What `acformer eval` gives under `average`, in per cent; of questions without families its accuracy.

    Args:
        data: as `--data` of `acformer eval`.
        num_answers: how many of its questions were asked, from the first on (`acformer eval --limit`).
        image_root: the folder of a file's images.
    """

    column, metric = "", "per cent"
    protocols = ByProtocol(llava=AS_EVAL, official=AS_EVAL, lmms_eval=AS_EVAL)

    def __init__(self, data: str, num_answers: int, image_root: Path | None = None):
        self.name, self.num_answers, self.image_root = data, num_answers, image_root

    def questions(self, folder: Folder) -> list[Question]:
        """Those that were asked; `folder` is not looked at."""
        return [_question(sample) for sample in evaluation_samples(self.name, self.num_answers, self.image_root)]

    def read_answers(self, path: Path) -> list[Answer]:
        """Of a file that answers more of the questions those that are asked here."""
        return super().read_answers(path)[: self.num_answers]

    def note(self, answers: Sequence[Answer]) -> str:
        """How many questions there are is not known without all of the data."""
        return f"answers to the first {self.num_answers:,} questions"

    def blind_texts(self, questions: Sequence[Question]) -> list[str]:
        """Learnt from the data's own training questions, where it has some."""
        replies = _replies(questions, [""] * len(questions))
        return [reply.prediction for reply in blind_replies(training_questions(self.name) or replies, replies)]

    def measure(self, questions: Sequence[Question], texts: Texts, protocol: str) -> Measure:
        """The families' counts side by side, (questions, counts); points are exact matches."""
        replies = _replies(questions, texts)
        found, right = overall(replies), [float(reply.right) for reply in replies]

        def score(sums: Sums) -> np.ndarray:
            return 100 * found.score(sums)

        def parts() -> dict[str, Any]:
            kinds = [question.category for question in questions]
            by_kind = by_group(right, [kind or "none" for kind in kinds])
            return {"exact_match": 100 * float(np.mean(right)), **({"by_kind": by_kind} if any(kinds) else {})}

        return Measure(found.rows, score, np.asarray(right), parts, is_empty(texts))


def _question(sample: Sample) -> Question:
    reply = as_reply(sample)
    # Of bytes, as they lie in tables, a digest: the name is written for every question.
    names = [sha256(image).hexdigest() if isinstance(image, bytes) else str(image) for image in sample.images]
    return Question(reply.id, reply.question, ", ".join(names), (reply.answer,), category=reply.kind or "")


def _replies(questions: Sequence[Question], texts: Texts) -> list[Reply]:
    return [
        Reply(question.id, question.group, question.category or None, question.text, question.answers[0], text or "")
        for question, text in zip(questions, texts, strict=True)
    ]
