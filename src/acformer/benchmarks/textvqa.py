"""TextVQA (Singh et al. 2019), the 5,000 questions of val. Whether the prompt holds the OCR tokens decides the score:
LLaVA-1.5 7B has 58.2 with them and 46.1 without.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from acformer.benchmarks.answers import Answer, Question
from acformer.benchmarks.benchmark import ByProtocol, Texts
from acformer.benchmarks.records import File, Folder, Record, expecting, read_json
from acformer.benchmarks.vqa import VqaBenchmark, evalai, evalai_people, uploaded
from acformer.errors import DataError

OCR_HINT = "\nReference OCR token:"


class TextVqa(VqaBenchmark):
    """VQA score with EvalAI's processor on both sides, in every protocol."""

    name, column = "textvqa", "TextVQA"
    protocols = ByProtocol(
        llava="EvalAI's processor on both sides; the prompt holds the OCR tokens",
        official="EvalAI's processor on both sides",
        lmms_eval="as official; no OCR tokens; the question in lower case but for its first letter",
    )
    sides = ByProtocol((evalai, evalai_people), (evalai, evalai_people), (evalai, evalai_people))

    def questions(self, folder: Folder) -> list[Question]:
        """`TextVQA_0.5.1_val.json`, with the prompts of `llava_textvqa_val_v051_ocr.jsonl` if that is there."""
        if table := folder.parquet():
            return table.questions(_question)
        official = folder.find("TextVQA_0.5.1_val.json", "TextVQA_*_val.json", "TextVQA_*_test.json")
        listed = folder.find("llava_textvqa_val_v051_ocr.jsonl")
        if official is None and listed is not None:
            return [_without_hint(question) for question in self.llava_questions(listed)]
        file = official or folder.need("TextVQA_0.5.1_val.json")
        with expecting(file, "file of TextVQA's"):
            questions = [_question(record) for record in read_json(file)["data"]]
        return questions if listed is None else self._with_prompts(questions, listed)

    def _with_prompts(self, questions: list[Question], listed: File) -> list[Question]:
        """In LLaVA's order, with its prompts."""
        known = {(question.image, question.text.lower()): question for question in questions}
        found = []
        for asked in map(_without_hint, self.llava_questions(listed)):
            question = known.get((asked.image, asked.text.lower()))
            if question is None:
                raise DataError(f"{listed}: {asked.id} {asked.text!r} is no question of the truth file's")
            found.append(replace(question, prompt=asked.prompt))
        if len(found) != len(questions):
            raise DataError(f"{listed} has {len(found)} questions, the truth file {len(questions)}")
        return found

    def submission(self, folder: Folder, questions: Sequence[Question], texts: Texts) -> list[Record]:
        """[{question_id, answer}], the ids being TextVQA's own."""
        return uploaded([replace(question, id=question.names[0]) for question in questions], texts)

    def note(self, answers: Sequence[Answer]) -> str:
        """Whether the prompts held the OCR tokens."""
        prompts = [answer.prompt for answer in answers if answer.prompt]
        if not prompts:
            return "the file does not tell whether the prompts held OCR tokens"
        hints = sum(OCR_HINT in prompt for prompt in prompts)
        return f"{hints} of {len(prompts)} prompts held OCR tokens"


def _without_hint(question: Question) -> Question:
    return replace(question, text=question.text.partition(OCR_HINT)[0])


def _question(record: Record, load: Callable[[], bytes] | None = None) -> Question:
    return Question(
        id=record["image_id"],
        names=(str(record["question_id"]),),
        text=record["question"],
        image=f"{record['image_id']}.jpg",
        answers=tuple(record.get("answers") or ()),
        load=load,
    )
