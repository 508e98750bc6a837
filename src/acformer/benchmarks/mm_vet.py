"""MM-Vet (Yu et al. 2023): open answers, graded 0 to 1 by GPT-4; here the upload for the grader, and sums of grades.

The paper takes the mean of five runs of the grader. lmms-eval asks another judge, after a prompt that wants reasoning:
its grades are not comparable.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acformer.benchmarks.answers import Answer, Question
from acformer.benchmarks.benchmark import (
    Benchmark,
    ByProtocol,
    Measure,
    Texts,
    mean_measure,
)
from acformer.benchmarks.records import Folder, Record, expecting, read_json, read_records
from acformer.errors import DataError

NUM_QUESTIONS = 218
GRADES = "grades:"
"""Begins what stands for an answer in a file of grades."""


class MMVet(Benchmark):
    """Grades of open answers."""

    name, column = "mm_vet", "MM-Vet"
    metric = "mean grade of a judge, %"
    suffix = ""
    max_new_tokens = 1024
    protocols = ByProtocol(
        llava="the mean of the grades in the file, over its runs of the judge",
        official="as llava",
        lmms_eval="as llava; its judge and its prompt are others, so that grades are not comparable",
    )

    def questions(self, folder: Folder) -> list[Question]:
        """`llava-mm-vet.jsonl`, `mm-vet.json` (which knows the capabilities) or both, lmms-eval's table, or none."""
        if table := folder.parquet():
            return table.questions(_of_table)
        asked, official = folder.find("llava-mm-vet.jsonl"), folder.find("mm-vet.json")
        known: Record = {}
        if official is not None:
            with expecting(official, "file of MM-Vet's"):
                known = read_json(official)
                questions = [_official(key, entry) for key, entry in known.items()]
        if asked is not None:
            questions = [
                _with_capability(one, known.get(_official_id(one.id), {})) for one in self.llava_questions(asked)
            ]
        elif official is None:
            questions = [Question(f"v1_{number}", "") for number in range(NUM_QUESTIONS)]
        return questions

    def read_answers(self, path: Path) -> list[Answer]:
        """Also a file of grades ({id: {score: [...]}}) or of answers ({id: text}), and lmms-eval's log of grades."""
        file = Folder(path).need("*.json", "*.jsonl")
        records = read_records(file)
        with expecting(file, "file of answers or grades of MM-Vet's"):
            first = records[0] if records else {}
            if len(records) == 1 and not {"text", "prediction", "filtered_resps"} & first.keys():
                return [Answer(key, _graded(key, value)) for key, value in first.items()]
            if "gpt_eval_score" in first:
                judged = [record["gpt_eval_score"] for record in records]
                return [Answer(one["question_id"], _graded(one["question_id"], one)) for one in judged]
        return super().read_answers(path)

    def measure(self, questions: Sequence[Question], texts: Texts, protocol: str) -> Measure:
        """Of grades, each text being `GRADES` and the grades of all runs."""
        grades = [[float(grade) for grade in (text or "").removeprefix(GRADES).split()] for text in texts]
        if len({len(runs) for runs in grades}) > 1:
            raise DataError("the questions were not graded equally often")
        runs = np.array(grades)
        return mean_measure(runs.mean(axis=1), lambda: _parts(questions, runs))

    def not_scored_because(self, questions: Sequence[Question], texts: Texts) -> str:
        """Answers are graded elsewhere first."""
        if all((text or "").startswith(GRADES) for text in texts):
            return ""
        return "MM-Vet's judge must grade these answers: --submission writes them for it, then score its file of grades"

    def submission(self, folder: Folder, questions: Sequence[Question], texts: Texts) -> dict[str, str]:
        """{v1_0: answer, ...}, which MM-Vet's judge takes."""
        if not self.not_scored_because(questions, texts):
            raise DataError("these are grades, not answers: there is nothing to submit")
        return {_official_id(question.id): text or "" for question, text in zip(questions, texts, strict=True)}


def _official_id(name: str) -> str:
    """LLaVA numbers the questions 0, 1, ..."""
    return name if name.startswith("v1_") else f"v1_{name}"


def _official(key: str, entry: Record) -> Question:
    question = Question(key, entry["question"], entry.get("imagename", ""), names=(key.removeprefix("v1_"),))
    return _with_capability(question, entry)


def _of_table(record: Record, load: Callable[[], bytes] | None) -> Question:
    question = Question(record["question_id"], record["question"], record["question_id"], load=load)
    return _with_capability(question, {"capability": record["capability"].split(",")})


def _with_capability(question: Question, entry: Record) -> Question:
    return Question(
        id=question.id,
        text=question.text,
        image=question.image,
        names=(*question.names, _official_id(question.id)),
        category="+".join(sorted(entry.get("capability", ()))),
        load=question.load,
    )


def _graded(key: str, value: Any) -> str:
    """The text itself, or `GRADES` and the grades."""
    if isinstance(value, str):
        return value
    score = value["score"]
    grades = [float(grade) for grade in (score if isinstance(score, list) else [score])]
    if not grades or not all(0 <= grade <= 1 for grade in grades):
        raise DataError(f"the grades of {key} are not from 0 to 1: {score}")
    return " ".join([GRADES, *map(str, grades)])


def _parts(questions: Sequence[Question], runs: np.ndarray) -> dict[str, Any]:
    """runs: (questions, runs)."""
    of_runs = 100 * runs.mean(axis=0)
    parts: dict[str, Any] = {"runs": [float(mean) for mean in of_runs], "standard_deviation": float(of_runs.std())}
    capabilities, combinations = defaultdict(list), defaultdict(list)
    for question, grade in zip(questions, 100 * runs.mean(axis=1), strict=True):
        if question.category:
            combinations[question.category].append(grade)
            for capability in question.category.split("+"):
                capabilities[capability].append(grade)
    for name, groups in (("capabilities", capabilities), ("combinations", combinations)):
        if groups:
            parts[name] = {group: float(np.mean(grades)) for group, grades in sorted(groups.items())}
    return parts
