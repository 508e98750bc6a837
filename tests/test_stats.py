"""Statistics of anchors: measures against values worked out by hand, views mapped back, runs that go on."""

import csv
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from acformer.anchors.search import select_anchors
from acformer.cli import main
from acformer.errors import DataError, UsageError
from acformer.hf.build import square_image_processor
from acformer.images import load_image
from acformer.lab.stats.measure import chance_levels, encode_views, grid_distance, measure
from acformer.lab.stats.overlap import ACTIVATIONS, MAIN, SALIENCES, SHARES, activation_scores, overlap_name, overlaps
from acformer.lab.stats.rows import find_images, group_of, make_rows
from acformer.lab.stats.run import StatsConfig, run_stats
from acformer.lab.stats.stability import VIEWS, neighbour_distance, set_agreement, stability
from acformer.lab.stats.summary import read_summary, summarise
from acformer.vision.encoder import load_vision_encoder
from acformer.vision.features import VisionFeatures

GRID = (12, 12)


def patches(*indices):
    return torch.tensor(indices, dtype=torch.int64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random DINOv2 of 6 x 6 patches at 84 pixels, with its image processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=84))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    BitImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def images(tmp_path):
    """Three images in one subfolder, two beside it."""
    random = np.random.default_rng(0)
    for name in ("crops/0.png", "crops/1.png", "crops/2.png", "a.png", "b.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def plan(folder, images):
    return StatsConfig(folder, images, num_anchors=8, image_size=84)


# Overlap


def test_overlap_counts_what_stands_out_and_is_attended():
    """Patches 0..9 of 100 stand out, [CLS] attends to 5..14: half of the best tenth, all within the best fifth."""
    features = torch.zeros(100, 8)
    features[:10, 0] = torch.arange(20.0, 10.0, -1)
    attention = torch.full((2, 100), 0.001)
    attention[:, 5:15] = torch.linspace(0.09, 0.05, 10)
    found = overlaps(features, attention)
    for activation in ("pca3", "pc1", "deviation", "norm", "brightness"):
        for salience in SALIENCES:
            assert found[overlap_name(activation, salience, 0.1, 0.1)] == 0.5, (activation, salience)
    # The best 5 are 0..4, which none attends to; of the rest the lowest indices come first, so all are in the best 20.
    assert found[overlap_name(*MAIN, 0.05, 0.1)] == 0
    assert found[overlap_name(*MAIN, 0.05, 0.2)] == 1
    assert found[overlap_name(*MAIN, 0.1, 0.05)] == 0.5
    assert found[overlap_name(*MAIN, 0.1, 0.2)] == 1


def test_pca_sees_three_dimensions_and_deviation_all():
    """Patch 0 alone goes out along a fourth axis, shorter than the spread of the other three."""
    torch.manual_seed(0)
    features = torch.zeros(200, 4)
    features[1:, :3] = torch.randn(199, 3)
    features[0, 3] = 8.0  # variance 64 / 200 < 1
    scores = activation_scores(features)
    assert scores["deviation"].argmax() == 0
    assert scores["pca3"].argmax() != 0
    assert (scores["pc1"] <= scores["pca3"] + 1e-5).all()
    assert (scores["pca3"] <= scores["deviation"] + 1e-4).all()
    assert scores.keys() == ACTIVATIONS.keys()


def test_random_features_overlap_by_chance():
    """The mean over 60 random images: within four standard errors of the hypergeometric distribution."""
    generator = torch.Generator().manual_seed(0)
    chance = chance_levels(4, 16, GRID)
    runs = [
        overlaps(torch.randn(144, 8, generator=generator), torch.rand(4, 144, generator=generator)) for _ in range(60)
    ]
    for name, value in runs[0].items():
        ours = round(float(name.split("_")[-2]) / 100 * 144)
        expected = chance[name]
        variance = expected * (1 - expected) / ours * (144 - ours) / 143
        mean = sum(run[name] for run in runs) / 60
        assert abs(mean - expected) < 4 * math.sqrt(variance / 60), (name, value)


# Views and stability


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_mapped_back_to_where_it_came_from(name):
    """One dark patch on white: wherever the view shows it, its darkest patch maps back to that patch."""
    view, side = VIEWS[name], 24 * 14
    for row, column in ((12, 12), (7, 3), (19, 21), (20, 8)):
        image = Image.new("RGB", (side, side), "white")
        ImageDraw.Draw(image).rectangle((column * 14, row * 14, column * 14 + 13, row * 14 + 13), "black")
        seen = np.asarray(view.change(image).convert("L"), dtype=float)
        assert seen.shape == (side, side)
        darkness = 255 - seen.reshape(24, 14, 24, 14).mean(axis=(1, 3))
        darkest = patches(int(darkness.argmax()))
        assert view.origin(darkest, (24, 24)).tolist() == [row * 24 + column]
        assert len(view.visible(patches(row * 24 + column), (24, 24))) == 1


def test_the_crop_leaves_out_two_patches_at_each_edge():
    inside = VIEWS["crop"].visible(torch.arange(576), (24, 24))
    assert len(inside) == 400
    assert {*inside.tolist()} == {row * 24 + column for row in range(2, 22) for column in range(2, 22)}
    assert {*VIEWS["crop"].origin(torch.arange(576), (24, 24)).tolist()} == {*inside.tolist()}


@given(grid=st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_every_patch_of_a_view_comes_from_a_visible_patch(grid):
    everything = torch.arange(grid[0] * grid[1])
    for view in VIEWS.values():
        origin = view.origin(everything, grid)
        assert 0 <= origin.min() <= origin.max() < len(everything)
    assert torch.equal(VIEWS["flip"].origin(VIEWS["flip"].origin(everything, grid), grid), everything)


def test_agreement_by_hand():
    """Of 0, 13, 50 on a grid of 12 columns: 0 stays, 13 (row 1, column 1) has a neighbour at 26 (2, 2), 50 has none."""
    found = set_agreement(patches(0, 13, 50), patches(0, 26, 100), GRID)
    assert found == pytest.approx({"jaccard": 1 / 5, "kept_0": 1 / 3, "kept_1": 2 / 3})
    assert set_agreement(patches(11), patches(12), GRID)["kept_1"] == 0  # the end of a row is not next to the next row
    assert all(math.isnan(value) for value in set_agreement(patches(), patches(1), GRID).values())


def test_unchanged_anchors_are_wholly_kept_and_chance_is_their_share():
    anchors = torch.arange(0, 144, 9)
    mirrored = (anchors // 12) * 12 + 11 - anchors % 12
    drawn = select_anchors(torch.rand(400, 1, 144, generator=torch.Generator().manual_seed(0)), 16)
    row = stability(anchors, {"jpeg": anchors, "flip": mirrored}, drawn, GRID)
    for name in ("jpeg", "flip"):
        assert row[f"{name}_kept_0"] == row[f"{name}_kept_1"] == row[f"{name}_jaccard"] == 1
        # 16 of 144; hypergeometric variance 16 * 1/9 * 8/9 * 128/143 = 1.41, so 400 sets lie within 0.015 of it.
        assert row[f"{name}_kept_0_chance"] == pytest.approx(1 / 9, abs=0.015)


def test_distance_between_anchors():
    assert neighbour_distance(patches(0, 1, 24), GRID) == pytest.approx((1 + 1 + 2) / 3)
    assert math.isnan(neighbour_distance(patches(5), GRID))
    assert grid_distance(36, GRID) == 2
    assert grid_distance(144, GRID) == 1


# One image


def made_up(attention, features=None):
    """An image with its views, all alike."""
    features = torch.randn(attention.shape[1], 8) if features is None else features
    views = 1 + len(VIEWS)
    side = math.isqrt(attention.shape[1])
    return VisionFeatures(features.expand(views, -1, -1), attention.expand(views, -1, -1), (side, side), 0)


def test_attention_mass_and_its_ceiling():
    """Two heads of which the first takes patches 0 and 1, the second, left with 2 and 3, would rather have 0."""
    attention = torch.zeros(2, 16)
    attention[0, :3] = torch.tensor([0.6, 0.3, 0.1])
    attention[1, :4] = torch.tensor([0.5, 0.0, 0.2, 0.1])
    row = measure(made_up(attention), 4, "x")
    assert row["anchors"] == "0 1 2 3"
    assert row["mass_anchors"] == row["mass_best"] == pytest.approx(1)
    assert row["mass_patches"] == pytest.approx(0.9)
    two = measure(made_up(attention), 2, "x")
    assert two["anchors"] == "0 2"
    assert two["mass_anchors"] == pytest.approx((0.55 + 0.15) / 0.9)
    assert two["mass_best"] == pytest.approx((0.55 + 0.15) / 0.9)
    # Each head's best 2: {0, 1} and {0, 2}.
    assert (row["heads_1"], row["heads_2"], row["heads_shared"]) == (2, 1, pytest.approx(1 / 3))


def test_heads_that_choose_alone_share_as_computed():
    generator = torch.Generator().manual_seed(0)
    rows = [measure(made_up(torch.rand(4, 144, generator=generator)), 48, "x") for _ in range(40)]
    chance = chance_levels(4, 48, GRID)
    for heads in range(1, 5):
        mean = sum(float(row[f"heads_{heads}"]) for row in rows) / 40
        # Counts of a rare event vary like Poisson's; four standard errors of a mean of 40.
        assert abs(mean - chance[f"heads_{heads}"]) < 4 * math.sqrt(chance[f"heads_{heads}"] / 40)
    assert sum(heads * chance[f"heads_{heads}"] for heads in range(1, 5)) == pytest.approx(48)


def test_patches_of_great_norm_are_found():
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(144, 8), dim=-1) * (10 + 0.1 * torch.randn(144, 1))
    features[7] *= 5
    features[90] *= 4
    attention = torch.rand(2, 144)
    attention[:, 7] = 2
    row = measure(made_up(attention, features), 4, "x")
    assert row["outliers"] == pytest.approx(2 / 144)
    assert (row["outlier_anchors"], row["anchor_outliers"]) == (0.25, 0.5)
    assert row["max_norm"] == pytest.approx(5, rel=0.05)
    plain = measure(made_up(attention, torch.ones(144, 8)), 4, "x")
    assert plain["outliers"] == 0
    assert math.isnan(plain["anchor_outliers"])


def test_no_attention_no_statistics():
    features = VisionFeatures(torch.randn(5, 16, 8), None, (4, 4), 0)
    with pytest.raises(UsageError, match="no \\[CLS\\] attention"):
        measure(features, 4, "x")


def test_seen_are_the_square_and_its_views(folder, images):
    encoder, processor = load_vision_encoder(folder), square_image_processor(folder, 84)
    features = encode_views(load_image(images / "a.png"), encoder, processor, 84)
    assert features.tokens.shape[0] == 1 + len(VIEWS)
    alone = encoder(processor(load_image(images / "a.png"), return_tensors="pt")["pixel_values"])
    # The same pixels, in batches of 5 and of 1.
    torch.testing.assert_close(features.tokens[0], alone.tokens[0], atol=1e-4, rtol=1e-4)


# Rows and runs


def test_images_are_found_below_and_evenly_taken(images, tmp_path):
    names = [path.as_posix() for path in find_images(images)]
    assert names == ["a.png", "b.jpg", "crops/0.png", "crops/1.png", "crops/2.png"]
    assert [path.as_posix() for path in find_images(images, 2)] == ["a.png", "crops/0.png"]
    assert len(find_images(images, 99)) == 5
    assert [group_of(name) for name in names] == ["a.png", "b.jpg", "crops", "crops", "crops"]
    with pytest.raises(DataError, match="no images"):
        find_images(tmp_path / "nothing")


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    made = []

    def make(path):
        made.append(path.name)
        if path.name == "c" and made.count("c") == 1:
            raise KeyboardInterrupt
        return {"anchors": "1 2", "value": 1 / 3}

    images = [Path(name) for name in "abcd"]
    with pytest.raises(KeyboardInterrupt):
        make_rows(tmp_path, {"k": 1}, images, make, progress=False)
    with (tmp_path / "images.csv").open("a") as file:
        file.write("c,1 2,0.33")  # cut off while writing
    settings, rows = make_rows(tmp_path, {"k": 1, "made_on": "another machine"}, images, make, progress=False)
    assert made == ["a", "b", "c", "c", "d"]
    assert settings == {"k": 1}
    assert list(rows) == ["a", "b", "c", "d"]
    assert rows["a"] == {"image": "a", "anchors": "1 2", "value": 0.3333} == {**rows["d"], "image": "a"}
    with (tmp_path / "images.csv").open() as file:
        assert [row["image"] for row in csv.DictReader(file)] == ["a", "b", "c", "d"]
    with pytest.raises(UsageError, match=r"other settings \(k\)"):
        make_rows(tmp_path, {"k": 2}, images, make)


def test_intervals_draw_groups_not_images():
    """Ten groups of ten equal values: the images of a group say nothing new, so the interval is that of ten."""

    def row(value):
        return {"anchors": "0 3", "outliers": 0.0, "jpeg_jaccard_chance": 0.0, "jpeg_kept_0_chance": 0.0} | {
            "jpeg_kept_1_chance": 0.0,
            "value": value,
        }

    settings = {"grid": [3, 3], "num_heads": 2, "num_anchors": 2}
    values = np.random.default_rng(0).normal(size=10)
    crops = {f"{place}/{crop}": row(value) for place, value in enumerate(values) for crop in range(10)}
    alone = {f"{place}": row(value) for place, value in enumerate(values)}
    together, single = (summarise("x", settings, rows).estimates["value"] for rows in (crops, alone))
    assert together == pytest.approx(single, nan_ok=True)
    half = 1.96 * values.std() / math.sqrt(10)
    assert (single.high - single.low) / 2 == pytest.approx(half, rel=0.15)  # percentiles of 2,000 samples
    assert single.mean == pytest.approx(values.mean())
    assert single.greatest == pytest.approx(values.max())
    summary = summarise("x", settings, crops)
    assert (summary.settings["num_images"], summary.settings["num_groups"]) == (100, 10)
    assert summary.places == pytest.approx([1, 0, 0, 1, 0, 0, 0, 0, 0])
    assert summary.estimates["other_jaccard"].mean == 1
    lone = summarise("x", settings, {"1/a": row(1.0), "1/b": row(2.0)})
    assert math.isnan(lone.estimates["value"].low)
    assert math.isnan(lone.estimates["other_jaccard"].mean)


@pytest.mark.slow
def test_a_run_leaves_rows_summary_and_figure(plan, images, tmp_path):
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    paths = find_images(images)
    printed = run_stats(plan, paths, tmp_path / "real", progress=False)
    random = run_stats(
        StatsConfig(plan.vision, images, num_anchors=8, image_size=84, random_seed=1),
        paths,
        tmp_path / "random",
        beside=[tmp_path / "real"],
        progress=False,
    )
    assert "| images (groups) | 5 (3) | 5 (3) |" in random
    assert "|  | random | real |" in random
    summary = read_summary(tmp_path / "real/summary.json")
    assert summary.settings["num_images"] == 5
    assert summary.settings["made_on"]["torch"] == torch.__version__
    name = overlap_name(*MAIN, SHARES[2], SHARES[2])
    with (tmp_path / "real/images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert summary.estimates[name].mean == pytest.approx(sum(float(row[name]) for row in rows) / 5, abs=1e-5)
    assert all(len(row["anchors"].split()) == 8 for row in rows)
    assert sum(summary.places) == pytest.approx(8, abs=0.01)
    other = json.loads((tmp_path / "random/summary.json").read_text())
    assert other["settings"]["encoder"] != summary.settings["encoder"]
    for run in ("real", "random"):
        assert load_image(tmp_path / run / "figure.png").width > 1000
        assert (tmp_path / run / "figure.svg").stat().st_size > 10_000
    before = (tmp_path / "real/images.csv").stat().st_mtime_ns
    assert run_stats(plan, paths, tmp_path / "real", progress=False) == printed
    assert (tmp_path / "real/images.csv").stat().st_mtime_ns == before


def test_random_weights_are_those_of_their_seed(plan):
    def weights(seed):
        tower = StatsConfig(plan.vision, plan.images, random_seed=seed).encoder().tower
        return tower.state_dict()["embeddings.patch_embeddings.projection.weight"]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_what_does_not_fit_is_refused(plan, images, tmp_path):
    paths = find_images(images)
    with pytest.raises(UsageError, match="no summary"):
        run_stats(plan, paths, tmp_path / "out", beside=[tmp_path])
    with pytest.raises(UsageError, match="37 of 36 patches"):
        run_stats(StatsConfig(plan.vision, images, num_anchors=37, image_size=84), paths, tmp_path / "out")
    (images / "broken").mkdir()
    (images / "broken/x.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="none of 1 images"):
        run_stats(plan, [Path("broken/x.png")], tmp_path / "out", progress=False)


def test_the_command(folder, images, tmp_path, capsys):
    command = ["stats", "--vision", folder, "--images", str(images), "--num-anchors", "8", "--image-size", "84"]
    assert main([*command, "--limit", "2", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "| images (groups) | 2 (2) |" in printed
    assert str(tmp_path / "out/figure.png") in printed
    (tmp_path / "empty").mkdir()
    assert main([*command, "--images", str(tmp_path / "empty"), "--out", str(tmp_path / "none")]) == 3
    assert "no images" in capsys.readouterr().err


# The example


@pytest.fixture
def natural_images():
    path = Path(__file__).parents[1] / "examples/natural_images.py"
    spec = importlib.util.spec_from_file_location("natural_images", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_crops_are_squares_of_the_photograph_and_always_the_same(natural_images, tmp_path):
    photo = Image.linear_gradient("L").resize((500, 400)).convert("RGB")
    photo.save(tmp_path / "photo.png")
    first, second = (natural_images.cut(tmp_path / "photo.png", "photo", tmp_path / place) for place in "ab")
    assert [box for _, box in first] == [box for _, box in second]
    assert len(first) == natural_images.CROPS
    for (path, (left, top, right, bottom)), (other, _) in zip(first, second, strict=True):
        assert 160 <= right - left == bottom - top <= 400
        assert 0 <= left < right <= 500
        assert 0 <= top < bottom <= 400
        crop = load_image(path)
        assert crop.size == (336, 336)
        assert path.read_bytes() == other.read_bytes()
        assert abs(crop.getpixel((168, 168))[0] - (top + bottom) / 2 / 400 * 255) < 3


def test_licences_are_read_from_debians_copyright(natural_images, tmp_path):
    text = "Files: *\nCopyright: A\nLicense: GPL-2+\n\nFiles: 16.04/a.jpg\n 16.04/b.jpg\nLicense: CC0-1.0\n text\n"
    text += "\nFiles: debian/*\nCopyright: B\nLicense: Expat\n"  # the packaging's, which names no image
    (tmp_path / "usr/share/doc/p").mkdir(parents=True)
    (tmp_path / "usr/share/doc/p/copyright").write_text(text)
    read = [natural_images.licence(tmp_path, "p", tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg")]
    assert [value.split()[0] for value in read] == ["CC0-1.0", "CC0-1.0", "GPL-2+"]
