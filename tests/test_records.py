"""Records as people have them: what is read, and what is skipped by name; what exact match takes for one answer."""

import argparse
import base64
import json

import pytest
import tiny

from acformer.commands.evaluate import _evaluation_name, _folder
from acformer.data.datasets import load_samples
from acformer.data.skip_log import SkipLog
from acformer.data.sources import read_samples
from acformer.errors import DataError
from acformer.evaluate.scorers import exact_match
from acformer.images import load_image

TALK = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
IMAGE_TALK = [{"role": "user", "content": "<image>\nwhat?"}, TALK[1]]


@pytest.fixture
def read(tmp_path):
    """One record -> its sample; `DataError` with the reason where it is skipped."""
    tiny.picture().save(tmp_path / "a.png")

    def go(record: dict):
        (tmp_path / "data.json").write_text(json.dumps([record]))
        return next(iter(read_samples(tmp_path / "data.json", skipped=SkipLog(max_bad_fraction=1.0))))

    return go


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_records_own_system_prompt(read, key):
    assert read({"messages": TALK, key: "Be brief."}).messages[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("key", ["video", "audio", "sound"])
def test_other_media_are_skipped_by_name(read, key):
    with pytest.raises(DataError, match=f"holds {key}, which is neither text nor an image"):
        read({"messages": TALK, key: "a.bin"})


def test_tags_in_the_text_of_messages(read):
    sample = read({"messages": IMAGE_TALK, "images": ["a.png"]})
    assert sample.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what?"}]


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_an_image_named_in_its_part(read, key):
    content = [{"type": "image", key: "a.png"}, {"type": "text", "text": "what?"}]
    sample = read({"messages": [{"role": "user", "content": content}, TALK[1]]})
    assert [path.name for path in sample.images] == ["a.png"]


def test_parts_as_openai_writes_them(tmp_path):
    tiny.picture().save(tmp_path / "0.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "0.png").read_bytes()).decode()
    for given in ({"url": "0.png"}, "0.png", {"url": url, "detail": "low"}):
        parts = [{"type": "image_url", "image_url": given}, {"type": "text", "text": "what?"}]
        chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
        (tmp_path / "a.json").write_text(json.dumps([{"messages": chat}]))
        (sample,) = load_samples(str(tmp_path / "a.json"))
        assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "text"]
        assert load_image(sample.images[0]).tobytes() == tiny.picture().tobytes()


def test_conversations_of_roles(tmp_path):
    tiny.picture().save(tmp_path / "0.png")
    chat = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "red"}]
    (tmp_path / "a.json").write_text(json.dumps([{"image": "0.png", "conversations": chat}]))
    (sample,) = load_samples(str(tmp_path / "a.json"))
    assert sample.answer == "red"
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "text"]


def test_a_turn_that_answers_nothing_is_left_out(tmp_path):
    """As LLaVA does it."""
    turns = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]
    records = [{"conversations": turns}, {"conversations": turns[:1]}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (sample,) = load_samples(str(tmp_path / "a.json"), skipped=(skipped := SkipLog(max_bad_fraction=1.0)))
    assert [message["content"] for message in sample.messages] == ["what?", "red"]
    assert skipped.skipped == 1


def test_empty_columns_of_a_merged_table(read):
    record = {"messages": IMAGE_TALK, "conversations": [], "images": [], "image": "a.png", "answer": None, "id": None}
    sample = read(record)
    assert (len(sample.images), sample.answer, sample.id) == (1, "red", "data:1")


def test_a_number_is_an_answer(read):
    assert read({"messages": TALK, "answer": 3}).answer == "3"


@pytest.mark.parametrize(
    ("said", "answer", "same"),
    [("-5", "5", False), ("C++", "C", False), ("C#", "c", False), ("Red.", "red", True), ("- red", "red", True)],
)
def test_signs_belong_to_an_answer(said, answer, same):
    assert exact_match(said, answer) == same


def test_every_evaluation_has_a_folder_of_its_own(tmp_path):
    asked = [("easy-vqa", None, None), ("easy-vqa", [9], None), ("easy-vqa", [9], 200), ("easy-vqa:train", None, None)]
    names = [_evaluation_name(argparse.Namespace(data=d, tokens=t, limit=n)) for d, t, n in asked]
    assert names == ["easy-vqa", "easy-vqa-T9", "easy-vqa-T9-limit200", "easy-vqa-train"]
    assert _folder(str(tmp_path)) == tmp_path / "eval"
    assert str(_folder("user/repo")) == "runs/eval/user--repo"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["red", "blue", "blue", "red"], "red"),
        ([{"answer": "2", "answer_confidence": "yes"}, {"answer": "3"}, {"answer": "3"}], "3"),
        ([4], "4"),
    ],
)
def test_answers_of_several_people(read, answers, expected):
    assert read({"messages": TALK[:1], "answers": answers}).answer == expected
    assert read({"messages": TALK[:1], "answers": answers, "answer": "own"}).answer == "own"
    with pytest.raises(DataError, match="answers must be a list"):
        read({"messages": TALK[:1], "answers": {"a": "b"}})
