"""Every planted defect is named, every good record is read, whichever layout and file format it is in."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from acformer.data import datasets
from acformer.data.datasets import load_samples, open_samples
from acformer.data.samples import Sample
from acformer.data.skip_log import SkipLog
from acformer.data.sources import read_samples
from acformer.errors import DataError, UsageError


def talk(question="<image>\nWhat colour?", answer="red", **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "a", "image": "a.png", "conversations": turns, **fields}


@pytest.fixture
def folder(tmp_path):
    """An image folder with two pictures beside a file that must not be reached."""
    (tmp_path / "secret.png").touch()
    for name in ("a.png", "b.png"):
        (tmp_path / "data" / "sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    return tmp_path / "data"


def write_lines(folder, *lines):
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def read_one(folder, record) -> Sample:
    log = SkipLog()
    (sample,) = read_samples(write_lines(folder, record), skipped=log)
    assert (log.offered, log.used, log.skipped) == (1, 1, 0)
    return sample


GOOD = json.dumps(talk()).encode()
DEEP = b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
DEFECTS = {
    b"": "",  # a blank line is no record
    b"garbage": "not JSON",
    GOOD[:-5]: "not JSON",
    GOOD + b" " + GOOD: "one value",
    b'{"id": 1, "id": 2, ' + GOOD[1:]: "duplicate key 'id'",
    b'{"score": NaN, ' + GOOD[1:]: "NaN",
    b'{"score": ' + b"9" * 5000 + b", " + GOOD[1:]: "not JSON",
    DEEP: "nested too deeply",
    b"\xff\xfe": "not UTF-8",
    b"[1]": "object",
    b"{}": "object",
    json.dumps(talk(answer="\ud800")).encode(): "surrogate",
    json.dumps(talk(image="../secret.png")).encode(): "outside the image folder",
    json.dumps(talk(image="/etc/passwd")).encode(): "outside the image folder",
    json.dumps(talk(image="sub/../../secret.png")).encode(): "outside the image folder",
    json.dumps(talk(image="c.png")).encode(): "not in the image folder",
    json.dumps(talk(image="sub")).encode(): "not in the image folder",
    json.dumps(talk(image="a\0.png")).encode(): "not in the image folder",
    json.dumps(talk(image="a" * 5000)).encode(): "not in the image folder",
    json.dumps(talk(image=3)).encode(): "file name",
    json.dumps(talk(image=None)).encode(): "1 <image> tag but 0 images",
    json.dumps(talk(image=["a.png", "b.png"])).encode(): "1 <image> tag but 2 images",
    json.dumps(talk(conversations=[])).encode(): "object",
    json.dumps(talk(conversations=["a"])).encode(): "turn",
    json.dumps(talk(conversations=[{"from": "robot", "value": ""}])).encode(): "turn",
    json.dumps(talk(answer=3)).encode(): "turn",
    json.dumps(talk(kind=3)).encode(): "kind",
    json.dumps({"messages": [{"role": "tool", "content": ""}]}).encode(): "role",
    json.dumps({"messages": [{"role": "user", "content": [{"type": "video"}]}]}).encode(): "part",
}


def test_every_planted_defect_is_named(folder, tmp_path):
    lines = [line for defect in DEFECTS for line in (defect, GOOD)]
    log = SkipLog(tmp_path / "run" / "skipped.jsonl", max_bad_fraction=0.5)
    path = write_lines(folder, *lines)
    samples = load_samples(path, skipped=log)
    assert len(samples) == log.used == len(DEFECTS)
    assert log.used + log.skipped == log.offered == len(lines) - 1
    entries = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().split("\n")[:-1]]
    expected = {2 * index + 1: reason for index, reason in enumerate(DEFECTS.values()) if reason}
    assert [entry["record"] for entry in entries] == list(expected)
    assert {entry["file"] for entry in entries} == {str(path)}
    for entry in entries:
        assert expected[entry["record"]] in entry["reason"]


def test_a_list_is_read_past_a_bad_record(folder):
    path = folder / "data.json"
    good = GOOD.decode()
    path.write_text(f'\ufeff [ {good}, {{"a": NaN, "b": 1}}, 3, {{"a": 1, "a": 2}},\r\n {good}]\n')
    log = SkipLog()
    samples = list(read_samples(path, skipped=log))
    assert [sample.record for sample in samples] == [1, 5]
    assert (log.used, log.skipped) == (2, 3)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"[]", "empty"),
        (b"\x89PNG\r\n\x1a\n", "record 1: not UTF-8"),
        (b'{\n"id": 1\n}', "record 1"),
        (b"[" + GOOD, "data:1: not JSON"),
        (b"[" + GOOD + b"," + GOOD[:9], "data:2: not JSON"),
        (b"[" + GOOD + b"]]", "data:1: not JSON"),
        (b"[" + GOOD + b",]", "data:2: not JSON"),
        (b"[" + DEEP + b"]", "nested too deeply"),
        (b"[\xff]", "not UTF-8"),
    ],
)
def test_a_file_broken_as_a_whole_is_named(folder, content, what):
    path = folder / "data"
    path.write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        list(read_samples(path, skipped=SkipLog()))
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(folder):
    for path in (folder / "none.json", folder):
        with pytest.raises(DataError, match="cannot read"):
            list(read_samples(path, skipped=SkipLog()))


def test_lines_end_at_newlines_only(folder):
    odd = "\u2028 \u2029 \x85 \x0b \x0c"
    line = json.dumps(talk(answer=odd), ensure_ascii=False).replace("\\u000b", "x").replace("\\f", "x").encode()
    path = write_lines(folder, b"\xef\xbb\xbf" + line + b"\r", line)
    assert [sample.record for sample in load_samples(path)] == [1, 2]


def test_a_llava_record(folder):
    system = {"from": "system", "value": "Be brief."}
    sample = read_one(folder, talk(conversations=[system, *talk()["conversations"]], kind="colour"))
    assert sample.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": "red"},
    )
    assert sample.prompt == sample.messages[:2]
    assert sample.images == (folder / "a.png",)
    assert (sample.id, sample.answer, sample.kind, sample.record) == ("a", "red", "colour", 1)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("What?\n<image>", ["<image>", "What?"]),
        ("<image>", ["<image>"]),
        ("Is <image>\nlike <image>?", ["Is ", "<image>", "like ", "<image>", "?"]),
        ("<image>\n<image>\nSame?", ["<image>", "<image>", "Same?"]),
    ],
)
def test_tags_become_parts(folder, text, parts):
    sample = read_one(folder, talk(text, image=["a.png", "b.png"][: text.count("<image>")]))
    image, words = {"type": "image"}, [{"type": "text", "text": part} for part in parts]
    assert sample.messages[0]["content"] == [
        image if part == "<image>" else word for part, word in zip(parts, words, strict=True)
    ]


def test_text_only_and_the_tag_in_an_answer(folder):
    record = talk("How is a picture written?", "As <image>.")
    del record["image"], record["id"]
    sample = read_one(folder, record)
    assert (sample.id, sample.images, sample.answer) == ("data:1", (), "As <image>.")


def test_chat_messages(folder):
    parts = [{"type": "text", "text": "Is <image>"}, {"type": "image"}]
    answer = [{"type": "text", "text": "yes"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    sample = read_one(folder, {"messages": messages, "images": ["sub/../b.png"], "id": 7})
    assert (sample.id, sample.images, sample.answer) == ("7", (folder / "b.png",), "yes")
    assert sample.messages == tuple(messages)
    asked = read_one(folder, {"messages": [{"role": "user", "content": "?"}], "answer": "no"})
    assert (asked.prompt, asked.answer) == (asked.messages, "no")


def test_pictures_lie_under_the_image_root(folder, tmp_path):
    path = write_lines(folder, talk(image="data/a.png"), talk(image=str(folder / "b.png")))
    samples = load_samples(path, image_root=tmp_path)
    assert [sample.images for sample in samples] == [(folder / "a.png",), (folder / "b.png",)]


def test_too_many_bad_records_stop_the_run(folder, tmp_path):
    path = write_lines(folder, *[talk()] * 98, talk(image="c.png"), talk(image="d.png"))
    log = SkipLog(tmp_path / "skipped.jsonl")
    with pytest.raises(DataError, match=r"2 of 100 records are bad, more than 1\.0%.*:99: .*c\.png.*skipped"):
        load_samples(path, skipped=log)
    assert len(load_samples(path, skipped=SkipLog(max_bad_fraction=0.02))) == 98


def test_a_log_starts_afresh_and_counts_a_record_once(tmp_path):
    path = tmp_path / "skipped.jsonl"
    path.write_text("old\n")
    log = SkipLog(path)
    assert not path.exists()
    log.offered = 3
    for _ in range(2):
        log.skip("file", 1, "torn")
    assert (log.used, log.skipped, path.read_text().count("\n")) == (2, 1, 1)


@given(st.binary(max_size=40))
def test_any_bytes_give_samples_or_a_data_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError):
        list(read_samples(path, skipped=SkipLog()))


def test_easy_vqa_names(folder, monkeypatch):
    monkeypatch.setattr(datasets, "embedded_path", {"easy-vqa": folder}.__getitem__)
    for part in ("train", "test"):
        (folder / f"{part}.jsonl").write_bytes(json.dumps(talk(id=part)).encode())
    assert [load_samples(f"easy-vqa{part}")[0].id for part in ("", ":train", ":test")] == [
        "train",
        "train",
        "test",
    ]
    assert [open_samples(f"easy-vqa{part}").sample(0).id for part in ("", ":test")] == ["train", "test"]
    with pytest.raises(UsageError, match="did you mean 'train'"):
        load_samples("easy-vqa:trian")


def test_drawn_scenes_go_through_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path))
    monkeypatch.setattr("acformer.lab.scenes.dataset.draw_scene", lambda scene: Image.new("RGB", (4, 4)))
    log = SkipLog()
    samples = load_samples("openmoji-scenes-small", limit=3, skipped=log)
    assert (log.offered, log.used, log.skipped) == (3, 3, 0)
    assert all(":train-0-" in sample.id and sample.images[0].is_file() for sample in samples)


def test_a_limit_counts_only_what_was_looked_at(folder):
    path = write_lines(folder, talk(), talk(image="c.png"), talk(), talk(image="d.png"), talk())
    log = SkipLog(max_bad_fraction=0.5)
    assert [sample.record for sample in load_samples(path, skipped=log, limit=2)] == [1, 3]
    assert (log.offered, log.used, log.skipped) == (3, 2, 1)


def test_copies_of_a_log_share_its_file(tmp_path):
    path = tmp_path / "run" / "skipped.jsonl"
    log = SkipLog(path, max_bad_fraction=0.2)
    log.offered = 9
    worker = pickle.loads(pickle.dumps(log))
    other_rank = SkipLog(path, max_bad_fraction=0.2, fresh=False)
    other_rank.offered = 9
    worker.skip("file", 1, "torn")
    for copy in (log, other_rank, worker):
        copy.skip("file", 1, "torn")
        assert (copy.used, copy.skipped) == (8, 1)
    log.skip("file", 2, "torn")
    assert (worker.skipped, path.read_text().count("\n")) == (2, 2)
    with pytest.raises(DataError, match=r"2 of 9 records are bad.*first is file:1"):
        other_rank.check()


def test_a_log_forgets_what_a_fresh_one_removes(tmp_path):
    path = tmp_path / "skipped.jsonl"
    path.write_text('{"file": "older", "record": 1, "reason": "of another run"}\n')
    other_rank = SkipLog(path, fresh=False)
    assert other_rank.skipped == 1
    first_rank = SkipLog(path)
    (tmp_path / "takes the inode").touch()
    for record in range(3):
        first_rank.skip("file", record, "torn")
    assert other_rank.skipped == 3
