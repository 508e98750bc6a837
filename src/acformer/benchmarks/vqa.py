"""What TextVQA, VQAv2, VizWiz and OKVQA have in common: the answers of ten people, and the VQA score."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from acformer.benchmarks.answers import Question, some
from acformer.benchmarks.benchmark import Benchmark, ByProtocol, Measure, Texts, by_group, is_empty, mean_measure
from acformer.benchmarks.records import File, Folder, Record, expecting, read_json
from acformer.benchmarks.vqa_processor import (
    EVALAI_COMMA,
    digits_and_articles,
    evalai,
    official_answer,
    one_line,
    punctuation,
    vqa_score,
)
from acformer.errors import DataError

People = tuple[str, ...]
Sides = tuple[Callable[[str], str], Callable[[People], People]]
"""What is done to a model's answer, and to those of the people."""


def evalai_people(people: People) -> People:
    """EvalAI's processor over all."""
    return tuple(map(evalai, people))


def official_people(people: People) -> People:
    """What VQA's evaluation does: punctuation alone, and only where they are not all of one mind."""
    return people if len(set(people)) == 1 else tuple(map(punctuation, people))


def evalai_then_official(text: str) -> str:
    """What LLaVA uploads, as the server reads it."""
    return official_answer(evalai(text))


def lmms_eval_answer(text: str) -> str:
    """What lmms-eval does to both sides of VQAv2."""
    return digits_and_articles(punctuation(one_line(text), EVALAI_COMMA))


def lmms_eval_people(people: People) -> People:
    """`lmms_eval_answer` of all."""
    return tuple(map(lmms_eval_answer, people))


class VqaBenchmark(Benchmark):
    """Scored by agreement with people; a subclass says what its protocols do to both sides."""

    metric = "VQA score, %"
    sides: ClassVar[ByProtocol[Sides]]

    def measure(self, questions: Sequence[Question], texts: Texts, protocol: str) -> Measure:
        """See `protocols`; an empty answer is unparsed."""
        answer, people = self.sides[protocol]
        points = [
            0.0 if text is None else vqa_score(answer(text), people(question.answers))
            for question, text in zip(questions, texts, strict=True)
        ]
        return mean_measure(points, partial(_parts, questions, points), is_empty(texts))


def _parts(questions: Sequence[Question], points: Sequence[float]) -> dict[str, Any]:
    """By what people answered (yes/no, number, other, unanswerable) and by how the question begins."""
    groups = {
        "answer_type": [question.category for question in questions],
        "question_type": [question.extra.get("question_type", "") for question in questions],
    }
    return {name: by_group(points, names) for name, names in groups.items() if any(names)}


def official_questions(folder: Folder, asked: File | None, annotated: File | None) -> list[Question]:
    """The questions of VQA's own files: `{"questions": [...]}` and, if published, `{"annotations": [...]}`."""
    annotations: dict[str, Record] = {}
    if annotated is not None:
        with expecting(annotated, "annotation file of VQA's"):
            value = read_json(annotated, _only_the_answer)
            subset = value.get("data_subtype", "")
            annotations = {str(entry["question_id"]): entry for entry in value["annotations"]}
    if asked is not None:
        with expecting(asked, "question file of VQA's"):
            value = read_json(asked)
            subset = value.get("data_subtype", "")
            entries = {str(entry["question_id"]): entry for entry in value["questions"]}
    else:
        entries = annotations
    if annotations and (others := entries.keys() ^ annotations.keys()):
        raise DataError(f"{annotated} and {asked} differ in {len(others)} questions ({some(sorted(others))})")
    with expecting(annotated or asked or folder.root, "file of VQA's"):
        return [_question(key, entry, annotations.get(key, {}), subset) for key, entry in entries.items()]


def _only_the_answer(entry: Record) -> Any:
    """Ten people to each of 200,000 questions: of each only what they said is kept."""
    return entry["answer"] if "answer_confidence" in entry else entry


def _question(key: str, entry: Record, annotation: Record, subset: str) -> Question:
    return Question(
        id=key,
        text=entry.get("question", ""),
        image=f"COCO_{subset}_{entry['image_id']:012d}.jpg",
        answers=tuple(annotation.get("answers", ())),
        category=annotation.get("answer_type", ""),
        extra={"question_type": annotation["question_type"]} if "question_type" in annotation else {},
    )


def table_question(record: Record, load: Callable[[], bytes] | None) -> Question:
    """A row of VQAv2, VizWiz or OKVQA as lmms-eval reads them."""
    people = record.get("answers") or ()
    return Question(
        id=str(record["question_id"]),
        text=record["question"],
        image=str(record.get("image_id") or record["question_id"]),
        answers=tuple(one["answer"] if isinstance(one, dict) else one for one in people),
        category=record.get("answer_type") or record.get("category") or "",
        extra={"question_type": record["question_type"]} if record.get("question_type") else {},
        load=load,
    )


def uploaded(questions: Sequence[Question], texts: Texts) -> list[Record]:
    """[{question_id, answer}] of all questions, which VQAv2's and TextVQA's servers take."""
    return [
        {"question_id": int(question.id), "answer": evalai(text or "")}
        for question, text in zip(questions, texts, strict=True)
    ]
