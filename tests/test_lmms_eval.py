"""lmms-eval beside us: its scorers give our scores under its protocol, and our model answers in it as in our own eval.

Its scorers are the `utils.py` of each task as installed; `make test-lmms-eval` makes the environment.
"""

import importlib
import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
import tiny
from benchmark_files import lines, write
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make test-lmms-eval")

from acformer.benchmarks import BENCHMARKS
from acformer.benchmarks.answers import Question
from acformer.benchmarks.hub import open_folder
from acformer.benchmarks.records import Folder
from acformer.benchmarks.run import evaluate_benchmark
from acformer.benchmarks.score import read_answered, score_answers
from acformer.data.samples import Sample
from acformer.evaluate.generate import answer

pytestmark = [pytest.mark.lmms_eval, pytest.mark.filterwarnings("ignore")]
PIECES = [
    "yes",
    "No",
    "n",
    "y",
    "A",
    "B.",
    "(C)",
    "D,",
    "E",
    "the",
    "two",
    "red",
    "Red dog",
    "men's",
    "dont",
    "1,000",
    "3.",
]
PIECES += [" ", ".", ",", "?", "!", "-", "/", "\n", "option", "The answer is", "A: ", "B)", "x", "None"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.lists(st.sampled_from(PIECES), max_size=4).map(
    " ".join
)
ANSWER = TEXT.map(str.strip)
"""As lmms-eval hands answers to its tasks."""
YES_NO = st.sampled_from(["yes", "no"])


@pytest.fixture(autouse=True)
def whole_images(monkeypatch):
    """lmms-eval turns on what `load_image` refuses to read under."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


def utils(task):
    return importlib.import_module(f"lmms_eval.tasks.{task}")


def measure(name, questions, texts):
    return BENCHMARKS[name].measure(questions, texts, "lmms-eval")


def score(found):
    return float(found.score(found.counts.sum(axis=0)))


@given(st.lists(st.tuples(YES_NO, ANSWER | YES_NO, st.sampled_from(["random", "popular", "adversarial"])), min_size=1))
def test_pope(asked):
    theirs = utils("pope.utils")
    questions = [Question(str(n), "?", "i", (truth,), sampling) for n, (truth, _, sampling) in enumerate(asked)]
    rows = [
        theirs.pope_process_results({"answer": truth.capitalize(), "question_id": n}, [text])["pope_f1_score"]
        for n, (truth, text, _) in enumerate(asked)
    ]
    found = measure("pope", questions, [text for _, text, _ in asked])
    assert score(found) == pytest.approx(100 * theirs.pope_aggregate_f1_score(rows))
    pooled = found.parts()["pooled"]
    for ours, aggregate in (
        ("accuracy", theirs.pope_aggregate_accuracy),
        ("precision", theirs.pope_aggregate_precision),
        ("recall", theirs.pope_aggregate_recall),
    ):
        assert pooled[ours] == pytest.approx(100 * aggregate(rows))


@given(
    st.lists(st.tuples(st.sampled_from(["OCR", "scene", "code_reasoning"]), YES_NO, YES_NO, ANSWER, ANSWER), min_size=1)
)
def test_mme(images):
    theirs = utils("mme.utils")
    questions, texts, rows = [], [], {"mme_perception_score": [], "mme_cognition_score": []}
    for number, (category, *truths, first, second) in enumerate(images):
        for truth, text in zip(truths, (first, second), strict=True):
            doc = {"question_id": f"{category}/{number}", "answer": truth.capitalize(), "category": category}
            for key, row in theirs.mme_process_results(doc, [text]).items():
                rows[key].append(row)
            questions.append(Question(doc["question_id"], "?", doc["question_id"], (truth,), category))
            texts.append(text)
    parts = measure("mme", questions, texts).parts()
    assert parts["perception"] == pytest.approx(theirs.mme_aggregate_results(rows["mme_perception_score"]))
    assert parts["cognition"] == pytest.approx(theirs.mme_aggregate_results(rows["mme_cognition_score"]))


@given(
    st.lists(
        st.tuples(
            st.integers(2, 4),
            st.lists(st.sampled_from(["red", "option", "two dogs", "B", "no"]), min_size=4, max_size=4),
            st.lists(st.tuples(st.integers(0, 3), ANSWER | st.sampled_from("ABCD")), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_mmbench(asked):
    evaluator = utils("mmbench.mmbench_evals").MMBench_Evaluator()
    questions, texts, rows = [], [], []
    for number, (count, options, rotations) in enumerate(asked):
        given_options = dict(zip("ABCD", [*options[:count], *[None] * (4 - count)], strict=True))
        for turn, (right, text) in enumerate(rotations):
            index, answer = number + turn * 1_000_000, "ABCD"[right % count]
            rows.append({"index": index, "question": "?", "answer": answer, "prediction": text, "category": "c"})
            rows[-1] |= {**given_options, "l2-category": "l"}
            known = {letter: option for letter, option in given_options.items() if option}
            extra = {"options": known, "l2": "l", "row": {}}
            questions.append(Question(str(index), "?", str(number), (answer,), "c", extra=extra))
            texts.append(text)
    overall, *_ = evaluator.eval_result(rows, eval_method="static")
    assert score(measure("mmbench", questions, texts)) == pytest.approx(100 * overall)


@pytest.mark.parametrize("task", ["textvqa.utils", "vizwiz_vqa.utils", "ok_vqa.utils", "vqav2.utils"])
@given(
    text=ANSWER,
    people=st.lists(TEXT, min_size=10, max_size=10) | st.lists(st.sampled_from(PIECES), min_size=10, max_size=10),
)
def test_vqa(task, text, people):
    name = {"textvqa": "textvqa", "vizwiz_vqa": "vizwiz", "ok_vqa": "okvqa", "vqav2": "vqav2"}[task.split(".")[0]]
    process = next(value for key, value in vars(utils(task)).items() if key.endswith("_process_results"))
    if name == "vqav2":
        answers = [{"answer": said, "answer_confidence": "yes", "answer_id": n} for n, said in enumerate(people)]
    else:
        answers = list(people)
    theirs = process({"question_id": 1, "answers": answers}, [text])
    found = measure(name, [Question("1", "?", "1", tuple(people))], [text])
    assert found.points[0] == pytest.approx(float(theirs["exact_match"]))
    if name == "vizwiz":
        (row,) = BENCHMARKS[name].submission(None, [Question("1", "?", "1.jpg")], [text])
        assert row == theirs["submission"]


@given(st.lists(st.tuples(ANSWER, st.sampled_from(["red", "t-shirt", "no", "two dogs"])), min_size=1))
def test_gqa(asked):
    from lmms_eval.api.metrics import exact_match_hf_evaluate

    for text, truth in asked:
        theirs = exact_match_hf_evaluate([text], [truth], ignore_case=True, ignore_punctuation=True)["exact_match"]
        found = measure("gqa", [Question("1", "?", "1", (truth,))], [text])
        assert found.points[0] == theirs, (text, truth)


@given(ANSWER | st.sampled_from("abcdeABCDE"), st.integers(0, 3))
def test_scienceqa(text, answer):
    doc = {"choices": ["x"] * 4, "answer": answer}
    theirs = utils("scienceqa.utils").sqa_process_results(doc, [text])["exact_match"]
    assert score(measure("scienceqa", [Question("1", "?", "1", ("ABCD"[answer],))], [text])) == 100 * theirs


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from(["rec", "ocr,math", "rec,spat"])), min_size=1)
)
def test_mm_vet(graded):
    try:
        theirs = utils("mmvet.utils")
    except ImportError as error:
        pytest.skip(f"lmms-eval's MM-Vet needs more: {error}")
    rows = [{"score": grade, "capabilities": capability} for grade, capability in graded]
    questions = [Question(f"v1_{n}", "?", category=one["capabilities"].replace(",", "+")) for n, one in enumerate(rows)]
    found = measure("mm_vet", questions, [f"grades: {grade}" for grade, _ in graded])
    assert score(found) == pytest.approx(theirs.mmvet_aggregate_results(rows))


# Our model in lmms-eval.

TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {data}
task: {task}
test_split: train
output_type: generate_until
doc_to_visual: !function task_utils.images
doc_to_text: !function task_utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6{until}}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
from PIL import Image, ImageFile
def images(doc): return [Image.open(path).convert("RGB") for path in doc["images"]]
def text(doc): return doc["text"]
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
OFFLINE["PYTHONPATH"] = str(Path(__file__).parents[1] / "src")


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    tiny.model().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


def run_task(tmp_path, model_folder, docs, model_args="", until=""):
    """The lines of its log of samples."""
    tasks, out = tmp_path / "tasks", tmp_path / "logs"
    lines(tasks / "data.jsonl", docs)
    (tasks / "made_up.yaml").write_text(TASK.format(task="made_up", data=tasks / "data.jsonl", until=until))
    (tasks / "task_utils.py").write_text(FUNCTIONS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "acformer", "--tasks", "made_up"]
    command += ["--model_args", f"pretrained={model_folder}{model_args}", "--include_path", str(tasks)]
    command += ["--batch_size", "4", "--log_samples", "--output_path", str(out), "--device", "cpu"]
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    (log,) = (out.rglob("*_samples_made_up.jsonl"),)
    found = list(log)
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    return found[0]


def test_it_answers_as_our_eval_and_its_log_is_scored(tmp_path, model_folder):
    root = tmp_path / "published"
    write("gqa", root)
    benchmark = BENCHMARKS["gqa"]
    questions = benchmark.questions(Folder(root))
    docs = [
        {
            "images": [str(root / "images" / question.image)],
            "text": benchmark.prompt(question),
            "answer": question.answers[0],
        }
        for question in questions
    ]
    log = run_task(tmp_path, model_folder, docs, ",num_image_tokens=3")
    parts = tiny.model(), tiny.processor()
    (result,) = evaluate_benchmark(parts, "gqa", root, tmp_path / "out", budgets=[3], max_new_tokens=6, progress=False)
    ours = [json.loads(line) for line in (tmp_path / "out/gqa/3-tokens/predictions.jsonl").read_text().splitlines()]
    theirs = [one.text for one in benchmark.read_answers(log)]
    assert theirs == [line["prediction"] for line in ours]
    assert len({*theirs}) > 1
    assert score_answers(read_answered("gqa", log, root))["score"] == result["score"]


def test_several_images_and_until(tmp_path, model_folder):
    for seed in range(3):
        tiny.picture(seed).save(tmp_path / f"{seed}.png")
    paths = [str(tmp_path / f"{seed}.png") for seed in range(3)]
    docs = [{"images": paths[:n], "text": "what?", "answer": "x"} for n in (0, 1, 2, 3)]
    docs.append({"images": paths[2:] + paths[:1], "text": "what?", "answer": "x"})
    samples = []
    for doc in docs:
        content = [*[{"type": "image"} for _ in doc["images"]], {"type": "text", "text": doc["text"]}]
        samples.append(Sample("", ({"role": "user", "content": content},), tuple(map(Path, doc["images"]))))
    model = tiny.model(seed=3)  # whose answers differ much
    model.save_pretrained(model_folder)
    texts = list(answer(model, tiny.processor(), samples, max_new_tokens=6, progress=False))
    log = BENCHMARKS["gqa"].read_answers(run_task(tmp_path / "a", model_folder, docs))
    assert [one.text for one in log] == texts
    assert len({*texts}) > 3
    letter = next(letter for letter in texts[1][1:] if letter.isalnum())
    log = BENCHMARKS["gqa"].read_answers(run_task(tmp_path / "b", model_folder, docs, until=f", until: ['{letter}']"))
    assert [one.text for one in log] == [text.partition(letter)[0].strip() for text in texts]


# Hub data sets, which are read through `datasets`: it is installed in the same environment.


def test_a_data_set_in_parquet(tmp_path):
    import datasets

    rows = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        tiny.picture(number).save(path)
        shown = {"bytes": path.read_bytes(), "path": None}
        category, truth = ("random", "yes") if number % 2 else ("popular", "no")
        row = {"id": str(number), "question_id": str(number // 2), "question": f"Is there a thing {number}?"}
        rows.append({**row, "answer": truth, "image_source": f"COCO_{number}", "image": shown, "category": category})
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    root = tmp_path / "POPE"
    root.mkdir()
    table.to_parquet(root / "test-00000-of-00001.parquet")
    questions = BENCHMARKS["pope"].questions(Folder(root, images=True))
    assert [question.answers for question in questions] == [("no",), ("yes",), ("no",), ("yes",)]
    assert [question.category for question in questions] == ["popular", "random"] * 2
    shown = Image.open(BytesIO(questions[3].load()))
    assert shown.tobytes() == tiny.picture(3).tobytes()
    parts = tiny.model(), tiny.processor()
    (result,) = evaluate_benchmark(parts, "pope", root, tmp_path / "out", max_new_tokens=4, progress=False)
    assert (result["num_questions"], result["num_images"], result["unreadable_images"]) == (4, 4, 0)
    predictions = tmp_path / "out/pope/5-tokens/predictions.jsonl"
    assert score_answers(read_answered("pope", predictions, root))["score"] == result["score"]


def test_a_data_set_of_the_hub_by_name(tmp_path, monkeypatch):
    """What is downloaded are parquet files in folders of splits; the part that is named is what counts."""
    import datasets
    import huggingface_hub

    for split, answer_ in (("test", "yes"), ("dev", "no")):
        row = {"id": "1", "question_id": "1", "question": "Is there a dog?", "answer": answer_, "category": "random"}
        (tmp_path / "data").mkdir(exist_ok=True)
        table = datasets.Dataset.from_list([{**row, "image_source": "COCO_1"}])
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    asked = []

    def download(repo, **options):
        asked.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    questions = BENCHMARKS["pope"].questions(open_folder(Path("lmms-lab/POPE@dev")))
    assert [question.answers for question in questions] == [("no",)]
    assert asked == [("lmms-lab/POPE", {"repo_type": "dataset", "allow_patterns": "*dev*.parquet"})]
