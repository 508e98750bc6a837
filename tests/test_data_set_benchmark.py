"""`acformer score` of answers to a data set or a file of conversations: one file, and two side by side."""

import json

import pytest
import tiny

from acformer.cli import main
from acformer.evaluate.report import evaluation_samples, score_replies, write_predictions


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    """The first forty questions about small scenes."""
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("acformer.lab.scenes.dataset.KNOWN_SCENES", 50)
    monkeypatch.setattr("acformer.lab.scenes.dataset.draw_scene", lambda scene: tiny.picture(len(scene.objects)))
    return evaluation_samples("openmoji-scenes-small", limit=40)


@pytest.fixture
def conversations(tmp_path):
    """Six questions without a kind about three pictures; the answer is `yes`."""
    records = []
    for number in range(6):
        tiny.picture(number // 2).save(tmp_path / f"{number // 2}.png")
        turns = [{"from": "human", "value": f"<image>\nIs {number} there?"}, {"from": "gpt", "value": "yes"}]
        records.append({"id": str(number), "image": f"{number // 2}.png", "conversations": turns})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


def predictions(samples, answers, path):
    return path, write_predictions(samples, answers, path)


def score(capsys, *arguments):
    assert main(["score", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_score_is_that_of_the_evaluation(scenes, tmp_path, capsys):
    answers = [sample.answer if number % 3 else "no" for number, sample in enumerate(scenes)]
    path, replies = predictions(scenes, answers, tmp_path / "predictions.jsonl")
    known = score_replies("openmoji-scenes-small", replies)
    found = score(capsys, "openmoji-scenes-small", "--answers", path)
    assert found["score"] == pytest.approx(100 * known["average"]["score"])
    assert found["interval"] == pytest.approx([100 * end for end in known["average"]["interval"]])
    assert found["blind"] == pytest.approx(100 * known["average"]["blind"])
    assert found["parts"]["exact_match"] == pytest.approx(100 * known["accuracy"])
    assert found["parts"]["by_kind"] == pytest.approx(
        {kind: 100 * part for kind, part in known["accuracy_by_kind"].items()}
    )
    assert found["num_questions"] == 40
    assert found["note"] == "answers to the first 40 questions"


def test_two_models_question_by_question(conversations, tmp_path, capsys):
    """Of six, five and two right: the difference is 50 points, the first better on four questions, worse on one."""
    samples = evaluation_samples(str(conversations))
    ours, _ = predictions(samples, ["yes"] * 5 + ["no"], tmp_path / "ours.jsonl")
    theirs, _ = predictions(samples, ["no"] * 4 + ["yes"] * 2, tmp_path / "theirs.jsonl")
    found = score(capsys, conversations, "--answers", ours, "--against", theirs)
    assert (found["score"], found["against"]["score"]) == pytest.approx((500 / 6, 200 / 6))
    assert found["against"]["difference"] == pytest.approx(50)
    # Pictures are drawn whole: two bring +2 of 2 answers, one -1; three times the third is 1 of 27 draws.
    assert found["against"]["interval"] == pytest.approx([-50, 100])
    assert (found["against"]["better"], found["against"]["worse"]) == (4, 1)
    assert found["parts"] == pytest.approx({"exact_match": 500 / 6})
    assert (found["num_questions"], found["num_images"]) == (6, 3)


def test_the_first_questions_are_compared(conversations, tmp_path, capsys):
    """Of `acformer eval --limit 3`, though ids repeat, a later record is bad and the other model answered all six."""
    records = json.loads(conversations.read_text())
    for record in records:
        record["id"] = record["image"]
    conversations.write_text(json.dumps(records))
    samples = evaluation_samples(str(conversations))
    conversations.write_text(json.dumps([*records[:5], {"id": "6", "image": "no.png"}]))
    ours, _ = predictions(samples[:3], ["yes"] * 3, tmp_path / "ours.jsonl")
    theirs, _ = predictions(samples, ["no"] + ["yes"] * 5, tmp_path / "theirs.jsonl")
    found = score(capsys, conversations, "--answers", ours, "--against", theirs)
    assert (found["score"], found["num_questions"]) == (100, 3)
    assert (found["against"]["score"], found["against"]["better"]) == (pytest.approx(200 / 3), 1)


def test_images_elsewhere(conversations, tmp_path, capsys):
    samples = evaluation_samples(str(conversations))
    path, _ = predictions(samples, ["yes"] * 6, tmp_path / "ours.jsonl")
    folder = tmp_path / "else/where"
    folder.mkdir(parents=True)
    for image in tmp_path.glob("*.png"):
        image.rename(folder / image.name)
    assert score(capsys, conversations, "--answers", path, "--image-root", folder)["score"] == 100


def test_a_table_of_the_paper_leaves_it_out(conversations, tmp_path, capsys):
    samples = evaluation_samples(str(conversations))
    path, _ = predictions(samples, ["yes"] * 6, tmp_path / "ours.jsonl")
    scores = tmp_path / "scores"
    scores.mkdir()
    (scores / "mine.json").write_text(json.dumps(score(capsys, conversations, "--answers", path)))
    assert main(["reproduce", "table1", "--scores", str(scores)]) == 3
    assert "holds no scores" in capsys.readouterr().err


def test_what_does_not_fit(conversations, tmp_path, capsys):
    samples = evaluation_samples(str(conversations))
    path, _ = predictions(samples, ["yes"] * 6, tmp_path / "ours.jsonl")
    other = path.read_text().replace("Is 0 there?", "Is it blue?")
    path.write_text(other)
    assert main(["score", str(conversations), "--answers", str(path)]) == 3
    assert "1 answers to a prompt that is not their question's (0)" in capsys.readouterr().err
    assert main(["score", "easy-vga", "--answers", str(path)]) == 2
    assert "did you mean 'easy-vqa'?" in capsys.readouterr().err
    for misspelt, meant in (("popw", "pope"), ("text-vqa", "textvqa")):
        assert main(["score", misspelt, "--answers", str(path)]) == 2
        assert f"did you mean '{meant}'?" in capsys.readouterr().err
    assert main(["score", "nosuch.json", "--answers", str(path)]) == 3
    assert "nosuch.json: No such file" in capsys.readouterr().err
