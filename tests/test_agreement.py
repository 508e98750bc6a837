"""`bench agreement`: shares and gaps that can be checked by hand, and the two files on a tiny encoder."""

import json

import pytest
import tiny
import torch

from acformer.anchors.search import select_anchors
from acformer.lab.bench import agreement
from acformer.lab.bench.agreement import (
    bench_agreement,
    compare,
    measure_agreement,
    noise,
    photograph_crops,
    photographs,
    swap_gaps,
)


def rows(batch: int, heads: int, patches: int) -> torch.Tensor:
    return torch.randn(batch, heads, patches, generator=torch.Generator().manual_seed(0)).softmax(-1)


def test_a_swap_and_what_follows_from_it():
    """Head 0 takes patch 1 for patch 0, a gap of 0.1; head 1 finds patch 0 free again and takes it: no swap."""
    reference = torch.tensor([[[1.0, 0.9, 0.1, 0.0], [0.8, 0.7, 0.6, 0.5]]])
    rounded = reference.clone()
    rounded[0, 0, 0] = 0.5
    assert swap_gaps(reference, rounded, 2).tolist() == pytest.approx([0.1])
    found = compare(reference, rounded, 2, bound=0.2)
    assert (found["same"], found["identical"], found["swaps"], found["explained"]) == (1, 1, 1, 1), "only the order"
    assert compare(reference, rounded, 1, bound=0.05) == {
        "chance": 0.25,
        "same": 0.0,
        "least": 0.0,
        "identical": 0.0,
        "swaps": 1.0,
        "gap_median": pytest.approx(0.1),
        "gap_largest": pytest.approx(0.1),
        "bound": 0.05,
        "explained": 0.0,
    }


def test_nothing_differs_from_itself():
    scores = rows(3, 4, 50)
    found = compare(scores, scores.clone(), 20, bound=0.0)
    assert (found["same"], found["least"], found["identical"], found["swaps"]) == (1, 1, 1, 0)
    assert found["explained"] is None
    assert noise(scores, scores * 1.25) == pytest.approx(0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_explains_every_swap_of_a_rounded_row(dtype):
    """1 - s(came) / s(left) <= eps for round to nearest; the search as such leaves no other reason for a swap."""
    scores = 0.5 + torch.rand(10, 8, 1000, generator=torch.Generator().manual_seed(0)) / 2
    eps = torch.finfo(dtype).eps
    found = compare(scores, scores.to(dtype), 200, bound=eps)
    assert found["explained"] == 1
    assert found["swaps"] > 1
    tight = compare(scores, scores.to(dtype), 200, bound=eps / 100)
    assert tight["explained"] < 0.5, "the bound tells something"


def test_fewer_anchors_than_heads():
    scores = rows(2, 8, 30)
    other = rows(2, 8, 30).flip(0)
    assert len(swap_gaps(scores, other, 3)) == 2 * 3
    assert not torch.equal(select_anchors(scores, 3), select_anchors(other, 3))


@pytest.fixture
def encoder(make_tower, tmp_path) -> str:
    make_tower("dinov2").save_pretrained(tmp_path / "encoder")
    statistics = {"image_processor_type": "BitImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "encoder/preprocessor_config.json").write_text(json.dumps(statistics))
    return str(tmp_path / "encoder")


def test_a_whole_encoder(encoder):
    found = measure_agreement(encoder, tiny.pictures(range(6)), [torch.bfloat16], num_anchors=8, image_size=56)
    assert [(row["case"], row["dtype"]) for row in found] == [
        ("kernel", "float32"),
        ("row", "bfloat16"),
        ("encoder", "bfloat16"),
    ]
    kernel, row, whole = found
    assert kernel["same"] == 1, "float32 kernels differ by 1e-6 and these scores by more"
    assert row["bound"] == 2**-7
    assert 1 > whole["same"] > 2 * whole["chance"]
    assert whole["bound"] > row["bound"] > kernel["bound"]


def test_files(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "photographs", lambda: [tmp_path / "one.png"])
    monkeypatch.setattr(agreement, "photograph_crops", lambda sources, side: tiny.pictures(range(3)))
    text = bench_agreement(encoder, [], [torch.float16], num_anchors=8, image_size=28, out=tmp_path, progress=False)
    assert (tmp_path / "agreement.md").read_text() == text
    record = json.loads((tmp_path / "agreement.json").read_text())
    assert (record["torch"], record["num_anchors"], record["chance"]) == (torch.__version__, 8, 0.5)
    assert [row["case"] for row in record["rows"]] == ["kernel", "row", "encoder"]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {11}
    assert "3 crops of 1 scikit-image photographs (they overlap), 8 anchors each" in text.replace("\n", " ")

    tiny.picture().save(tmp_path / "image.png")
    paths = [tmp_path / "image.png"]
    text = bench_agreement(encoder, paths, [], num_anchors=8, image_size=28, out=tmp_path / "own", progress=False)
    assert "1 images" in text
    assert f"--vision {encoder} --images {paths[0]} --device cpu --tokens 9`" in text


@pytest.mark.embedded
def test_crops_of_the_photographs():
    crops = photograph_crops(photographs(), 336)
    assert len(crops) == 108
    assert all(crop.width == crop.height >= 336 for crop in crops)
    assert [crop.tobytes() for crop in crops[:3]] == [
        crop.tobytes() for crop in photograph_crops(photographs(), 336)[:3]
    ]
