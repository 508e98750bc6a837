"""OKVQA (Marino et al. 2019), val2014: five people, each of whose answers counts twice.

LLaVA has no script for it. The prompt here is that of LLaVA's other short answers; lmms-eval takes VizWiz's, which asks
for `Unanswerable`.
"""

from acformer.benchmarks.answers import Question
from acformer.benchmarks.benchmark import ByProtocol
from acformer.benchmarks.records import Folder
from acformer.benchmarks.vqa import (
    VqaBenchmark,
    evalai,
    evalai_people,
    official_answer,
    official_people,
    official_questions,
    table_question,
)


class OkVqa(VqaBenchmark):
    """VQA score over ten answers."""

    name, column = "okvqa", "OKVQA"
    protocols = ByProtocol(
        llava="EvalAI's processor on both sides, the prompt of LLaVA's short answers (LLaVA itself has no OKVQA)",
        official="VQA's own evaluation, as of VQAv2",
        lmms_eval="EvalAI's processor on both sides; its prompt asks for Unanswerable where the image does not tell",
    )
    sides = ByProtocol(
        llava=(evalai, evalai_people),
        official=(official_answer, official_people),
        lmms_eval=(evalai, evalai_people),
    )

    def questions(self, folder: Folder) -> list[Question]:
        """`mscoco_val2014_annotations.json` and `OpenEnded_mscoco_val2014_questions.json`, or lmms-eval's table."""
        if table := folder.parquet():
            return table.questions(table_question)
        asked = folder.find("OpenEnded_mscoco_val2014_questions.json", "OpenEnded_mscoco_*_questions.json")
        return official_questions(folder, asked, folder.need("mscoco_val2014_annotations.json"))
