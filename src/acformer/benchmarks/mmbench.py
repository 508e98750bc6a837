"""MMBench (Liu et al. 2023): a question is right if its answer is in every rotation of its options.

The server asks ChatGPT which option an answer means where no rule tells; here such an answer is unparsed, and wrong.
LLaVA's answers are bare letters, for which both are the same.
"""

import base64
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from acformer.benchmarks.answers import Question
from acformer.benchmarks.benchmark import LMMS_EVAL, ByProtocol, Measure, Texts, by_group, mean_measure
from acformer.benchmarks.option_letters import OptionLetter, letter_by_rules, likely_letter, no_letter
from acformer.benchmarks.records import Folder, Record, expecting, plain_name, read_records
from acformer.errors import DataError

ROTATION = 10**6
"""A rotated copy has the index of its question and a multiple of this."""
OPTION_LETTER_CHINESE = "\n请直接回答选项字母。"
NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")


class MMBench(OptionLetter):
    """Circular evaluation of options."""

    name, column = "mmbench", "MMB"
    metric = "right in every rotation of the options, %"
    protocols = ByProtocol(
        llava="what MMBench's rules find; where they find none its server asks ChatGPT, and here it is wrong",
        official="as llava, which leaves it to the server",
        lmms_eval="as mmbench_en_dev_static: where MMBench's rules find none, the likeliest letter in the answer",
    )

    def questions(self, folder: Folder) -> list[Question]:
        """`mmbench_*.tsv`, or a table that was uploaded (`*.xlsx`), or lmms-eval's."""
        if table := folder.parquet():
            return table.questions(partial(_question, suffix=self.suffix))
        file = folder.need("mmbench_dev_2*.tsv", "mmbench_*.tsv", "*.tsv", "*.xlsx")
        suffix = OPTION_LETTER_CHINESE if "_cn" in plain_name(file) else self.suffix
        with expecting(file, "table of MMBench's"):
            records = read_records(file)
            images = {str(record["index"]): record.get("image") for record in records} if folder.images else {}
            return [_question(record, _loader(images, record["index"]), suffix=suffix) for record in records]

    def measure(self, questions: Sequence[Question], texts: Texts, protocol: str) -> Measure:
        """See `protocols`."""
        found = [_letter(question, text, protocol) for question, text in zip(questions, texts, strict=True)]
        right = [letter == question.answers[0] for letter, question in zip(found, questions, strict=True)]
        circles = [question.group for question in questions]
        sizes = Counter(circles)
        wrong = {circle for circle, is_right in zip(circles, right, strict=True) if not is_right}
        points = [float(circle not in wrong) for circle in circles]
        shares = [1 / sizes[circle] for circle in circles]
        parts = partial(_parts, questions, right, points)
        return mean_measure(points, parts, no_letter(found), weights=shares, units=circles)

    def submission(self, folder: Folder, questions: Sequence[Question], texts: Texts) -> list[list[Any]]:
        """The table without what the server knows, with the column `prediction` where LLaVA puts it."""
        columns = [name for name in questions[0].extra["row"] if name.lower() not in (*NOT_UPLOADED, "prediction")]
        head = [*columns[:6], "prediction", *columns[6:]]
        rows = [question.extra["row"] | {"prediction": text} for question, text in zip(questions, texts, strict=True)]
        return [head, *([_cell(name, row[name]) for name in head] for row in rows)]


def _question(record: Record, load: Callable[[], bytes] | None, *, suffix: str) -> Question:
    index = int(record["index"])
    options = {letter: str(record[letter]) for letter in "ABCDE" if not _is_nothing(record.get(letter))}
    if _is_nothing(record["question"]) or not options:
        raise DataError(f"question {index} has no options")
    hint = "" if _is_nothing(record.get("hint")) else f"{record['hint']}\n"
    lines = [f"{hint}{record['question']}", *(f"{letter}. {option}" for letter, option in options.items())]
    answer = record.get("answer")
    return Question(
        id=str(index),
        text=str(record["question"]),
        image=str(index % ROTATION),
        answers=() if _is_nothing(answer) else (str(answer),),
        category=str(record.get("category") or ""),
        prompt="\n".join(lines) + suffix,
        extra={
            "options": options,
            "l2": record.get("l2-category") or record.get("L2-category") or "",
            "row": {name: value for name, value in record.items() if name != "image"},
        },
        load=load,
    )


def _loader(images: dict[str, Any], index: Any) -> Callable[[], bytes] | None:
    """The image of a row; one that is a number is that of the row with this index."""
    image = images.get(str(index))
    if image and len(image) < 64 and image.isdigit():
        image = images.get(image)
    return partial(base64.b64decode, image) if image else None


def _is_nothing(value: Any) -> bool:
    """What a table has where there is nothing."""
    return value is None or value != value or str(value).strip().lower() in ("", "nan", "none")


def _letter(question: Question, text: str | None, protocol: str) -> str | None:
    options = {letter: option for letter, option in question.extra["options"].items() if letter != "E"}
    letter = letter_by_rules(text or "", options)
    if letter is None and protocol == LMMS_EVAL:
        letter = likely_letter(text or "", sorted(options))
    return letter


def _parts(questions: Sequence[Question], right: Sequence[bool], points: Sequence[float]) -> dict[str, Any]:
    """One round: the questions as they are asked first. Categories: circular, where the table has them."""
    first = [place for place, question in enumerate(questions) if int(question.id) < ROTATION]
    parts: dict[str, Any] = {
        "one_round": 100 * sum(right[place] for place in first) / max(1, len(first)),
        "circular": 100 * float(np.mean([points[place] for place in first])) if first else 0.0,
    }
    for name, category in (("categories", lambda one: one.category), ("l2_categories", lambda one: one.extra["l2"])):
        groups = [category(questions[place]) for place in first]
        if any(groups):
            parts[name] = by_group([points[place] for place in first], groups)
    return parts


def _cell(name: str, value: Any) -> Any:
    """As pandas writes it: an index is a number, nothing an empty cell."""
    if _is_nothing(value):
        return None
    return int(value) if name == "index" else value
