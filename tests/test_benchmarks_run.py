"""A model answers benchmarks in their published formats: whole files whatever happens on the way, and one table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from benchmark_files import WRITERS, write

from acformer.benchmarks import BENCHMARKS
from acformer.benchmarks.records import Folder
from acformer.benchmarks.run import evaluate_benchmark
from acformer.benchmarks.score import read_answered, score_answers
from acformer.cli import main
from acformer.errors import DataError


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    tiny.model().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.fixture
def parts():
    return tiny.model(), tiny.processor()


def evaluate(parts, name, root, out, **options):
    options = {"max_new_tokens": 4, "progress": False, **options}
    return evaluate_benchmark(parts, name, root, out, **options)


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", WRITERS)
def test_every_benchmark_from_files_to_score(name, parts, tmp_path):
    root = tmp_path / "published"
    answers = write(name, root)
    (result,) = evaluate(parts, name, root, tmp_path / "out", batch_size=3)
    folder = tmp_path / "out" / name / "5-tokens"
    lines = predictions(folder)
    questions = BENCHMARKS[name].questions(Folder(root))
    assert [line["id"] for line in lines] == [question.id for question in questions]
    prompts = {line["question"] for line in lines}
    if name == "mmbench":
        asked = {answer["prompt"] + BENCHMARKS[name].suffix for answer in answers}
    else:
        asked = {answer["prompt"].removeprefix("<image>\n") for answer in answers}
    assert prompts == asked, "the prompts are LLaVA's"
    assert all(line["prediction"] for line in lines)
    if name == "mm_vet":
        assert result["score"] is None
    else:
        assert result["score"] == score_answers(read_answered(name, folder / "predictions.jsonl", root))["score"]
    assert json.loads((folder / "scores.json").read_text()) == result
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "predictions.jsonl",
        "scores.json",
        "settings.json",
    ]


@pytest.mark.parametrize("name", ["scienceqa", "textvqa", "mme"])
def test_the_batch_does_not_change_the_answers(name, parts, tmp_path):
    """Questions of other lengths, some without an image, in other company."""
    write(name, tmp_path / "published")
    found = []
    for batch_size in (1, 2, 100):
        out = tmp_path / f"by{batch_size}"
        evaluate(parts, name, tmp_path / "published", out, batch_size=batch_size)
        found.append(predictions(out / name / "5-tokens"))
    assert found[0] == found[1] == found[2]


def test_every_question_has_its_own_image(parts, tmp_path):
    """MME has images of one name in every category: what is shown is the right one."""
    root = tmp_path / "published"
    write("mme", root)
    release = root / "MME_Benchmark_release_version"
    tiny.picture(77).save(release / "OCR/0001.png")
    evaluate(parts, "mme", root, tmp_path / "one")
    tiny.picture(78).save(release / "color/0001.png")
    evaluate(parts, "mme", root, tmp_path / "other")
    one, other = (predictions(tmp_path / out / "mme/5-tokens") for out in ("one", "other"))
    changed = {a["id"] for a, b in zip(one, other, strict=True) if a["prediction"] != b["prediction"]}
    assert changed == {"color/0001"}


def test_an_image_that_cannot_be_read_is_named_counted_and_wrong(parts, tmp_path):
    root = tmp_path / "published"
    write("pope", root)
    (root / "val2014/COCO_val2014_000000000001.jpg").write_bytes(b"\xff\xd8\xff broken")
    (result,) = evaluate(parts, "pope", root, tmp_path / "out")
    lines = predictions(tmp_path / "out/pope/5-tokens")
    broken = [line for line in lines if line.get("error")]
    assert len(lines) == 23
    assert len(broken) == result["unreadable_images"] == 11
    assert all("COCO_val2014_000000000001.jpg" in line["error"] for line in broken)
    assert result == result | score_answers(
        read_answered("pope", tmp_path / "out/pope/5-tokens/predictions.jsonl", root)
    )
    answered = read_answered("pope", tmp_path / "out/pope/5-tokens/predictions.jsonl", root)
    wrong = [
        points for points, answer in zip(answered.measure.points, answered.answers, strict=True) if not answer.text
    ]
    assert wrong == [0.0] * 11


def test_an_image_that_was_mended_is_answered_again(parts, tmp_path):
    root, out = tmp_path / "published", tmp_path / "out"
    write("gqa", root)
    whole = (root / "images/n1.jpg").read_bytes()
    (root / "images/n1.jpg").write_bytes(b"broken")
    (result,) = evaluate(parts, "gqa", root, out)
    assert result["unreadable_images"] == 1
    (root / "images/n1.jpg").write_bytes(whole)
    (result,) = evaluate(parts, "gqa", root, out)
    assert result["unreadable_images"] == 0
    evaluate(parts, "gqa", root, tmp_path / "other")
    assert predictions(out / "gqa/5-tokens") == predictions(tmp_path / "other/gqa/5-tokens")


def test_no_image_at_all_is_no_score(parts, tmp_path):
    root = tmp_path / "published"
    write("gqa", root)
    for path in (root / "images").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"none of the images of gqa could be read, the first: .*n0\.jpg"):
        evaluate(parts, "gqa", root, tmp_path / "out")
    assert not (tmp_path / "out/gqa/5-tokens/predictions.jsonl").exists()


def test_an_image_that_is_not_there_is_refused_beforehand(model_folder, tmp_path, capsys):
    root = tmp_path / "published"
    write("gqa", root)
    (root / "images/n1.jpg").unlink()
    code = main(["eval", str(model_folder), "--data", "gqa", "--root", str(root), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert code == 3
    assert f"{root}: 1 images are not there: n1.jpg" in err
    assert not (tmp_path / "out").exists()


def test_usage(model_folder, tmp_path, capsys):
    assert main(["eval", str(model_folder), "--data", "gqa"]) == 2
    assert "--root says in which folder its files are" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["eval", str(model_folder), "--data", "gqa", "--root", str(empty)]) == 3
    assert f"{empty} has no testdev_balanced_questions.json" in capsys.readouterr().err
    assert main(["eval", str(model_folder), "--data", "easy-vqa", "--tokens", "3,5"]) == 2
    assert "several numbers of --tokens are for benchmarks" in capsys.readouterr().err


def test_several_budgets_make_a_table(model_folder, tmp_path, capsys):
    root, out = tmp_path / "published", tmp_path / "out"
    write("pope", root)
    arguments = ["eval", str(model_folder), "--data", "pope", "--root", str(root), "--out", str(out), "--quiet"]
    assert main([*arguments, "--tokens", "3,5", "--limit", "7", "--max-new-tokens", "2"]) == 0
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert table[1].split("  ")[0].strip() == "tokens"
    cells = [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in table[1:]]
    assert cells[0] == ["tokens", "score", "95 % interval", "visual tokens", "first token", "keys and values"]
    scores = [json.loads((out / f"pope-first-7/{n}-tokens/scores.json").read_text()) for n in (3, 5)]
    for row, budget, found in zip(cells[1:], (3, 5), scores, strict=True):
        assert row[:2] == [str(budget), f"{found['score']:.2f}"]
        assert row[3] == f"{budget} of 17"
        assert found["num_questions"] == 7
        assert found["first_token_ms"] > 0
        assert found["kv_bytes_image"] == 2 * 2 * 2 * 8 * 4 * budget  # k and v, layers, heads, width, float32


def test_answers_that_are_there_are_not_given_again(parts, tmp_path, monkeypatch):
    write("gqa", tmp_path / "published")
    first = evaluate(parts, "gqa", tmp_path / "published", tmp_path / "out")
    monkeypatch.setattr("acformer.benchmarks.run.Job._answer", lambda *_: pytest.fail("answered again"))
    again = evaluate(parts, "gqa", tmp_path / "published", tmp_path / "out", protocol="lmms-eval")
    assert again[0]["num_questions"] == first[0]["num_questions"] == 3
    assert again[0]["protocol"] == "lmms-eval"


def test_answers_of_something_else_are_refused(parts, tmp_path):
    root, out = tmp_path / "published", tmp_path / "out"
    write("gqa", root)
    evaluate(parts, "gqa", root, out)
    before = (out / "gqa/5-tokens/predictions.jsonl").read_text()
    with pytest.raises(DataError, match=r"answers of another run \(max_new_tokens differ\)"):
        evaluate(parts, "gqa", root, out, max_new_tokens=5)
    with torch.no_grad():
        parts[0].model.connector.projector[0].weight.add_(1e-3)
    with pytest.raises(DataError, match=r"answers of another run \(weights differ\)"):
        evaluate(parts, "gqa", root, out)
    assert (out / "gqa/5-tokens/predictions.jsonl").read_text() == before


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(__file__).parents[1] / 'src'}"}


def command(model_folder, root, out, *options):
    """A run of 23 questions, one at a time, in a process of its own."""
    arguments = ["eval", str(model_folder), "--data", "pope", "--root", str(root), "--out", str(out), "--quiet"]
    return ["-m", "acformer.cli", *arguments, "--batch-size", "1", "--max-new-tokens", "24", *options]


def finish(arguments):
    done = subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_after(arguments, folder, lines):
    """SIGKILL as soon as so many answers are written."""
    process = subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while sum(path.read_bytes().count(b"\n") for path in folder.glob("answers.partial.0.jsonl")) < lines:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "predictions.jsonl").exists()


@pytest.mark.slow
def test_killed_twice_it_goes_on(model_folder, tmp_path):
    """Of what a killed process has written, also half a line, nothing is lost, doubled or out of order."""
    root, out = tmp_path / "published", tmp_path / "out"
    write("pope", root)
    folder = out / "pope/5-tokens"
    kill_after(command(model_folder, root, out), folder, 4)
    answered = len((folder / "answers.partial.0.jsonl").read_bytes().split(b"\n")) - 1
    with (folder / "answers.partial.0.jsonl").open("ab") as file:
        file.write(b'{"number": 22, "id": "20000007", "predic')
    kill_after(command(model_folder, root, out), folder, 5)
    kept = len((folder / "answers.partial.jsonl").read_text().splitlines())
    assert kept == answered
    output = finish(command(model_folder, root, out))
    finish(command(model_folder, root, tmp_path / "whole"))
    assert predictions(folder) == predictions(tmp_path / "whole/pope/5-tokens")
    assert len(predictions(folder)) == 23
    assert output.startswith("pope ")


@pytest.mark.slow
def test_torchrun_shares_the_questions(model_folder, tmp_path):
    root = tmp_path / "published"
    write("pope", root)
    port = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
    both = command(model_folder, root, tmp_path / "both")
    output = finish([*port, *both])
    assert output.count("pope ") == 1, "one process prints"
    finish(command(model_folder, root, tmp_path / "alone"))
    assert predictions(tmp_path / "both/pope/5-tokens") == predictions(tmp_path / "alone/pope/5-tokens")
