"""The feature cache: what is read back, what an interruption leaves, what it must not mix up."""

import pytest
import tiny
import torch

from acformer.errors import ImageError
from acformer.features import FeatureCache, encoder_key


@pytest.fixture
def model():
    return tiny.model()


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{seed}.png" for seed in range(5)]
    for seed, path in enumerate(paths):
        tiny.picture(seed).save(path)
    return paths


def cache_of(model, folder, image_size=tiny.IMAGE_SIZE):
    image_processor = tiny.processor(image_size=image_size).image_processor
    return FeatureCache(folder, model.get_vision_features, model.model.vision_tower, image_processor)


def test_what_is_read_back_is_what_the_encoder_says(model, pictures, tmp_path):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures, batch_size=2, progress=False)
    pixels = tiny.processor().image_processor([tiny.picture(3)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        live = model.get_vision_features(pixels)
    stored = cache(pictures[3])
    assert stored["tokens"].dtype == torch.float16
    torch.testing.assert_close(stored["tokens"].float(), live.tokens[0], rtol=1e-3, atol=1e-3)  # float16's rounding
    # float32, apart from the order in which a batch of two sums up.
    torch.testing.assert_close(stored["cls_attention"], live.cls_attention[0], rtol=1e-5, atol=1e-7)


def test_a_second_opening_encodes_nothing(model, pictures, tmp_path):
    cache_of(model, tmp_path / "cache").add(pictures, progress=False)

    def refuse(pixels):
        raise AssertionError("encoded again")

    again = cache_of(model, tmp_path / "cache")
    again.encode = refuse
    again.add(pictures, progress=False)
    assert again(pictures[4])["tokens"].shape == (17, 32)


def test_the_same_picture_under_two_names_is_one_row(model, pictures, tmp_path):
    twin = tmp_path / "twin.png"
    twin.write_bytes(pictures[0].read_bytes())
    cache = cache_of(model, tmp_path / "cache")
    cache.add([pictures[0], twin], progress=False)
    assert len(cache.rows) == 1
    assert torch.equal(cache(twin)["tokens"], cache(pictures[0])["tokens"])


def test_rows_of_an_interrupted_run_are_cut_off(model, pictures, tmp_path):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures[:2], progress=False)
    before = cache(pictures[1])["tokens"]
    with open(cache.folder / "tokens.bin", "ab") as file:
        file.write(b"half a row")
    with open(cache.folder / "index.txt", "a") as file:
        file.write("0123abc")  # a line without its end
    again = cache_of(model, tmp_path / "cache")
    again.add(pictures, progress=False)
    assert torch.equal(again(pictures[1])["tokens"], before)
    assert len({again(path)["tokens"].sum().item() for path in pictures}) == 5


def test_a_damaged_picture_is_told_when_it_is_asked_for(model, pictures, tmp_path):
    pictures[1].write_bytes(b"no picture")
    cache = cache_of(model, tmp_path / "cache")
    cache.add([*pictures, tmp_path / "gone.png"], progress=False)
    for path in (pictures[1], tmp_path / "gone.png"):
        with pytest.raises(ImageError, match=path.name):
            cache(path)
    assert len(cache.rows) == 4


def test_other_weights_or_pixels_are_another_cache(model):
    tower, processor = model.model.vision_tower, tiny.processor().image_processor
    key = encoder_key(tower, processor)
    assert key == encoder_key(tiny.model().model.vision_tower, tiny.processor().image_processor)
    assert key != encoder_key(tower, tiny.processor(image_size=20).image_processor)
    assert key != encoder_key(tiny.model(seed=1).model.vision_tower, processor)
    assert key != encoder_key(tiny.model().model.vision_tower.to(torch.bfloat16), processor)


def test_siglip_without_a_head_has_tokens_alone(pictures, tmp_path):
    model = tiny.model("mlp", vision="siglip_vision_model")
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures[:1], progress=False)
    assert set(cache(pictures[0])) == {"tokens", "cls_attention"}
