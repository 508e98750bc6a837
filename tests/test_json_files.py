"""Files of JSON: what the index says is what a parser would, at every border of a piece; and it is made once."""

import gzip
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acformer.data import index_cache, json_files, json_scan
from acformer.data.datasets import load_samples, open_samples
from acformer.data.json_files import JsonFile
from acformer.data.skip_log import SkipLog
from acformer.errors import DataError

TEXT = st.text(alphabet='ab"\\{}[],\n é<image>', max_size=12)
VALUES = st.recursive(
    TEXT | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "SMALL", 0)
    return tmp_path / "cache/data"


def talk(number: int, answer: str = "red") -> dict:
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "conversations": turns}


@given(st.lists(VALUES, max_size=8), st.integers(1, 9), st.sampled_from([None, 2]), st.booleans())
def test_elements_are_where_a_parser_finds_them(tmp_path_factory, values, chunk, indent, as_ascii):
    path = tmp_path_factory.getbasetemp() / "list.json"
    path.write_text(" \n" + json.dumps(values, indent=indent, ensure_ascii=as_ascii) + "\r\n", encoding="utf-8")
    before, json_scan.CHUNK = json_scan.CHUNK, chunk
    try:
        arrays, _ = json_scan.scan_list(path, 3)
    finally:
        json_scan.CHUNK = before
    content = path.read_bytes()
    assert [json.loads(content[start:end]) for start, end in arrays["spans"]] == values
    said = [sum(map(len, _strings(content[start:end]))) for start, end in arrays["spans"]]
    assert arrays["text"].tolist() == said
    assert len(arrays["images"]) == len(values)


def _strings(content: bytes) -> list[bytes]:
    """What stands between quotes, as written."""
    found, at = [], content.find(b'"')
    while at >= 0:
        end = at + 1
        while content[end : end + 1] != b'"':
            end += 2 if content[end : end + 1] == b"\\" else 1
        found.append(content[at + 1 : end])
        at = content.find(b'"', end + 1)
    return found


@given(st.lists(VALUES, max_size=8), st.integers(1, 9))
def test_lines_are_where_a_parser_finds_them(tmp_path_factory, values, chunk):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    lines = [line for value in values for line in (json.dumps(value), "", "  ")]
    path.write_text("\n".join(lines))
    before, json_scan.CHUNK = json_scan.CHUNK, chunk
    try:
        arrays, _ = json_scan.scan_lines(path)
    finally:
        json_scan.CHUNK = before
    content = path.read_bytes()
    assert [json.loads(content[start:end]) for start, end in arrays["spans"]] == values
    assert arrays["numbers"].tolist() == [1 + 3 * number for number in range(len(values))]


def test_images_and_lengths_are_counted_without_parsing(tmp_path, monkeypatch):
    records = [talk(0), talk(1, "red " * 100), talk(2)]
    records[0]["image"] = "a.png"
    records[0]["conversations"][0]["value"] = "<image>\nwhat?"
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "same?"}]
    records.append({"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": parts}]})
    (tmp_path / "data.json").write_text(json.dumps(records, indent=2))
    monkeypatch.setattr(json_files.StrictDecoder, "first_value", None)
    samples = open_samples(str(tmp_path / "data.json"))
    lengths = samples.lengths(1000)
    assert (lengths // 1000).tolist() == [1, 0, 0, 2]
    assert 100 < lengths[1] < 130
    assert lengths[2] < 20


def test_the_index_is_made_once_and_anew_for_another_file(tmp_path, monkeypatch, cache):
    path, scanned = tmp_path / "data.json", []
    scan = json_scan.scan_list
    monkeypatch.setattr(json_files, "scan_list", lambda *args: scanned.append(1) or scan(*args))
    path.write_text(json.dumps([talk(0), talk(1)]))
    for _ in range(2):
        assert [sample.id for sample in load_samples(path)] == ["0", "1"]
    assert len(scanned) == 1
    assert isinstance(JsonFile(path).spans, np.memmap)
    path.write_text(json.dumps([talk(2), talk(1)]))
    os.utime(path, ns=(1, 1))
    assert [sample.id for sample in load_samples(path)] == ["2", "1"]
    assert len(scanned) == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "data.json").write_text(json.dumps([talk(0)]))
    monkeypatch.setenv("ACFORMER_CACHE", "/proc/nowhere")
    assert [sample.id for sample in load_samples(tmp_path / "data.json")] == ["0"]


@pytest.mark.parametrize("lines", [True, False])
def test_what_gzip_has_packed(tmp_path, lines):
    text = "\n".join(json.dumps(talk(n)) for n in range(3)) if lines else json.dumps([talk(n) for n in range(3)])
    path = tmp_path / ("data.jsonl.gz" if lines else "data.json.gz")
    path.write_bytes(gzip.compress(text.encode()))
    for _ in range(2):
        samples = load_samples(path)
        assert [sample.id for sample in samples] == ["0", "1", "2"]
        assert (samples[0].file, samples[2].record) == (str(path), 3)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"data\.json.*gz is damaged"):
        load_samples(path)


def test_one_object_on_many_lines_is_one_record(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(talk(7), indent=2))
    assert [sample.id for sample in load_samples(tmp_path / "one.json")] == ["7"]
    (tmp_path / "table.json").write_text(json.dumps({"train": [talk(7)], "version": 1}, indent=2))
    with pytest.raises(DataError, match=r"record 1: a record is an object with one of .*; this one has train, version"):
        load_samples(tmp_path / "table.json")


def test_a_record_broken_inside_hides_none(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(f"[{json.dumps(talk(0))}, {{'id': tru}}, {json.dumps(talk(2))}]")
    log = SkipLog(tmp_path / "skipped.jsonl", max_bad_fraction=0.5)
    assert [sample.record for sample in load_samples(path, skipped=log)] == [1, 3]
    (entry,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert (entry["record"], "not JSON" in entry["reason"]) == (2, True)


def test_a_copy_in_another_process_opens_the_file_itself(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([talk(0), talk(1)]))
    samples = open_samples(str(tmp_path / "data.json"))
    assert samples.sample(1).id == "1"
    assert pickle.loads(pickle.dumps(samples)).sample(0).id == "0"


def test_two_files_of_like_ends_are_told_apart_by_their_time(tmp_path, monkeypatch):
    monkeypatch.setattr(index_cache, "ENDS", 4)
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for number, path in enumerate(paths):
        path.write_text(json.dumps([talk(number)]))
        os.utime(path, ns=(number, number))
    assert [load_samples(path)[0].id for path in paths] == ["0", "1"]


def test_of_a_small_file_nothing_is_kept(tmp_path, monkeypatch, cache):
    monkeypatch.undo()
    monkeypatch.setenv("ACFORMER_CACHE", str(cache.parent))
    (tmp_path / "data.json").write_text(json.dumps([talk(0)]))
    assert len(load_samples(tmp_path / "data.json")) == 1
    assert not cache.exists()


def test_a_gzip_file_that_would_fill_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 300 * 2**20, compresslevel=1))
    with pytest.raises(DataError, match=r"data\.jsonl\.gz unpacks to more than [\d,]+ bytes: it is hardly text"):
        JsonFile(path)
    assert not list((tmp_path / "cache").rglob("*unpacked*json"))
