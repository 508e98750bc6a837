"""ScienceQA (Lu et al. 2022): the letter of one of up to five options; the paper scores the questions with an image."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from acformer.benchmarks.answers import Answer, Question
from acformer.benchmarks.benchmark import LMMS_EVAL, ByProtocol, Measure, Texts, by_group, mean_measure
from acformer.benchmarks.option_letters import LETTERS, OptionLetter, no_letter
from acformer.benchmarks.records import Folder, Record, expecting, read_json, read_records

SENTENCE = re.compile(r"The answer is ([A-Z]).")
"""As in the published script, where the full stop is any character: there must be one."""


class ScienceQA(OptionLetter):
    """Accuracy over the questions with an image; of the others in parts."""

    name, column = "scienceqa", "SQA-img"
    metric = "accuracy over questions with an image, %"
    protocols = ByProtocol(
        llava="a letter alone, or `X. ` at the start, or `The answer is X.` just once; anything else is wrong",
        official="as llava, which extends its script; that guesses where it finds no letter",
        lmms_eval="a letter alone in either case, or a capital and a full stop at the start; anything else is wrong",
    )

    def questions(self, folder: Folder) -> list[Question]:
        """`llava_test_CQM-A.json`; with `problems.json` beside it there are parts by subject. Or lmms-eval's table."""
        if table := folder.parquet():
            return [_of_table(place, *row) for place, row in enumerate(table.questions(lambda *row: row))]
        file = folder.need("llava_test_CQM-A.json")
        problems = folder.find("problems.json")
        with expecting(file, "question file of ScienceQA's"):
            subjects = {key: entry["subject"] for key, entry in read_json(problems).items()} if problems else {}
            return [_question(record, subjects, self.suffix) for record in read_records(file)]

    def answered(self, questions: Sequence[Question], answers: Sequence[Answer]) -> Sequence[Question]:
        """Those with an image may be answered alone, as lmms-eval does."""
        with_image = [question for question in questions if question.image]
        alone = {answer.id for answer in answers} <= {None, *(question.id for question in with_image)}
        return with_image if alone and len(answers) == len(with_image) else questions

    def measure(self, questions: Sequence[Question], texts: Texts, protocol: str) -> Measure:
        """See `protocols`."""
        parse = _lmms_eval_letter if protocol == LMMS_EVAL else _letter
        found = [parse(text or "") for text in texts]
        points = [float(one == question.answers[0]) for one, question in zip(found, questions, strict=True)]
        has_image = [float(bool(question.image)) for question in questions]
        return mean_measure(points, partial(_parts, questions, points), no_letter(found), weights=has_image)


def _question(record: Record, subjects: dict[str, str], suffix: str) -> Question:
    asked, answer = (turn["value"] for turn in record["conversations"][:2])
    text = asked.replace("<image>", "").strip()
    key = str(record["id"])
    return Question(key, text, record.get("image", ""), (answer,), subjects.get(key, ""), text + suffix)


def _of_table(place: int, record: Record, load: Callable[[], bytes] | None) -> Question:
    lines = [f"Context: {record['hint']}"] if record["hint"] else []
    lines += [record["question"], *(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(record["choices"]))]
    has_image = bool(load and load())
    image = str(place) if has_image else ""
    answers = (LETTERS[record["answer"]],)
    subject = record.get("subject", "")
    return Question(str(place), "\n".join(lines), image, answers, subject, load=load if has_image else None)


def _letter(text: str) -> str | None:
    if text in LETTERS and len(text) == 1:
        return text
    if text[:1] in (*LETTERS,) and text[1:3] == ". ":
        return text[0]
    said = SENTENCE.findall(text)
    return said[0] if len(said) == 1 else None


def _lmms_eval_letter(text: str) -> str | None:
    said = text.strip()
    if len(said) == 1:
        return said.upper()
    return said[0] if said[:1].isupper() and said[1:2] == "." else None


def _parts(questions: Sequence[Question], points: Sequence[float]) -> dict[str, Any]:
    groups = ["image" if question.image else "text" for question in questions]
    subjects = [question.category for question in questions]
    parts: dict[str, Any] = {**by_group(points, groups), "all": 100 * sum(points) / len(points)}
    if any(subjects):
        parts["subjects"] = by_group(points, subjects)
    return parts
