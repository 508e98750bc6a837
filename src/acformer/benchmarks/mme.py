"""MME (Fu et al. 2023): two yes-or-no questions about each image; accuracy, and both right, added up over categories.

LLaVA quotes perception alone (1510.7 for its 7B), the paper perception and cognition (1794.6), as here.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from acformer.benchmarks.answers import Answer, Question
from acformer.benchmarks.benchmark import LMMS_EVAL, Benchmark, ByProtocol, Measure, Texts, ratio
from acformer.benchmarks.records import File, Folder, Record, read_bytes, readable
from acformer.errors import DataError
from acformer.evaluate.scorers import Sums

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
CATEGORIES = (*PERCEPTION, *COGNITION)
YES_OR_NO = "Please answer yes or no."


class Mme(Benchmark):
    """Yes or no, in points: at most 2000 of perception and 800 of cognition."""

    name, column = "mme", "MME"
    metric = "perception + cognition, points"
    protocols = ByProtocol(
        llava="yes or no alone, else yes, then no, in the first four characters; the sum of perception and cognition",
        official="as llava, which runs its script; the script prints the two sums apart",
        lmms_eval="full stops deleted, a single y or n counts, else as llava; it prints the two sums apart",
    )

    def questions(self, folder: Folder) -> list[Question]:
        """The release's folders of categories, or a folder of results (`CATEGORY.txt`), or lmms-eval's table."""
        if table := folder.parquet():
            return _in_pairs(table.questions(_of_table), folder)
        lines = list(_released(folder)) or list(_results(folder))
        if not lines:
            raise DataError(f"{folder.root} has no folders of MME's categories ({', '.join(CATEGORIES[:3])}, ...)")
        return _in_pairs([_question(line) for line in lines], folder)

    def read_answers(self, path: Path) -> list[Answer]:
        """Also the folder of results that its script takes: `CATEGORY.txt`, image, question, truth, answer a line."""
        if not path.is_dir() and path.suffix != ".zip":
            return super().read_answers(path)
        lines = list(_results(Folder(path)))
        if not lines:
            raise DataError(f"{path} has no results of MME's: CATEGORY.txt with image, question, truth, answer")
        return [Answer(line.id, line.answer, line.question) for line in lines]

    def measure(self, questions: Sequence[Question], texts: Texts, protocol: str) -> Measure:
        """See `protocols`."""
        said = [_parse(text, lmms_eval=protocol == LMMS_EVAL) for text in texts]
        right = np.array([word == question.answers[0] for word, question in zip(said, questions, strict=True)])
        rights = Counter(question.id for question, is_right in zip(questions, right, strict=True) if is_right)
        counts = np.zeros((len(questions), len(CATEGORIES), 3))
        for place, question in enumerate(questions):
            both = rights[question.id] == 2
            counts[place, CATEGORIES.index(question.category)] = (1, right[place], both)
        unparsed = [place for place, word in enumerate(said) if word == "other"]
        parts = lambda: _parts(counts.sum(axis=0))  # noqa: E731
        return Measure(counts.reshape(len(questions), -1), _score, right.astype(float), parts, unparsed)


class Line(NamedTuple):
    """A line of a text file; `image` is the stem of its name."""

    category: str
    image: str
    question: str
    truth: str
    answer: str = ""

    @property
    def id(self) -> str:
        """Of the image."""
        return f"{self.category}/{self.image}"


def _released(folder: Folder) -> Iterator[Line]:
    """CATEGORY/IMAGE.txt or CATEGORY/questions_answers_YN/IMAGE.txt: question and truth."""
    for file, path in _text_files(folder):
        category = next((part for part in path.parts[-3:-1][::-1] if part in CATEGORIES), None)
        if category:
            for question, truth in _cells(file, 2):
                yield Line(category, path.stem, question, truth)


def _results(folder: Folder) -> Iterator[Line]:
    """CATEGORY.txt: image, question, truth and answer."""
    for file, path in _text_files(folder):
        if path.stem in CATEGORIES:
            for image, question, truth, answer in _cells(file, 4):
                yield Line(path.stem, PurePosixPath(image).stem, question, truth, answer)


def _text_files(folder: Folder) -> Iterator[tuple[File, PurePosixPath]]:
    for file in folder.files:
        path = PurePosixPath(str(file).replace("\\", "/"))
        if path.suffix == ".txt":
            yield file, path


def _cells(file: File, num: int) -> Iterator[list[str]]:
    """The cells of each line, the truth among them being yes or no."""
    with readable(file):
        lines = read_bytes(file).decode("utf-8-sig").split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            cells = [cell.strip() for cell in line.split("\t")]
            if len(cells) != num or cells[num // 2].lower() not in ("yes", "no"):
                what = "question, yes or no" if num == 2 else "image, question, yes or no, answer"
                raise DataError(f"{file}, line {number}: not {what}, with tabs between")
            yield cells


def _question(line: Line) -> Question:
    return Question(
        id=line.id,
        names=(f"{line.category}/images/{line.image}",),
        text=line.question.removesuffix(YES_OR_NO).strip(),
        image=line.id,
        answers=(line.truth.lower(),),
        category=line.category,
    )


def _of_table(record: Record, load: Callable[[], bytes] | None) -> Question:
    return Question(
        id=record["question_id"],
        text=record["question"].removesuffix(YES_OR_NO).strip(),
        image=record["question_id"],
        answers=(record["answer"].strip().lower(),),
        category=record["category"],
        load=load,
    )


def _in_pairs(questions: list[Question], folder: Folder) -> list[Question]:
    for image, count in Counter(question.id for question in questions).items():
        if count != 2:
            raise DataError(f"{folder.root}: MME asks two questions about an image, but {count} about {image}")
    return questions


def _parse(text: str | None, *, lmms_eval: bool) -> str:
    """yes, no or other."""
    said = (text or "").lower().strip()
    if lmms_eval:
        said = said.replace(".", "")
        if said in ("y", "n"):
            return {"y": "yes", "n": "no"}[said]
    return next((word for word in ("yes", "no") if word in said[:4]), "other")


def _scores(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy, and accuracy+ (both right) over images, of each category."""
    # (..., categories * 3) -> (..., categories, 3) -> three of (..., categories)
    count, right, both = np.moveaxis(sums.reshape(*sums.shape[:-1], len(CATEGORIES), 3), -1, 0)
    return 100 * ratio(right, count), 100 * ratio(both, count)


def _score(sums: Sums) -> np.ndarray:
    return np.sum(_scores(sums), axis=(0, -1))


def _parts(sums: np.ndarray) -> dict[str, Any]:
    accuracy, plus = _scores(sums.reshape(-1))  # (categories, 3) -> (categories * 3,)
    asked = [i for i in range(len(CATEGORIES)) if sums[i, 0]]
    categories = {
        CATEGORIES[i]: {
            "score": float(accuracy[i] + plus[i]),
            "accuracy": float(accuracy[i]),
            "accuracy_plus": float(plus[i]),
        }
        for i in asked
    }
    perception, cognition = (
        sum(part["score"] for name, part in categories.items() if name in names) for names in (PERCEPTION, COGNITION)
    )
    return {
        "perception": perception,
        "cognition": cognition,
        "sum": perception + cognition,
        "categories": categories,
    }
