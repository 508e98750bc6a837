"""VQAv2 (Goyal et al. 2017): val2014 is scored here, test-dev and test by a server that wants all of test2015."""

from collections.abc import Sequence

from acformer.benchmarks.answers import Question
from acformer.benchmarks.benchmark import ByProtocol, Texts
from acformer.benchmarks.records import Folder, Record
from acformer.benchmarks.vqa import (
    VqaBenchmark,
    evalai_then_official,
    lmms_eval_answer,
    lmms_eval_people,
    official_answer,
    official_people,
    official_questions,
    table_question,
    uploaded,
)
from acformer.errors import DataError

LLAVA_TEST = "llava_vqav2_mscoco_test2015.jsonl"
OFFICIAL_TEST = "v2_OpenEnded_mscoco_test2015_questions.json"


class VqaV2(VqaBenchmark):
    """VQA score by VQA's own evaluation."""

    name, column = "vqav2", "VQAv2"
    protocols = ByProtocol(
        llava="EvalAI's processor over the answer, as LLaVA uploads it, then as official",
        official="punctuation, digits and articles of the answer; of the people's, where they differ, punctuation",
        lmms_eval="punctuation, digits and articles on both sides",
    )
    sides = ByProtocol(
        llava=(evalai_then_official, official_people),
        official=(official_answer, official_people),
        lmms_eval=(lmms_eval_answer, lmms_eval_people),
    )

    def questions(self, folder: Folder) -> list[Question]:
        """val2014's official files; else LLaVA's questions of test-dev or test; else lmms-eval's table."""
        if table := folder.parquet():
            return table.questions(table_question)
        annotated = folder.find("v2_mscoco_val2014_annotations.json", "v2_mscoco_*_annotations.json")
        asked = folder.find("v2_OpenEnded_mscoco_val2014_questions.json", "v2_OpenEnded_mscoco_*_questions.json")
        if annotated is not None:
            return official_questions(folder, asked, annotated)
        if listed := folder.find("llava_vqav2_mscoco_test-dev2015.jsonl", LLAVA_TEST):
            return self.llava_questions(listed)
        return official_questions(folder, asked or folder.need("v2_mscoco_val2014_annotations.json"), None)

    def submission(self, folder: Folder, questions: Sequence[Question], texts: Texts) -> list[Record]:
        """[{question_id, answer}] of all questions of test2015, with "" where they were not asked."""
        said = {question.id: text for question, text in zip(questions, texts, strict=True)}
        if listed := folder.find(LLAVA_TEST):
            whole = self.llava_questions(listed)
        else:
            whole = official_questions(folder, folder.need(OFFICIAL_TEST), None)
        if others := said.keys() - {question.id for question in whole}:
            raise DataError(f"{len(others)} answers are to no question of test2015, {min(others)} among them")
        return uploaded(whole, [said.get(question.id) for question in whole])
