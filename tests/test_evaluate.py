"""Scores against values worked out by hand; answers that do not depend on the batch."""

import json
from itertools import islice

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from acformer.data.datasets import load_samples
from acformer.errors import DataError, ImageError
from acformer.evaluate.families import MEASURES, Reply, blind_replies, family_scores
from acformer.evaluate.generate import answer, ask
from acformer.evaluate.report import as_reply, evaluate, evaluation_samples, training_questions
from acformer.evaluate.resume import resumed
from acformer.evaluate.scorers import (
    accuracy_by_kind,
    bootstrap,
    exact_match,
    interval,
    most_frequent,
    normalise,
    normalise_words,
    same_words,
)
from acformer.lab.scenes.dataset import undrawn_samples


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


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("The 1,000 red-blue cats!", "1000 red blue cats"),
        ("two", "2"),
        ("I don't", "i dont"),
        ("1.5 km.", "1.5 km"),
        ("None", "0"),
        ("a", ""),
    ],
)
def test_words_are_compared_not_signs(said, meant):
    assert normalise_words(said) == meant


def test_the_same_words():
    assert same_words("the two", "2")
    assert same_words("Stop.", "stop")
    assert not same_words("three", "2")


def reply(kind, answer, prediction, picture="p", key="0", question="?"):
    return Reply(key, picture, kind, question, answer, prediction)


def test_blind_replies_fall_back_from_question_to_family_to_all():
    assert most_frequent(["x", "x", "x", "y"], ["no", "yes", "no", "red"]) == {"x": "no", "y": "red"}
    known = [
        *[reply("exist-random", answer, "", question="cat?") for answer in ("no", "yes", "no")],
        *[reply("count-all", "4", "", question="how many?")] * 3,
        *[reply("count-noun", "1", "", question=f"{n}?") for n in range(9)],
    ]
    asked = [
        reply("count-all", "2", "said", question="how many?"),
        reply("count-noun", "1", "", question="dogs?"),
        reply("exist-popular", "yes", "", question="dog?"),
        reply(None, "red", "", question="what?"),
    ]
    assert [blind.prediction for blind in blind_replies(known, asked)] == ["4", "1", "no", "1"]
    assert [blind.answer for blind in blind_replies(known, asked)] == ["2", "1", "yes", "red"]


def test_pope_by_hand():
    said = [("yes", "yes"), ("yes", "no"), ("yes", "Yes."), ("no", "yes"), ("no", "no"), ("no", "maybe")]
    measure = MEASURES["exist"]([reply("exist-random", *pair) for pair in said])
    expected = {"accuracy": 3 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 6}
    assert measure.details["random"] == pytest.approx(expected)
    both = [reply("exist-random", *pair) for pair in said] + [reply("exist-popular", "yes", "yes")]
    measure = MEASURES["exist"](both)
    assert measure.score(measure.rows.sum(axis=0)) == pytest.approx((2 / 3 + 1) / 2)
    assert measure.details["mean"]["accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    never = MEASURES["exist"]([reply("exist-random", "no", "no")])
    assert never.details["random"]["f1"] == 0.0  # nothing is or was said to be there


def test_a_circle_is_right_in_all_orders_or_not_at_all():
    circle = [reply("choose", letter, letter, key=f"1/{n}") for n, letter in enumerate("ABCD")]
    broken = [reply("choose", letter, "A", key=f"2/{n}") for n, letter in enumerate("ABCD")]
    measure = MEASURES["choose"](circle + broken)
    assert measure.score(measure.rows.sum(axis=0)) == pytest.approx(0.5)
    assert measure.details["accuracy"] == 5 / 8


def test_a_circle_is_one_picture_and_ends_in_its_order():
    """Ids may be paths: nine of ten questions about ten pictures are nine tenths."""
    for ids in ("coco/{:06d}.jpg", "coco/{}", "val/{}/7", "{}"):
        keys = [ids.format(number) for number in range(10)]
        alone = [
            reply("choose", "A", "B" if n == 0 else "A", picture=f"{n}.jpg", key=key) for n, key in enumerate(keys)
        ]
        measure = MEASURES["choose"](alone)
        assert measure.score(measure.rows.sum(axis=0)) == pytest.approx(0.9), ids
    same = [reply("choose", "A", "B" if n == 0 else "A", key=f"coco/{n:06d}.jpg") for n in range(10)]
    measure = MEASURES["choose"](same)
    assert measure.score(measure.rows.sum(axis=0)) == pytest.approx(0.9), "ten questions about one picture"


def test_the_scenes_circles_are_of_four():
    samples = islice(undrawn_samples("openmoji-scenes-small", "test"), 100)
    choices = [as_reply(sample) for sample in samples if sample.kind == "choose"]
    whole = len(choices) // 4 * 4  # the last may be cut off
    assert whole > 12
    assert MEASURES["choose"](choices).rows[:whole, 1].tolist() == [1 / 4] * whole


def test_families_and_their_average():
    replies = [
        reply("relate-side", "left", "left", picture="a"),
        reply("relate-object", "cat", "dog", picture="b"),
        reply("read", "two", "2", picture="a"),
        reply("other", "x", "x", picture="c"),
    ]
    blind = blind_replies(replies, replies)
    scores = family_scores(replies, blind)
    families = scores["families"]
    assert list(families) == ["relate", "read"]
    assert (families["relate"]["score"], families["relate"]["questions"]) == (0.5, 2)
    assert families["relate"]["interval"] == [0.0, 1.0]
    assert (families["read"]["score"], families["read"]["exact_match"]) == (1.0, 0.0)
    assert scores["average"]["score"] == 0.75
    assert scores["average"]["blind"] == 0.25  # "left", the first of four equally frequent answers
    assert family_scores([reply("exists-color", "yes", "yes")], [reply("exists-color", "yes", "no")]) == {}


@given(st.lists(st.tuples(st.sampled_from([*MEASURES]), st.booleans(), st.integers(0, 4)), min_size=1, max_size=40))
def test_perfect_answers_score_one_and_wrong_ones_zero(asked):
    for wrong, score in (("", 1.0), ("not ", 0.0)):
        replies = [
            reply(family, "yes" if yes else "no", wrong + ("yes" if yes else "no"), picture=str(picture), key=f"{n}/0")
            for n, (family, yes, picture) in enumerate(asked)
        ]
        scores = family_scores(replies, replies)
        positive = {family for family, yes, _ in asked if family != "exist" or yes}  # F1 is of what is there
        for family, found in scores["families"].items():
            assert found["score"] == pytest.approx(score if family in positive else 0.0)
            assert 0 <= found["interval"][0] <= found["interval"][1] <= 1 + 1e-12


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
    live = list(answer(*parts, samples, num_visual_tokens=budget, progress=False))
    assert len(set(live)) > 1
    for batch_size in (1, 5):
        known = answer(*parts, samples, features=features, num_visual_tokens=budget, batch_size=batch_size)
        assert list(known) == live


def test_image_tokens_without_images_are_refused(parts):
    batch = tiny.inputs("<image> what?", tiny.picture())
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="the prompts hold 5 image tokens but the images give 0"):
        parts[0].generate(**batch, max_new_tokens=2)


def test_other_budgets_from_the_same_model(parts, data):
    samples = load_samples(str(data))
    few, many = (
        list(answer(*parts, samples, num_visual_tokens=count, max_new_tokens=8, progress=False)) for count in (2, 9)
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
    assert "families" not in scores, "even and odd are no families"


def test_evaluate_scores_scenes_by_family(parts, tmp_path, monkeypatch):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("acformer.lab.scenes.dataset.KNOWN_SCENES", 50)
    monkeypatch.setattr("acformer.lab.scenes.dataset.draw_scene", lambda scene: tiny.picture(len(scene.objects)))
    scores = evaluate(parts, "openmoji-scenes-small", tmp_path / "out", limit=40, max_new_tokens=2, progress=False)
    families = scores["families"]
    assert set(families) <= set(MEASURES)
    assert sum(family["questions"] for family in families.values()) == scores["num_questions"] == 40
    blind = [family["blind"] for family in families.values()]
    assert scores["average"]["blind"] == pytest.approx(sum(blind) / len(blind))
    assert 0 < scores["average"]["blind"] < 1
    assert json.loads((tmp_path / "out/scores.json").read_text()) == scores
    first = json.loads((tmp_path / "out/predictions.jsonl").read_text().splitlines()[0])
    assert first["id"].startswith("openmoji-scenes-small:test-0-0")
    assert {known.id.partition(":")[2].split("-")[1] for known in training_questions("openmoji-scenes-small")} == {
        str(number) for number in range(50)
    }


def test_ask_and_stream(parts, data, capsys):
    picture = data.parent / "0.png"
    said = ask(*parts, picture, "what?", max_new_tokens=6, stream=True)
    assert capsys.readouterr().out == f"{said}\n"
    tokens = parts[1].tokenizer(said, add_special_tokens=False)["input_ids"]
    assert 0 < len(tokens) <= 12
    with torch.inference_mode():
        assert ask(*parts, picture, "what?", max_new_tokens=6, num_visual_tokens=2) is not None


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


def test_a_bootstrap_of_many_groups_is_drawn_piece_by_piece(monkeypatch):
    """The same draws, whatever is held at once."""
    counts = np.random.default_rng(1).integers(0, 2, size=(101, 2)).astype(float)
    whole = bootstrap(counts, lambda sums: sums[..., 0], draws=50)
    monkeypatch.setattr("acformer.evaluate.scorers.MAX_PICKS", 300)
    assert bootstrap(counts, lambda sums: sums[..., 0], draws=50) == whole


def test_an_evaluation_that_was_stopped_goes_on(parts, data, tmp_path, monkeypatch):
    import acformer.evaluate.report as report

    asked: list[list[str]] = []

    def stopping_answer(model, processor, samples, **options):
        asked.append([sample.id for sample in samples])
        for number, said in enumerate(answer(model, processor, samples, **options)):
            if len(asked) < 3 and number == 2 - len(asked):
                raise KeyboardInterrupt
            yield said

    whole = evaluate(parts, str(data), tmp_path / "whole", progress=False)
    monkeypatch.setattr(report, "answer", stopping_answer)
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(parts, str(data), out, progress=False)
        assert not (out / "predictions.jsonl").exists()
    scores = evaluate(parts, str(data), out, progress=False)
    assert asked == [list("01234"), list("1234"), list("1234")]
    assert scores | {"seconds": 0} == whole | {"seconds": 0}
    assert (out / "predictions.jsonl").read_bytes() == (tmp_path / "whole/predictions.jsonl").read_bytes()
    assert not (out / "predictions.partial.jsonl").exists()
    evaluate(parts, str(data), out, progress=False)
    assert asked[-1] == list("01234"), "what is finished is answered anew"


def test_answers_of_another_evaluation_are_not_gone_on_from(tmp_path):
    path = tmp_path / "partial.jsonl"

    def answers(start):
        yield from ("a", "b", "c")[start:]

    stopped = resumed(path, {"weights": "1"}, answers)
    assert [next(stopped), next(stopped)] == ["a", "b"]
    stopped.close()
    path.write_bytes(path.read_bytes() + b'"half')
    assert list(resumed(path, {"weights": "1"}, lambda start: [f"from {start}"])) == ["a", "b", "from 2"]
    stopped = resumed(path, {"weights": "1"}, answers)
    next(stopped)
    stopped.close()
    assert list(resumed(path, {"weights": "2"}, lambda start: [f"from {start}"])) == ["from 0"]
    path.write_text("not JSON\n")
    assert list(resumed(path, {}, lambda start: [f"from {start}"])) == ["from 0"]
