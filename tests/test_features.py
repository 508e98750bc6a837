"""The feature cache: what is read back, what an interruption leaves, what it must not mix up."""

import errno
import json
import mmap
import os
import pickle
import sys
from functools import partial

import pytest
import tiny
import torch
from torch.utils.data import DataLoader

from acformer.data.collate import stack_features
from acformer.errors import DataError, ImageError, UsageError
from acformer.vision import feature_cache
from acformer.vision.feature_cache import FeatureCache, encoder_key


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


def test_opening_changes_nothing_while_another_process_adds(model, pictures, tmp_path):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures[:2], progress=False)
    row = (cache.folder / "tokens.bin").stat().st_size // 2
    with open(cache.folder / "tokens.bin", "ab") as file:
        file.write(bytes(row))  # the other process has written a row, and half of its index line
    with open(cache.folder / "index.txt", "a") as file:
        file.write("0123abc")
    before = {path.name: path.read_bytes() for path in cache.folder.iterdir()}
    assert len(cache_of(model, tmp_path / "cache").rows) == 2
    assert {path.name: path.read_bytes() for path in cache.folder.iterdir()} == before


@pytest.mark.parametrize("name", ["tokens.bin", "cls_attention.bin"])
def test_rows_that_are_not_whole_are_encoded_again(model, pictures, tmp_path, name):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures, progress=False)
    before = [cache(path)["tokens"] for path in pictures]
    with open(cache.folder / name, "r+b") as file:
        file.truncate((cache.folder / name).stat().st_size * 3 // 5 - 1)
    again = cache_of(model, tmp_path / "cache")
    assert len(again.rows) == 2
    again.add(pictures, progress=False)
    for path, tokens in zip(pictures, before, strict=True):
        torch.testing.assert_close(again(path)["tokens"], tokens, rtol=1e-2, atol=1e-2)
        assert again(path)["cls_attention"].any()
    assert len((cache.folder / "index.txt").read_text().splitlines()) == 5


def test_rows_added_elsewhere_are_seen_after_adding(model, pictures, tmp_path):
    early = cache_of(model, tmp_path / "cache")
    early.add(pictures[:1], progress=False)
    assert early(pictures[0])
    other = cache_of(model, tmp_path / "cache")
    other.add(pictures, progress=False)
    early.encode = None
    early.add(pictures, progress=False)
    assert all(torch.equal(early(path)["tokens"], other(path)["tokens"]) for path in pictures)


def test_arrays_are_opened_once_and_not_pickled(model, pictures, tmp_path):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures, progress=False)
    cache(pictures[0])
    maps = cache.maps
    cache(pictures[1])
    assert cache.maps is maps
    assert len(pickle.dumps(cache)) < 10_000, "neither what is mapped nor the encoder"
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.maps == {}
    assert torch.equal(copy(pictures[2])["tokens"], cache(pictures[2])["tokens"])


def test_a_copy_in_another_process_reads_only(model, pictures, tmp_path):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures[:2], progress=False)
    copy = pickle.loads(pickle.dumps(cache))
    copy.add(pictures[:2], progress=False)
    with pytest.raises(UsageError, match="reads only"):
        copy.add(pictures, progress=False)
    assert len(cache_of(model, tmp_path / "cache").rows) == 2


def test_a_batch_is_one_copy_of_what_is_mapped(model, pictures, tmp_path, record_ops):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures, progress=False)
    on_disk = (cache.folder / "tokens.bin").read_bytes()
    row = cache(pictures[1])["tokens"]
    assert row.untyped_storage().data_ptr() == cache.maps["tokens"].untyped_storage().data_ptr()
    with record_ops() as record:
        batch = stack_features(pictures[:3], cache)
    assert record.ops.count("stack") == 2  # tokens and attention
    assert {"clone", "copy_", "_to_copy", "cat"}.isdisjoint(record.ops)
    (shared,) = DataLoader(
        pictures[:3], batch_size=3, num_workers=1, collate_fn=partial(stack_features, features=cache)
    )
    assert shared["tokens"].is_shared()
    assert torch.equal(shared["tokens"], batch["tokens"])
    row.zero_()
    assert (cache.folder / "tokens.bin").read_bytes() == on_disk


def test_the_reason_of_a_damaged_picture_is_told_when_it_is_asked_for(model, pictures, tmp_path):
    pictures[0].write_bytes(b"no picture")
    pictures[1].write_bytes(pictures[1].read_bytes()[:60])
    twin = tmp_path / "twin.png"
    twin.write_bytes(pictures[1].read_bytes())
    cache = cache_of(model, tmp_path / "cache")
    gone = tmp_path / "gone.png"
    cache.add([*pictures, twin, gone], progress=False)
    reasons = {pictures[0]: "not a PNG", pictures[1]: "truncated", twin: "truncated", gone: "no such file"}
    for path, reason in reasons.items():
        with pytest.raises(ImageError, match=f"{reason}.*{path.name}"):
            cache(path)
    with pytest.raises(ImageError, match="never added"):
        cache(tmp_path / "other.png")
    assert len(cache.rows) == 3
    tiny.picture(1).save(pictures[1])
    cache.add(pictures, progress=False)
    assert cache(pictures[1])["tokens"].any()


def test_features_beyond_float16_are_refused(model, pictures, tmp_path):
    cache = cache_of(model, tmp_path / "cache")

    def large(pixels):
        features = model.get_vision_features(pixels)
        return features._replace(tokens=features.tokens * 1e6)

    cache.encode = large
    with pytest.raises(UsageError, match="exceed float16; run without cache_features"):
        cache.add(pictures, progress=False)
    assert not cache.rows
    assert not (cache.folder / "tokens.bin").exists()


def test_further_layers_are_kept_and_read_back(pictures, tmp_path):
    model = tiny.model("token_packer")
    connector, image_processor = model.model.connector, tiny.processor().image_processor

    def open_cache():
        tower = model.model.vision_tower
        folder, encode = tmp_path / "cache", model.get_vision_features
        return FeatureCache(folder, encode, tower, image_processor, hidden_layers=connector.hidden_layers)

    cache = open_cache()
    cache.add(pictures[:2], batch_size=1, progress=False)
    pixels = image_processor([tiny.picture(1)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        live = model.get_vision_features(pixels)
    again = open_cache()
    again.encode = None
    again.add(pictures[:2], progress=False)
    stored = again(pictures[1])
    assert stored["hidden_layers"].dtype == torch.float16
    assert stored["hidden_layers"].shape == (1, 17, 32)
    torch.testing.assert_close(
        stored["hidden_layers"].float(), live.hidden_layers[0], rtol=1e-3, atol=1e-3
    )  # float16's rounding
    batch = stack_features([pictures[1], pictures[0], pictures[1]], again)
    prompt = ["USER: <image> ASSISTANT:"] * 3
    inputs = tiny.inputs(prompt, num_visual_tokens=4, images=[[tiny.picture(seed)] for seed in (1, 0, 1)])
    expected = model(**inputs).logits
    del inputs["pixel_values"]
    # Measured 3.5e-3 of logits up to 2.4: the features are rounded to float16.
    torch.testing.assert_close(model(**inputs, vision_features=batch).logits, expected, rtol=0, atol=2e-2)


def test_features_of_smaller_images(pictures, tmp_path):
    model = tiny.model("downsample")
    image_processor, grid = tiny.processor().image_processor, model.model.connector.input_grid
    cache = FeatureCache(
        tmp_path / "cache", model.get_vision_features, model.model.vision_tower, image_processor, input_grid=grid
    )
    cache.add(pictures[:1], progress=False)
    assert cache(pictures[0])["tokens"].shape == (5, 32)


def test_what_the_connector_reads_is_part_of_the_key(model):
    tower, processor = model.model.vision_tower, tiny.processor().image_processor
    keys = {
        encoder_key(tower, processor),
        encoder_key(tower, processor, hidden_layers=(1,)),
        encoder_key(tower, processor, hidden_layers=(1, 2)),
        encoder_key(tower, processor, input_grid=(2, 2)),
        encoder_key(tower, processor, input_grid=(1, 4)),
    }
    assert len(keys) == 5
    assert encoder_key(tower, processor, hidden_layers=(1,)) == encoder_key(tower, processor, hidden_layers=[1])


@pytest.mark.parametrize(
    "changed",
    [{"hidden_act": "gelu"}, {"num_attention_heads": 2}, {"layer_norm_eps": 1e-3}, {"attention_dropout": 0.5}],
)
def test_another_config_is_another_cache(changed, model):
    """Weights of the same shapes, and other features."""
    tower, processor = model.model.vision_tower, tiny.processor().image_processor
    key = encoder_key(tower, processor)
    for name, value in changed.items():
        setattr(tower.config, name, value)
    assert encoder_key(tower, processor) != key


def test_where_an_encoder_comes_from_is_not_part_of_the_key(model, tmp_path):
    tower, processor = model.model.vision_tower, tiny.processor().image_processor
    key = encoder_key(tower, processor)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).model.vision_tower
    tower.config._name_or_path, tower.config.transformers_version = "elsewhere", "4.0"
    tower.set_attn_implementation("eager")
    assert encoder_key(tower, processor) == encoder_key(again, processor) == key


def test_another_feature_layer_or_format_is_another_cache(monkeypatch):
    processor = tiny.processor().image_processor
    keys = {encoder_key(tiny.model(feature_layer=layer).model.vision_tower, processor) for layer in (1, 2)}
    monkeypatch.setattr(feature_cache, "FORMAT", 99)
    keys.add(encoder_key(tiny.model(feature_layer=2).model.vision_tower, processor))
    assert len(keys) == 3


def test_a_changed_image_is_seen_in_one_process(model, pictures, tmp_path):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures, progress=False)
    copy = pickle.loads(pickle.dumps(cache))
    before = cache(pictures[0])["tokens"].clone()
    tiny.picture(7).save(pictures[0])
    for reader in (cache, copy):
        with pytest.raises(ImageError, match=r"it has changed since it was added to the cache"):
            reader(pictures[0])
    pictures[0].write_bytes(pictures[1].read_bytes())
    assert torch.equal(copy(pictures[0])["tokens"], cache(pictures[1])["tokens"]), "an image that is known"
    tiny.picture(7).save(pictures[0])
    cache.add(pictures, progress=False)
    assert len(cache.rows) == 6
    assert not torch.equal(cache(pictures[0])["tokens"], before)
    pictures[0].unlink()
    assert cache(pictures[0])["tokens"].any(), "an image may go once it is encoded"


def test_an_image_that_did_not_change_is_hashed_once(model, pictures, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(feature_cache, "file_sha256", lambda path: hashed.append(path) or path.stem * 64)
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures, progress=False)
    cache.add(pictures, progress=False)
    cache(pictures[0])
    assert hashed == pictures


@pytest.mark.parametrize("name", ["tokens", "cls_attention"])
def test_a_damaged_row_is_named(model, pictures, tmp_path, name):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures, progress=False)
    path = cache.folder / f"{name}.bin"
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 5 + 1] ^= 1  # a bit of the fourth row
    path.write_bytes(content)
    again = cache_of(model, tmp_path / "cache")
    again.add(pictures, progress=False)
    for number in (0, 1, 2, 4):
        assert again(pictures[number])
    with pytest.raises(ImageError, match=rf"features of {pictures[3]} are damaged: delete {cache.folder} and"):
        again(pictures[3])


def test_a_row_is_verified_once(model, pictures, tmp_path, monkeypatch):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures, progress=False)
    checked = []
    checksum = feature_cache._checksum
    monkeypatch.setattr(feature_cache, "_checksum", lambda arrays: checked.append(1) or checksum(arrays))
    for path in (pictures[0], pictures[1], pictures[0]):
        cache(path)
    assert len(checked) == 2


ODD_SHAPES = ["", "{", "[]", "3", '{"tokens": 5}', '{"tokens": [-17, 32]}', '{"tokens": []}', '{"tokens": [true, 2]}']
ODD_SHAPES += ['{"tokens": ["17", 32]}', '{"silly": [17, 32]}', '{"tokens": [1e400, 2]}', "[" * 100_000]


@pytest.mark.parametrize("shapes", ODD_SHAPES, ids=range(len(ODD_SHAPES)))
def test_odd_shapes_lead_to_a_new_cache(model, pictures, tmp_path, shapes):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures, progress=False)
    before = cache(pictures[2])["tokens"].clone()
    (cache.folder / "shapes.json").write_text(shapes)
    again = cache_of(model, tmp_path / "cache")
    assert not again.rows
    again.add(pictures, progress=False)
    assert torch.equal(again(pictures[2])["tokens"], before)
    assert len(cache_of(model, tmp_path / "cache").rows) == 5


@pytest.mark.parametrize(
    "index", [b"", b"no digest\n", b"\xff\xfe\n", b"0" * 64 + b" 0000000g\n", b"\n\n\n\n\n", b"0" * 64]
)
def test_an_odd_index_leads_to_a_new_cache(model, pictures, tmp_path, index):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures, progress=False)
    (cache.folder / "index.txt").write_bytes(index)
    again = cache_of(model, tmp_path / "cache")
    assert not again.rows
    again.add(pictures, progress=False)
    assert {path.stat().st_size for path in cache.folder.glob("*.bin")} == {5 * 17 * 32 * 2, 5 * 4 * 16 * 4}
    assert all(again(path) for path in pictures)


def test_rows_before_an_odd_line_stay(model, pictures, tmp_path):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures, progress=False)
    index = cache.folder / "index.txt"
    lines = index.read_text().splitlines(keepends=True)
    for odd in ("?\n", lines[0]):  # the digest of the first row a second time
        index.write_text("".join([*lines[:3], odd, lines[4]]))
        again = cache_of(model, tmp_path / "cache")
        assert len(again.rows) == 3
    again.add(pictures, progress=False)
    assert all(again(path) for path in pictures)


def test_shapes_of_another_encoder_are_one_line(model, pictures, tmp_path):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures[:2], progress=False)
    shapes = json.loads((cache.folder / "shapes.json").read_text())
    (cache.folder / "shapes.json").write_text(json.dumps({**shapes, "tokens": [17, 16]}))
    again = cache_of(model, tmp_path / "cache")
    again.add(pictures[:2], progress=False)
    with pytest.raises(ImageError, match="are damaged: delete"):
        again(pictures[1])
    with pytest.raises(DataError, match="is damaged: delete it"):
        again.add(pictures, progress=False)


@pytest.mark.parametrize("name", ["shapes.json", "index.txt", "tokens.bin", "lock"])
def test_a_folder_in_the_place_of_a_file_is_one_line(model, pictures, tmp_path, name):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures[:2], progress=False)
    (cache.folder / name).unlink()
    (cache.folder / name).mkdir()
    with pytest.raises(DataError, match=rf"feature cache {cache.folder} cannot be (read|written): is a directory"):
        cache_of(model, tmp_path / "cache").add(pictures, progress=False)


def test_a_file_that_becomes_shorter_while_it_is_used(model, pictures, tmp_path):
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures, progress=False)
    os.truncate(cache.folder / "tokens.bin", 100)
    with pytest.raises(DataError, match=r"cannot be read: tokens\.bin has become shorter"):
        cache(pictures[4])


def test_a_whole_cache_on_a_disk_that_cannot_be_written(model, pictures, tmp_path, monkeypatch):
    cache_of(model, tmp_path / "cache").add(pictures[:3], progress=False)

    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    opened = type(tmp_path).open
    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    monkeypatch.setattr(
        "pathlib.Path.open", lambda self, mode="r", *a, **k: (opened if "r" in mode else refuse)(self, mode, *a, **k)
    )
    again = cache_of(model, tmp_path / "cache")
    again.add(pictures[:3], progress=False)
    assert all(again(path) for path in pictures[:3])
    with pytest.raises(DataError, match=f"feature cache {again.folder} cannot be written: read-only file system"):
        again.add(pictures, progress=False)
    assert again(pictures[0]), "what is there can still be used"


def test_elsewhere_than_on_linux(model, pictures, tmp_path, monkeypatch):
    """Windows has neither MAP_PRIVATE nor MAP_NORESERVE, and truncates no file that somebody has mapped."""
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures[:2], progress=False)
    expected = cache(pictures[1])["tokens"].clone()
    for name in ("MAP_PRIVATE", "PROT_READ", "PROT_WRITE"):
        monkeypatch.delattr(mmap, name)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "truncate")
    again = cache_of(model, tmp_path / "cache")
    again.add(pictures, progress=False)
    row = again(pictures[1])["tokens"]
    assert torch.equal(row, expected)
    on_disk = (cache.folder / "tokens.bin").read_bytes()
    row.zero_()
    assert (cache.folder / "tokens.bin").read_bytes() == on_disk


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


def test_a_cache_larger_than_memory_is_mapped(model, pictures, tmp_path):
    """A sparse file, of which pages are read only where a row is asked for."""
    cache = cache_of(model, tmp_path / "cache")
    cache.add(pictures, progress=False)
    first = cache(pictures[0])["tokens"].clone()
    rows = 2**40 // first.nbytes  # 1 TiB of tokens
    for name, values in cache(pictures[0]).items():
        os.truncate(cache.folder / f"{name}.bin", rows * values.nbytes)
    cache.maps = {}
    assert torch.equal(cache(pictures[0])["tokens"], first)
