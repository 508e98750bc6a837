"""The whole way in small: the quickstart's own code on made-up data and a made-up encoder, three steps a stage."""

import json

import tiny
from transformers import CLIPVisionModel

from acformer import embedded
from acformer.quickstart import quickstart


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


def test_quickstart_reports_what_it_did(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    made_up_cache(tmp_path / "cache")
    monkeypatch.setattr(embedded, "_is_fetched", lambda entry: True)
    steps = [f"{stage}.training.max_steps=3" for stage in ("pretrain", "finetune")]
    small = [
        "model.image_size=16",
        "model.connector_kwargs.num_anchors=4",
        "finetune.training.dataloader_pin_memory=false",
    ]
    out = tmp_path / "out"
    quickstart(out, [*steps, *small, "pretrain.training.dataloader_pin_memory=false"], limit=20, progress=False)
    report = json.loads((out / "report.json").read_text())
    wanted = {"accuracy", "num_questions", "blind_accuracy", "num_image_tokens", "num_vision_tokens", "seconds"}
    assert wanted <= set(report)
    assert (report["num_questions"], report["num_images"], report["blind_accuracy"]) == (20, 10, 1.0)
    assert (report["num_image_tokens"], report["num_vision_tokens"]) == (5, 17)
    assert len({asked["picture"] for asked in report["asked"]}) == 3
    assert all((out / f"anchors-{key}.png").is_file() for key in ("0-color", "1-exists-shape", "2-shape"))
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 20
    said = capsys.readouterr().out
    assert f"{report['accuracy']:.1%}" in said
    assert "5 of 17" in said
    assert str(out / "report.json") in said
