"""GQA (Hudson and Manning 2019): one right answer, and the answer must be that word for word."""

import string
from collections.abc import Callable, Sequence
from typing import Any

from acformer.benchmarks.answers import Question
from acformer.benchmarks.benchmark import (
    LLAVA,
    LMMS_EVAL,
    OFFICIAL,
    Benchmark,
    ByProtocol,
    Measure,
    Texts,
    by_group,
    is_empty,
    mean_measure,
)
from acformer.benchmarks.records import Folder, Record, expecting, read_json
from acformer.errors import DataError

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Gqa(Benchmark):
    """Exact match."""

    name, column = "gqa", "GQA"
    metric = "exact match, %"
    protocols = ByProtocol(
        llava="lower case, no full stop at the end; then equal to the answer",
        official="equal to the answer as it is",
        lmms_eval="lower case and no punctuation anywhere, in answer and truth; then equal",
    )

    def questions(self, folder: Folder) -> list[Question]:
        """`testdev_balanced_questions.json` in the order of `llava_gqa_testdev_balanced.jsonl` if that is there."""
        if table := folder.parquet():
            return table.questions(lambda record, load: _question(str(record["id"]), record, load))
        asked = folder.find("llava_gqa_testdev_balanced.jsonl")
        truth = folder.find("testdev_balanced_questions.json", "testdev_all_questions.json")
        if truth is None and asked is not None:
            return self.llava_questions(asked)
        file = truth or folder.need("testdev_balanced_questions.json")
        with expecting(file, "question file of GQA's"):
            entries = read_json(file)
            balanced = {key: entry for key, entry in entries.items() if entry.get("isBalanced", True)}
            order = [question.id for question in self.llava_questions(asked)] if asked else list(balanced)
            if others := set(order) ^ balanced.keys():
                raise DataError(f"{file} and {asked} differ in {len(others)} questions, {min(others)} among them")
            return [_question(key, balanced[key]) for key in order]

    def measure(self, questions: Sequence[Question], texts: Texts, protocol: str) -> Measure:
        """See `protocols`."""
        points = [
            float(text is not None and _plain(text, protocol) == _truth(question.answers[0], protocol))
            for question, text in zip(questions, texts, strict=True)
        ]
        return mean_measure(points, lambda: _parts(questions, points), is_empty(texts))

    def submission(self, folder: Folder, questions: Sequence[Question], texts: Texts) -> list[Record]:
        """`testdev_balanced_predictions.json` for the official script."""
        return [
            {"questionId": question.id, "prediction": _plain(text or "", LLAVA)}
            for question, text in zip(questions, texts, strict=True)
        ]


def _plain(text: str, protocol: str) -> str:
    if protocol == LLAVA:
        return text.rstrip(".").lower()
    return text if protocol == OFFICIAL else _truth(text, protocol)


def _truth(answer: str, protocol: str) -> str:
    return answer.lower().translate(NO_PUNCTUATION) if protocol == LMMS_EVAL else answer


def _question(key: str, entry: Record, load: Callable[[], bytes] | None = None) -> Question:
    types = entry.get("types") or {}
    return Question(
        id=key,
        text=entry["question"],
        image=f"{entry['imageId']}.jpg",
        answers=(entry["answer"],) if "answer" in entry else (),
        category="open" if types.get("structural") == "query" else "binary" if types else "",
        extra={"structural": types.get("structural") or "", "semantic": types.get("semantic") or ""},
        load=load,
    )


def _parts(questions: Sequence[Question], points: Sequence[float]) -> dict[str, Any]:
    """Binary (yes or no, or a choice) and open questions, and finer; length is the question's in words."""
    groups = {
        "type": [question.category for question in questions],
        "structural": [question.extra.get("structural", "") for question in questions],
        "semantic": [question.extra.get("semantic", "") for question in questions],
        "length": [f"{len(question.text.split()):2} words" for question in questions],
    }
    return {name: by_group(points, names) for name, names in groups.items() if any(names)}
