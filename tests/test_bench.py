"""The encoder benchmark on a tiny geometry: what it writes and says, and that the variants take turns."""

import json

import pytest
import torch

from acformer import bench

VARIANTS = ["floor", "cls_row", "anchors", "all_layers", "authors"]


def test_bench_writes_json_and_a_table(tmp_path, monkeypatch):
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    monkeypatch.setattr(bench, "CLIP_L_336", {**tiny, "image_size": 28, "patch_size": 7})
    said = bench.bench_encoder([1, 2], num_anchors=4, rounds=3, out=tmp_path / "new/folder")

    path = tmp_path / "new/folder/encoder-cpu-batch-1-2.json"
    record = json.loads(path.read_text())
    assert (record["num_anchors"], record["rounds"], record["torch"]) == (4, 3, torch.__version__)
    assert [(row["batch"], row["variant"]) for row in record["rows"]] == [
        (b, name) for b in (1, 2) for name in VARIANTS
    ]
    floors = [row for row in record["rows"] if row["variant"] == "floor"]
    assert all(row["ratio"] == 1 and row["ratio_quartiles"] == [1, 1] for row in floors)

    head, rule, *rows, last = said.splitlines()
    assert (head.count("|"), rule) == (6, "|---|---|---|---|---|")
    assert [line.split(" | ")[1] for line in rows] == VARIANTS * 2
    assert last == str(path)


def test_variants_take_turns():
    """One of each a round, forwards and backwards; the first round is warm-up and is not counted."""
    calls = []
    variants = {name: lambda pixels, name=name: calls.append((name, pixels.shape[0])) for name in "abc"}
    seconds = bench.interleaved(variants, torch.zeros(2, 1), rounds=2)
    assert calls == [(name, 2) for name in "cbaabccba"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_ratios_are_of_the_same_round():
    rows = bench.summary({"floor": [1.0, 2.0, 4.0], "slow": [2.0, 4.0, 12.0]}, batch=8, floor="floor")
    assert [row["ratio"] for row in rows] == [1, 2]
    assert rows[1]["seconds"] == pytest.approx(4)
    [only] = bench.summary({"floor": [3.0]}, batch=1, floor="floor")
    assert only["ratio_quartiles"] == [1, 1]
