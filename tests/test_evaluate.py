"""Scores against values worked out by hand; answers that do not depend on the batch."""

import json

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from acformer.data.sources import load_samples
from acformer.errors import DataError, ImageError
from acformer.evaluate.generate import answer, ask
from acformer.evaluate.report import evaluate, evaluation_samples
from acformer.evaluate.scorers import (
    accuracy_by_kind,
    blind_accuracy,
    blind_answers,
    exact_match,
    interval,
    normalise,
)


@pytest.fixture
def parts():
    return tiny.model(), tiny.processor()


@pytest.fixture
def data(tmp_path):
    """Five questions about three pictures, of two kinds; the second picture is asked about thrice."""
    records = []
    for number, picture in enumerate((0, 1, 1, 1, 2)):
        tiny.picture(picture).save(tmp_path / f"{picture}.png")
        turns = [{"from": "human", "value": f"<image>\n{'what ' * number}?"}, {"from": "gpt", "value": "yes"}]
        kind = "even" if number % 2 == 0 else "odd"
        records.append({"id": str(number), "image": f"{picture}.png", "conversations": turns, "kind": kind})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


def test_exact_match_compares_words_not_typing():
    assert normalise("  A  Blue circle. ") == "a blue circle"
    assert exact_match("Yes.", "yes")
    assert not exact_match("yes it is", "yes")
    assert not exact_match("", "yes")


def test_accuracy_by_kind():
    assert accuracy_by_kind([True, False, True, True], ["b", "b", "a", None]) == {"a": 1.0, "b": 0.5}


def test_blind_answers_are_the_most_frequent_ones():
    table = blind_answers(["x", "x", "x", "y"], ["no", "yes", "no", "red"])
    assert table == {"": "no", "x": "no", "y": "red"}
    assert blind_accuracy(table, ["x", "y", "never asked", "x"], ["no", "red", "no", "yes"]) == 0.75


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=1, max_size=60))
def test_the_interval_holds_probabilities_in_order(marks):
    low, high = interval([right for right, _ in marks], [str(group) for _, group in marks], draws=50)
    assert 0 <= low <= high <= 1


def test_the_interval_draws_pictures_not_questions():
    rights = [True] * 50 + [False] * 50
    alone = interval(rights, [str(number) for number in range(100)])
    together = interval(rights, [str(number // 10) for number in range(100)])
    assert alone[1] - alone[0] == pytest.approx(4 * 0.05, abs=0.03)  # 2 x 1.96 standard errors of 0.5 / 10
    assert together[1] - together[0] > 2.5 * (alone[1] - alone[0])  # ten groups: the square root of ten wider


def test_the_batch_does_not_change_the_answer(parts, data):
    samples = load_samples(str(data))
    alone = list(answer(*parts, samples, batch_size=1, progress=False))
    assert list(answer(*parts, samples, batch_size=5, progress=False)) == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("budget", [None, 3])
def test_features_known_beforehand_give_the_same_answers(parts, data, budget):
    model, processor = parts

    def features(path):
        pixels = processor.image_processor([Image.open(path)], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            found = model.get_vision_features(pixels)
        return {"tokens": found.tokens[0], "cls_attention": found.cls_attention[0]}

    samples = load_samples(str(data))
    live = list(answer(*parts, samples, num_image_tokens=budget, progress=False))
    assert len(set(live)) > 1
    for batch_size in (1, 5):
        known = answer(*parts, samples, features=features, num_image_tokens=budget, batch_size=batch_size)
        assert list(known) == live


def test_image_tokens_without_images_are_refused(parts):
    batch = tiny.inputs("<image> what?", tiny.picture())
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="the prompts hold 5 image tokens but the images give 0"):
        parts[0].generate(**batch, max_new_tokens=2)


def test_other_budgets_from_the_same_model(parts, data):
    samples = load_samples(str(data))
    few, many = (
        list(answer(*parts, samples, num_image_tokens=count, max_new_tokens=8, progress=False)) for count in (2, 9)
    )
    assert few != many


def test_evaluate_writes_what_it_says(parts, data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    scores = evaluate(parts, str(data), tmp_path / "out", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list("01234")
    assert lines[1]["question"] == "what ?"
    assert scores["accuracy"] == sum(line["correct"] for line in lines) / 5
    assert scores["num_questions"] == 5
    assert scores["num_images"] == 3
    assert scores["blind_accuracy"] == 1.0
    assert set(scores["accuracy_by_kind"]) == {"even", "odd"}
    assert (scores["num_image_tokens"], scores["num_vision_tokens"]) == (5, 17)
    assert json.loads((tmp_path / "out/scores.json").read_text()) == scores
    assert len({line["prediction"] for line in lines}) > 1


def test_ask_and_stream(parts, data, capsys):
    picture = data.parent / "0.png"
    said = ask(*parts, picture, "what?", max_new_tokens=6, stream=True)
    assert capsys.readouterr().out == f"{said}\n"
    tokens = parts[1].tokenizer(said, add_special_tokens=False)["input_ids"]
    assert 0 < len(tokens) <= 12
    with torch.inference_mode():
        assert ask(*parts, picture, "what?", max_new_tokens=6, num_image_tokens=2) is not None


def test_an_error_is_never_a_wrong_answer(parts, data):
    (data.parent / "0.png").write_bytes(b"not a picture")
    with pytest.raises(ImageError, match=r"0\.png"):
        list(answer(*parts, load_samples(str(data)), progress=False))


def test_data_that_cannot_be_scored(tmp_path, data):
    records = json.loads(data.read_text())
    records[1]["conversations"] = records[1]["conversations"][:1]
    data.write_text(json.dumps(records))
    with pytest.raises(DataError, match="1 records have no answer"):
        evaluation_samples(str(data))
    records[1]["image"] = "gone.png"
    data.write_text(json.dumps(records))
    with pytest.raises(DataError, match="records are bad"):
        evaluation_samples(str(data))
