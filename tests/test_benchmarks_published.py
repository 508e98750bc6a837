"""Answers that LLaVA-1.5's authors published score what they published, to the digit.

The files are not in this repository: the tests run where `$ACFORMER_SHARED` (default `../shared`) has them.
"""

import json
import os
import time
from io import BytesIO
from pathlib import Path

import pytest
from openpyxl import load_workbook

from acformer.benchmarks.score import read_answered, score_answers, write_submission
from acformer.benchmarks.vqa_processor import CONTRACTIONS, evalai
from acformer.errors import DataError

SHARED = Path(os.environ.get("ACFORMER_SHARED", Path(__file__).parents[2] / "shared"))
PUBLISHED = SHARED / "fixtures/benchmarks"
pytestmark = [
    pytest.mark.benchmarks,
    pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"no published answers in {PUBLISHED} (set ACFORMER_SHARED)"),
]
POPE = PUBLISHED / "pope/answers-llava-v1.5-13b.jsonl"
SCIENCEQA = PUBLISHED / "scienceqa/output-llava-v1.5-13b.json"
MMBENCH = PUBLISHED / "mmbench/answers-llava-v1.5-13b.jsonl"
UPLOAD = PUBLISHED / "mmbench/upload-llava-v1.5-13b.xlsx"


def score(name, answers, protocol="llava"):
    return score_answers(read_answered(name, answers, PUBLISHED / name, protocol))


def test_pope():
    result = score("pope", POPE)
    assert round(result["score"], 2) == 85.95
    f1 = {sampling: round(part["f1"], 2) for sampling, part in result["parts"].items()}
    assert f1 == {"random": 87.14, "popular": 86.25, "adversarial": 84.46, "mean": 85.95, "pooled": 85.93}
    assert (result["num_questions"], result["num_images"], result["unparsed"]) == (8910, 500, 0)
    assert round(score("pope", POPE, "lmms-eval")["score"], 2) == 85.93


def test_popes_newer_labels_are_refused(tmp_path):
    """3000 rows of the random sampling to 2910 questions: matched by position they would give 72.1."""
    for path in (PUBLISHED / "pope").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    labels = tmp_path / "coco_pope_random.json"
    rows = labels.read_text().splitlines()
    new = json.loads(rows[0]) | {"text": "Is there a zebra crossing in the image?", "label": "no"}
    labels.write_text("\n".join([*rows[:1], *[json.dumps({**new, "question_id": n}) for n in range(90)], *rows[1:]]))
    with pytest.raises(DataError, match=r"another release than the questions: 3000 labels to 2910 questions"):
        read_answered("pope", POPE, tmp_path)


@pytest.mark.parametrize("protocol", ["llava", "lmms-eval"])
def test_scienceqa(protocol):
    result = score("scienceqa", SCIENCEQA, protocol)
    assert round(result["score"], 2) == 71.64
    assert round(result["parts"]["all"], 2) == 74.39
    assert (result["num_questions"], result["num_images"]) == (4241, 2017)
    assert result["score"] == pytest.approx(100 * 1445 / 2017)
    assert result["parts"]["all"] == pytest.approx(100 * 3155 / 4241)


@pytest.mark.parametrize("answers", [MMBENCH, UPLOAD])
def test_mmbench(answers):
    result = score("mmbench", answers)
    assert round(result["score"], 2) == 67.69
    assert round(result["parts"]["one_round"], 2) == 75.43
    assert (result["num_questions"], result["num_images"]) == (4377, 1176)


def test_mmbenchs_upload_is_the_published_one(tmp_path):
    write_submission(tmp_path / "upload.xlsx", read_answered("mmbench", MMBENCH, PUBLISHED / "mmbench"))
    ours, theirs = (
        [list(row) for row in load_workbook(BytesIO(path.read_bytes())).active.iter_rows(values_only=True)]
        for path in (tmp_path / "upload.xlsx", UPLOAD)
    )
    assert ours == theirs


def test_the_answer_processor():
    probes = json.loads((PUBLISHED / "vqa_answers.json").read_text())
    assert [evalai(text) for text, _ in probes] == [processed for _, processed in probes]
    assert json.loads((PUBLISHED / "contractions.json").read_text()) == CONTRACTIONS


@pytest.mark.parametrize(("name", "answers", "seconds"), [("pope", POPE, 2), ("mmbench", MMBENCH, 5)])
def test_it_is_a_matter_of_seconds(name, answers, seconds):
    """Of the process's own time, so that others on the machine do not count."""
    started = time.process_time()
    score(name, answers)
    assert time.process_time() - started < seconds
