"""POPE (Li et al. 2023): is a thing in the image, yes or no; F1 of yes, in three samplings of things that are not.

Labels are matched to questions by image and text, not by position as in the published script, which gives 72.1 for
answers worth 85.9 if the labels are of another release (2910 or 3000 rows of the random sampling).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from acformer.benchmarks.answers import Question, some
from acformer.benchmarks.benchmark import LMMS_EVAL, Benchmark, ByProtocol, Measure, Texts, ratio
from acformer.benchmarks.records import File, Folder, Record, expecting, read_records
from acformer.errors import DataError
from acformer.evaluate.scorers import Sums

SAMPLINGS = ("random", "popular", "adversarial")
COUNTS = ("questions", "right", "said yes", "truly yes", "both yes", "said no to yes")


class Pope(Benchmark):
    """Yes or no, scored by F1."""

    name, column = "pope", "POPE"
    metric = "F1 of yes, %"
    protocols = ByProtocol(
        llava="no if the first sentence has the word No, no or not, else yes; the mean of three samplings' F1",
        official="as llava, which took its script over",
        lmms_eval="the answer must be yes or no, or counts for neither; F1 of all questions together",
    )

    def questions(self, folder: Folder) -> list[Question]:
        """`llava_pope_test.jsonl` with `coco_pope_{random,popular,adversarial}.json`, or lmms-eval's table."""
        if table := folder.parquet():
            return table.questions(self._of_table)
        asked = self.llava_questions(folder.need("llava_pope_test.jsonl"))
        labelled: list[Question] = []
        for sampling in SAMPLINGS:
            labels = folder.need(f"coco_pope_{sampling}.json")
            labelled += _with_labels([one for one in asked if one.category == sampling], labels)
        by_id = {question.id: question for question in labelled}
        if others := [question.category for question in asked if question.id not in by_id]:
            raise DataError(f"{folder.root}: a question of the unknown category {others[0]!r}")
        return [by_id[question.id] for question in asked]

    def _of_table(self, record: Record, load: Callable[[], bytes] | None) -> Question:
        return Question(
            id=str(record.get("id", record["question_id"])),
            names=(str(record["question_id"]),),
            text=record["question"],
            image=record["image_source"],
            answers=(record["answer"].strip().lower(),),
            category=record["category"],
            load=load,
        )

    def measure(self, questions: Sequence[Question], texts: Texts, protocol: str) -> Measure:
        """See `protocols`; an answer in which neither was recognised is unparsed, whatever it counts as."""
        strict = protocol == LMMS_EVAL
        counts = np.zeros((len(questions), len(SAMPLINGS), len(COUNTS)))
        points, unparsed = np.zeros(len(questions)), []
        for place, (question, text) in enumerate(zip(questions, texts, strict=True)):
            true = question.answers[0]
            said, recognised = _said(text, true, strict=strict)
            if not recognised:
                unparsed.append(place)
            points[place] = said == true
            yes = true == "yes"
            row = (1, said == true, said == "yes", yes, yes and said == "yes", yes and said == "no")
            counts[place, SAMPLINGS.index(question.category)] = row
        flat = counts.reshape(len(questions), -1)  # (questions, samplings * counts)
        score = _pooled if strict else _mean
        return Measure(flat, score, points, lambda: _parts(counts.sum(axis=0)), unparsed)


def _with_labels(questions: list[Question], file: File) -> list[Question]:
    """The questions of a sampling with their labels; `DataError` if the file is of another release than they are."""
    labels: dict[tuple[str, str], Record] = {}
    records = read_records(file)
    with expecting(file, "label file of POPE's"):
        for record in records:
            if record["label"] not in ("yes", "no"):
                raise DataError(f"{file}: a label is yes or no, not {record['label']!r}")
            labels[record["image"], record["text"]] = record
    asked = {(question.image, question.text) for question in questions}
    if wrong := [f"{image} {text!r}" for image, text in labels.keys() ^ asked]:
        sizes = f"{len(records)} labels to {len(questions)} questions"
        raise DataError(
            f"{file} is of another release than the questions: {sizes}, {len(wrong)} without a counterpart "
            f"({some(sorted(wrong))})"
        )
    return [_labelled(question, labels[question.image, question.text]) for question in questions]


def _labelled(question: Question, label: Record) -> Question:
    return replace(question, answers=(label["label"],), names=(str(label["question_id"]),))


def _said(text: str | None, true: str, *, strict: bool) -> tuple[str, bool]:
    """yes, no or (if strict) neither; whether that was recognised. An image that cannot be read: not what is true."""
    if text is None:
        return {"yes": "no", "no": "yes"}[true], False
    if strict:
        said = text.strip().lower()
        return said, said in ("yes", "no")
    words = text.partition(".")[0].replace(",", "").split(" ")
    if {"No", "not", "no"} & {*words}:
        return "no", True
    return "yes", "yes" in text.lower()


def _f1(sums: Sums) -> np.ndarray:
    """Of the last axis, `COUNTS`. What was neither yes nor no to a yes counts for precision and recall alike: not."""
    said, both, missed = sums[..., 2], sums[..., 4], sums[..., 5]
    precision, recall = ratio(both, said), ratio(both, both + missed)
    return ratio(2 * precision * recall, precision + recall)


def _by_sampling(sums: Sums) -> np.ndarray:
    # (..., samplings * counts) -> (..., samplings, counts)
    return sums.reshape(*sums.shape[:-1], len(SAMPLINGS), len(COUNTS))


def _mean(sums: Sums) -> np.ndarray:
    """Over the samplings that were asked."""
    samplings = _by_sampling(sums)
    asked = samplings[..., 0] > 0
    return 100 * ratio((_f1(samplings) * asked).sum(axis=-1), asked.sum(axis=-1))


def _pooled(sums: Sums) -> np.ndarray:
    return 100 * _f1(_by_sampling(sums).sum(axis=-2))


def _parts(sums: np.ndarray) -> dict[str, Any]:
    """Of each sampling, of all together and their mean."""
    parts = {name: _details(row) for name, row in zip(SAMPLINGS, sums, strict=True) if row[0]}
    mean = {key: float(np.mean([part[key] for part in parts.values()])) for key in _details(sums[0])}
    return {**parts, "mean": mean, "pooled": _details(sums.sum(axis=0))}


def _details(row: np.ndarray) -> dict[str, float]:
    count, right, said, _, both, missed = row
    return {
        "accuracy": float(100 * ratio(right, count)),
        "precision": float(100 * ratio(both, said)),
        "recall": float(100 * ratio(both, both + missed)),
        "f1": float(100 * _f1(row)),
        "yes_ratio": float(100 * ratio(said, count)),
    }
