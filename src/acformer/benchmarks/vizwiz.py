"""VizWiz (Gurari et al. 2018): blind people's questions; `unanswerable` is an answer like any other.

val is scored here, test by a server. Its second task, whether a question can be answered, needs a score of its own and
is not here.
"""

from collections.abc import Callable, Sequence

from acformer.benchmarks.answers import Question
from acformer.benchmarks.benchmark import SHORT_ANSWER, ByProtocol, Texts
from acformer.benchmarks.records import Folder, Record, expecting, read_records
from acformer.benchmarks.vqa import (
    People,
    VqaBenchmark,
    evalai,
    evalai_people,
    evalai_then_official,
    official_answer,
    table_question,
)


def as_they_are(people: People) -> People:
    """VizWiz's evaluation leaves the people's answers alone."""
    return people


class VizWiz(VqaBenchmark):
    """VQA score against answers as people typed them."""

    name, column = "vizwiz", "VizWiz"
    suffix = f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT_ANSWER}"
    protocols = ByProtocol(
        llava="EvalAI's processor over the answer, as LLaVA uploads it, then as official",
        official="punctuation, digits and articles of the answer; the people's as they are",
        lmms_eval="EvalAI's processor on both sides",
    )
    sides = ByProtocol(
        llava=(evalai_then_official, as_they_are),
        official=(official_answer, as_they_are),
        lmms_eval=(evalai, evalai_people),
    )

    def questions(self, folder: Folder) -> list[Question]:
        """`val.json`, else LLaVA's `llava_test.jsonl` or `test.json`, whose answers are not published."""
        if table := folder.parquet():
            return table.questions(_of_table)
        if (annotated := folder.find("val.json")) is None and (listed := folder.find("llava_test.jsonl")):
            return self.llava_questions(listed)
        file = annotated or folder.need("val.json", "test.json")
        with expecting(file, "annotation file of VizWiz's"):
            return [_question(record) for record in read_records(file)]

    def submission(self, folder: Folder, questions: Sequence[Question], texts: Texts) -> list[Record]:
        """[{image, answer}]."""
        pairs = zip(questions, texts, strict=True)
        return [{"image": question.image, "answer": evalai(text or "")} for question, text in pairs]


def _question(record: Record) -> Question:
    image = record["image"]
    number = image.removesuffix(".jpg").rpartition("_")[2]
    return Question(
        id=image,
        names=(str(int(number)),) if number.isdigit() else (),
        text=record["question"],
        image=image,
        answers=tuple(entry["answer"] for entry in record.get("answers", ())),
        category=record.get("answer_type", ""),
    )


def _of_table(record: Record, load: Callable[[], bytes] | None) -> Question:
    return table_question({**record, "image_id": record["question_id"]}, load)
