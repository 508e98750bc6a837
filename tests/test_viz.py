"""Anchors as pictures: outlines lie on the right pixels, padding is mapped back, the figure holds what it says."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from acformer.anchors.search import select_anchors_reference
from acformer.errors import CheckpointError, UsageError
from acformer.fetch.embedded import embedded_path
from acformer.hf.build import square_image_processor
from acformer.vision.encoder import load_vision_encoder
from acformer.viz import Anchors, draw_anchors, find_anchors, show_anchors
from acformer.viz.overlay import BRIGHT, DARK, MIN_SIDE

GREY = (128, 128, 128)


def picture(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def touched(drawn):
    """(left, top, right, bottom) of what was drawn on a grey picture, or None."""
    ys, xs = np.nonzero((np.asarray(drawn) != GREY).any(-1))
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random DINOv2 with its image processor, as `save_pretrained` leaves them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56)
    model = Dinov2Model(config)
    for parameter in model.parameters():  # the initial weights are so small that all scores are alike
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    BitImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(folder):
    return load_vision_encoder(folder)


def test_outline_is_the_patch_and_leaves_the_rest_alone():
    plain = Image.new("RGB", (800, 400), GREY)
    drawn = draw_anchors(plain, [6], (4, 4))  # row 1, column 2 of patches of 200 x 100
    assert touched(drawn) == (400, 100, 600, 200)
    colours = {colour for _, colour in drawn.getcolors()}
    assert colours == {GREY, BRIGHT, DARK}
    assert drawn.getpixel((500, 150)) == GREY
    assert touched(plain) is None


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), BRIGHT])
def test_outline_shows_on_any_ground(colour):
    drawn = np.asarray(draw_anchors(Image.new("RGB", (640, 640), colour), [0], (24, 24))).astype(int)
    contrast = np.abs(drawn - colour).sum(-1).max()
    assert contrast > 255


@pytest.mark.parametrize(("size", "drawn_size"), [((64, 32), (640, 320)), ((3, 300), (6, 640)), ((900, 30), None)])
def test_small_pictures_are_enlarged_and_large_ones_kept(size, drawn_size):
    assert draw_anchors(picture(*size), [0], (2, 2)).size == (drawn_size or size)


def test_padding_is_mapped_back_and_clipped():
    wide = Image.new("RGB", (800, 400), GREY)  # in a square of 800: rows 200..600 are the picture
    draw = {i: touched(draw_anchors(wide, [i], (4, 4), pad_to_square=True)) for i in range(16)}
    assert [i for i, box in draw.items() if box is None] == [0, 1, 2, 3, 12, 13, 14, 15]
    assert draw[4] == (0, 0, 200, 200)
    assert draw[11] == (600, 200, 800, 400)
    cut = Image.new("RGB", (400, 800), GREY)  # columns 200..600; of 5 columns of 160, the second starts at -40
    assert touched(draw_anchors(cut, [1], (5, 5), pad_to_square=True)) == (0, 0, 120, 160)


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    grid=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    pad=st.booleans(),
)
def test_any_picture_and_grid_can_be_drawn(size, grid, pad):
    drawn = draw_anchors(Image.new("RGB", size, GREY), range(grid[0] * grid[1]), grid, pad_to_square=pad)
    assert max(drawn.size) == MIN_SIDE
    assert drawn.mode == "RGB"
    left, top, right, bottom = touched(drawn)
    assert (left, top) == (0, 0) or pad
    assert right <= drawn.width
    assert bottom <= drawn.height


@pytest.mark.parametrize("index", [-1, 16])
def test_a_patch_outside_the_grid_is_refused(index):
    with pytest.raises(UsageError, match="outside the grid of 4 x 4"):
        draw_anchors(picture(8, 8), [0, index], (4, 4))


def test_positions_are_rows_and_columns():
    anchors = Anchors((0, 5, 11), (3, 4), torch.arange(24.0).reshape(2, 12))
    assert anchors.positions == ((0, 0), (1, 1), (2, 3))
    assert anchors.heat[2, 3] == (11 + 23) / 2


def test_found_anchors_are_those_of_the_encoders_own_scores(encoder, folder):
    processor = square_image_processor(folder, 84)
    image = picture(60, 40)
    anchors = find_anchors(image, encoder, processor, 9)
    assert anchors.grid == (6, 6)
    assert anchors.scores.shape == (4, 36)
    features = encoder(processor(image, return_tensors="pt")["pixel_values"])
    assert torch.equal(anchors.scores, features.cls_attention[0])
    assert list(anchors.indices) == select_anchors_reference(features.cls_attention, 9)[0].tolist()
    assert find_anchors(image, encoder.forward, processor, 9).indices == anchors.indices  # any callable will do


def test_pixels_follow_the_encoders_dtype(folder):
    half = load_vision_encoder(folder, dtype=torch.bfloat16)
    anchors = find_anchors(picture(60, 40), half, square_image_processor(folder, 84), 9)
    assert len(anchors.indices) == 9


@pytest.mark.parametrize("num_anchors", [0, 37])
def test_more_anchors_than_patches_are_refused(encoder, folder, num_anchors):
    with pytest.raises(UsageError, match=r"must be in 1\.\.36"):
        find_anchors(picture(8, 8), encoder, square_image_processor(folder, 84), num_anchors)


def test_an_encoder_without_scores_has_no_anchors(folder):
    config = SiglipVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        image_size=56,
        patch_size=14,
        vision_use_head=False,
    )
    siglip = load_vision_encoder(SiglipVisionModel(config))
    with pytest.raises(UsageError, match="no anchors"):
        find_anchors(picture(8, 8), siglip, square_image_processor(folder, 56), 4)


def test_figure_shows_picture_anchors_and_attention(folder, encoder, tmp_path):
    image = picture(60, 40)
    image.save(path := tmp_path / "picture.png")
    figure = show_anchors(path, folder, 9, image_size=84)
    original, outlined, attention = figure.axes
    assert np.array_equal(original.images[0].get_array(), image)
    assert outlined.get_title() == "9 anchors of 36 patches"
    anchors = find_anchors(image, encoder, square_image_processor(folder, 84), 9)
    expected = draw_anchors(image, anchors.indices, anchors.grid, pad_to_square=True)
    assert np.array_equal(outlined.images[0].get_array(), expected)
    _, heat = attention.images
    assert np.allclose(np.asarray(heat.get_array()) ** 2, anchors.heat, atol=1e-6)
    assert heat.get_extent() == [-0.5, 59.5, 49.5, -10.5]  # 60 x 60 around 60 x 40
    assert attention.get_ylim() == (39.5, -0.5)
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook asks for
    again = show_anchors(image, encoder, 9, image_size=84)
    assert np.array_equal(again.axes[1].images[0].get_array(), expected)


def test_no_global_plotting_state_is_touched(folder):
    loaded = "matplotlib.pyplot" in sys.modules
    show_anchors(picture(8, 8), folder, 4, image_size=56)
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_an_encoder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nothing-here"):
        show_anchors(picture(8, 8), str(tmp_path / "nothing-here"))


@pytest.mark.embedded
def test_real_encoder_looks_at_the_object():
    image = Image.new("RGB", (400, 300), (110, 150, 200))
    image.paste((200, 40, 30), (250, 150, 330, 220))  # rows 12 to 16, columns 15 to 19 of the padded square
    processor = square_image_processor(str(embedded_path("dinov2-s14")), 336)
    anchors = find_anchors(image, load_vision_encoder("embedded:dinov2-s14"), processor, 12)
    near = [11 <= row <= 17 and 14 <= column <= 20 for row, column in anchors.positions]
    assert sum(near) >= 10


def test_an_opened_image_is_taken_as_its_file(tmp_path, folder, encoder):
    """Turned upright, sixteen bits kept: what PIL has opened, by path, in the search, the drawing and the figure."""
    exif = Image.Exif()
    exif[274] = 6
    turned, deep = tmp_path / "turned.jpg", tmp_path / "deep.png"
    picture(64, 32).save(turned, exif=exif)
    Image.fromarray(np.arange(64 * 32, dtype=np.uint16).reshape(32, 64) * 30).save(deep)
    processor = square_image_processor(encoder.tower, 56)
    for path in (turned, deep):
        by_path, opened = (find_anchors(source, encoder, processor, 5) for source in (path, Image.open(path)))
        assert torch.equal(by_path.scores, opened.scores)
        drawn = [draw_anchors(source, [1], (4, 4)) for source in (path, Image.open(path))]
        assert drawn[0].tobytes() == drawn[1].tobytes()
        shown = [show_anchors(source, encoder, 5, image_size=56) for source in (path, Image.open(path))]
        images = [[axes.images[0].get_array() for axes in figure.axes] for figure in shown]
        assert all(np.array_equal(one, other) for one, other in zip(*images, strict=True))
