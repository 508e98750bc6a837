"""Files of answers, whoever wrote them, and which answer belongs to which question.

Known are LLaVA's answers and ScienceQA's output, lmms-eval's sample logs, our own predictions, and what is uploaded to
test servers. An answer without a question, a question without an answer and a second answer are errors that name them.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from acformer.benchmarks.records import Folder, Record, expecting, read_records
from acformer.errors import DataError

LAYOUTS: tuple[tuple[str, str | None, str], ...] = (
    ("question_id", "prompt", "text"),  # LLaVA
    ("id", "question", "prediction"),  # ours
    ("question_id", "question", "pred"),  # the output of ScienceQA's script
    ("index", "question", "prediction"),  # MMBench's upload
    ("questionId", None, "prediction"),  # GQA's upload
    ("question_id", None, "answer"),  # VQAv2's and TextVQA's upload
    ("image", None, "answer"),  # VizWiz's upload
)
"""Fields of an answer's id, of what was asked, and of what was said; the first that a record has all of."""

NUM_NAMED = 5
"""So many ids an error names."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a benchmark.

    id: as its files have it; other files may call it by one of `names`. text: what is asked, without a prompt around
    it. image: the name of its image, "" for none; `load` gives the file's bytes where they lie in a table. answers: the
    right one, or those of ten people; () where they are not published. category: what the score has parts by. prompt:
    LLaVA's, where it is more than `text` and the benchmark's suffix. extra: what this benchmark alone knows.
    """

    id: str
    text: str
    image: str = ""
    answers: tuple[str, ...] = ()
    category: str = ""
    prompt: str = ""
    names: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    load: Callable[[], bytes] | None = None

    @property
    def group(self) -> str:
        """Questions of one group stand or fall together: those about one image."""
        return self.image or self.id


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said to a question, None if its image could not be read; `id` is None where only the order tells."""

    id: str | None
    text: str | None
    prompt: str = ""


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file in the order of its lines; `DataError` for a file that holds none."""
    file = Folder(path).need("*.jsonl", "*.json", "*.xlsx")
    records = read_records(file)
    if len(records) == 1 and records[0].keys() == {"correct", "incorrect"}:  # the output of ScienceQA's script
        records = [record for part in records[0].values() for record in part]
    if not records:
        raise DataError(f"{file} holds no answers")
    with expecting(file, "file of answers"):
        if "filtered_resps" in records[0]:
            return [_of_log(record) for record in sorted(records, key=lambda record: record["doc_id"])]
        layout = next((fields for fields in LAYOUTS if records[0].keys() >= {*filter(None, fields)}), None)
        if layout is None:
            raise DataError(f"{file} is no file of answers: a record has the fields {', '.join(records[0])}")
        return [_of_record(record, *layout) for record in records]


def _of_record(record: Record, id_field: str, prompt_field: str | None, text_field: str) -> Answer:
    text = None if record.get("error") else _text(record[text_field])
    return Answer(_id(record[id_field]), text, str(record[prompt_field] or "") if prompt_field else "")


def _of_log(record: Record) -> Answer:
    """A line of lmms-eval's sample log: its id is in a metric, if anywhere."""
    said, asked = record["filtered_resps"], record.get("input", "")
    while isinstance(said, list):
        said = said[0]
    metrics = [value for value in record.values() if isinstance(value, dict)]
    ids = (metric[name] for metric in metrics for name in ("question_id", "index", "image") if name in metric)
    found = next(ids, None)
    return Answer(None if found is None else _id(found), _text(said).strip(), asked if isinstance(asked, str) else "")


def _text(value: Any) -> str:
    """Spreadsheets and JSON may hold numbers, or nothing."""
    if isinstance(value, list | dict):
        raise TypeError(f"an answer is a text, not {str(value)[:40]}")
    return "" if value is None else str(value)


def _id(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def match(questions: Sequence[Question], answers: Sequence[Answer], where: object) -> list[int]:
    """For each question the place of its answer.

    By id, and by what was asked where an id names several questions (an image's, in TextVQA and MME); without ids by
    order. What was asked must hold the question's words, whatever else it holds.

    Raises:
        DataError: questions without an answer, answers without a question or for the same one, naming the first ids.
    """
    if any(answer.id is None for answer in answers):
        return _match_by_order(questions, answers, where)
    named: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        for name in {_name(question.id), *map(_name, question.names)}:
            named.setdefault(name, []).append(place)
    found: dict[int, int] = {}
    faults = Faults([], [], [], [])
    for place, answer in enumerate(answers):
        candidates = named.get(_name(answer.id or ""), ())
        fitting = [i for i in candidates if asks(answer.prompt, questions[i].text)]
        free = [i for i in fitting if i not in found]
        if free:
            found[free[0]] = place
        else:
            (faults.double if fitting else faults.misfit if candidates else faults.unknown).append(answer.id)
    faults.missing.extend(question.id for place, question in enumerate(questions) if place not in found)
    faults.refuse(where, len(questions))
    return [found[place] for place in range(len(questions))]


def _match_by_order(questions: Sequence[Question], answers: Sequence[Answer], where: object) -> list[int]:
    if len(questions) != len(answers):
        raise DataError(f"{where} has {len(answers)} answers without ids to {len(questions)} questions")
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1):
        if not asks(answer.prompt, question.text):
            raise DataError(f"{where}: answer {number} is to {bare_words(answer.prompt)!r}, not to {question.text!r}")
    return list(range(len(questions)))


class Faults(NamedTuple):
    """Ids of answers and questions that do not fit one another."""

    unknown: list[str | None]
    misfit: list[str | None]
    double: list[str | None]
    missing: list[str]

    def refuse(self, where: object, num_questions: int) -> None:
        """`DataError` if there are any."""
        kinds: dict[str, Sequence[str | None]] = {
            "answers to questions that there are not": self.unknown,
            "answers to a prompt that is not their question's": self.misfit,
            "second answers": self.double,
            f"of {num_questions} questions without an answer": self.missing,
        }
        if found := [f"{len(ids)} {what} ({some(ids)})" for what, ids in kinds.items() if ids]:
            raise DataError(f"{where} has {'; '.join(found)}")


def some(ids: Iterable[Any]) -> str:
    """The first few of them."""
    named = [str(one) for one in ids]
    return ", ".join(named[:NUM_NAMED]) + (", ..." if len(named) > NUM_NAMED else "")


def asks(prompt: str, question: str) -> bool:
    """Whether the prompt holds the question, case and signs aside; a prompt that is not known may."""
    return not prompt or question in prompt or bare_words(question) in bare_words(prompt)


def bare_words(text: str) -> str:
    """Letters and digits, in lower case, with single spaces."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def _name(name: str) -> str:
    """An id without the endings of image files: lmms-eval writes `ID.jpg` for some."""
    while name.endswith((".jpg", ".png")):
        name = name[:-4]
    return name
