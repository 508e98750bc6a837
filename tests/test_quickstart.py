"""The whole way in small: the quickstart's own code on made-up data and a made-up encoder, three steps a stage."""

import json
import os
import signal

import pytest
import tiny
from transformers import CLIPVisionModel

from acformer.cli import main
from acformer.fetch import embedded, trained
from acformer.fetch.trained import TRAINED
from acformer.files import write_text
from acformer.hf.checkpoints import save_trained, write_manifest
from acformer.lab.quickstart import quickstart


def made_up_cache(folder):
    """What `fetch` would have left: an encoder of a few weights, twelve pictures with two questions each."""
    for name in ("dinov2-s14", "easy-vqa"):
        (folder / name).mkdir(parents=True)
    CLIPVisionModel(tiny.config().vision_config).save_pretrained(folder / "dinov2-s14")
    tiny.processor().image_processor.save_pretrained(folder / "dinov2-s14")
    questions, captions = [], []
    for number in range(12):
        tiny.picture(number).save(folder / f"easy-vqa/{number}.png")
        for kind, asked in (("color", "what color?"), (("shape", "exists-shape")[number % 2], "what shape?")):
            turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": "red"}]
            key = f"{number}-{kind}"
            questions.append({"id": key, "image": f"{number}.png", "conversations": turns, "kind": kind})
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a red circle."}]
        captions.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    for part, records in (("train", questions), ("test", questions), ("captions", captions)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"easy-vqa/{part}.jsonl").write_text(lines)


def made_up_model(folder, weights):
    """A trained model of ours as if it had been joined, with an image and two questions."""
    write_text(weights / "acformer-scenes/manifest.json", "{}")
    tiny.model().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    (folder / "examples").mkdir()
    tiny.picture(20).save(folder / "examples/0.png")
    asked = [{"image": "0.png", "question": f"where is {what}?", "answer": "left"} for what in ("it", "he")]
    write_text(folder / "examples/examples.json", json.dumps(asked))
    write_text(folder / "SOURCE.json", json.dumps(embedded.joined_source(TRAINED["acformer-scenes"])))
    write_manifest(folder)


SMALL = ["model.image_size=16", "model.connector_kwargs.num_anchors=4"]
for stage in ("pretrain", "finetune"):
    SMALL += [f"{stage}.training.max_steps=3", f"{stage}.training.dataloader_pin_memory=false"]


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Nothing is left to fetch."""
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    made_up_cache(tmp_path / "cache")
    monkeypatch.setattr(embedded, "_is_fetched", lambda entry: True)
    monkeypatch.setattr(trained, "PLACES", (tmp_path / "weights",))
    monkeypatch.setattr(trained, "DEFAULT", "acformer-scenes")
    made_up_model(tmp_path / "cache/acformer-scenes", tmp_path / "weights")


@pytest.mark.lab
@pytest.mark.usefixtures("fetched")
def test_stopped_it_starts_anew_and_does_not_say_that_it_goes_on(tmp_path, monkeypatch, capsys):
    """Its seconds are of the whole way; so the exit code is not the one that asks to be started again."""
    saved = []

    def stop(trainer, processor, folder):
        saved.append(folder.parent.name)
        if saved == ["pretrain", "finetune"]:
            os.kill(os.getpid(), signal.SIGTERM)
        save_trained(trainer, processor, folder)

    monkeypatch.setattr("acformer.training.stages.save_trained", stop)
    command = ["quickstart", "--quiet", "--out", str(tmp_path / "out"), "--limit", "20", *SMALL]
    handler = signal.getsignal(signal.SIGTERM)
    codes = [main(command), main(command)]
    signal.signal(signal.SIGTERM, handler)
    assert codes == [143, 0]
    assert saved == ["pretrain", "finetune"] * 2
    assert "acformer: interrupted\n" in capsys.readouterr().err


@pytest.mark.usefixtures("fetched")
def test_quickstart_reports_what_it_did(tmp_path, capsys):
    out = tmp_path / "out"
    quickstart(out, SMALL, limit=20, progress=False)
    report = json.loads((out / "report.json").read_text())
    wanted = {"accuracy", "num_questions", "blind_accuracy", "num_image_tokens", "num_vision_tokens", "seconds"}
    assert wanted <= set(report)
    assert (report["num_questions"], report["num_images"], report["blind_accuracy"]) == (20, 10, 1.0)
    assert (report["num_image_tokens"], report["num_vision_tokens"]) == (5, 17)
    assert len({asked["picture"] for asked in report["asked"]}) == 3
    assert all((out / f"anchors-{key}.png").is_file() for key in ("0-color", "1-exists-shape", "2-shape"))
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 20
    scene = report["scene"]
    assert [one["question"] for one in scene["asked"]] == ["where is it?", "where is he?"]
    assert all(one["answer"] == "left" and isinstance(one["said"], str) for one in scene["asked"])
    said = capsys.readouterr().out
    assert scene["picture"] in said
    for one in scene["asked"]:
        assert f"{one['question']}  ->  {one['said']}  (right: left)" in said
    assert f"{report['accuracy']:.1%}" in said
    assert "5 of 17" in said
    assert str(out / "report.json") in said


@pytest.mark.lab
@pytest.mark.usefixtures("fetched")
def test_without_a_trained_model_it_does_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trained, "DEFAULT", None)
    quickstart(tmp_path / "out", SMALL, limit=20, progress=False)
    assert json.loads((tmp_path / "out/report.json").read_text())["scene"] is None
    assert "which was trained before" not in capsys.readouterr().out
