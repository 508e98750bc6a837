"""`load_vision_encoder` against the untouched Hugging Face models."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from acformer.errors import CheckpointError, UsageError
from acformer.vision.encoder import load_tower, load_vision_encoder, pixel_statistics, resized
from acformer.vision.families import ENCODERS
from acformer.vision.features import VisionFeatures

PREFIX = {"clip_vision_model": 1, "dinov2": 1, "dinov2_with_registers": 5, "siglip_vision_model": 0}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}


def encode(encoder, pixels) -> VisionFeatures:
    with torch.no_grad():
        return encoder(pixels)


@pytest.mark.parametrize("feature_layer", [-1, -2, 1, 3, 4])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_tokens_are_the_hidden_states(family, kernel, feature_layer, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family, attn_implementation=kernel), feature_layer)
    untouched = make_tower(family, attn_implementation=kernel)
    with torch.no_grad():
        expected = untouched(pixels, output_hidden_states=True).hidden_states[feature_layer]
    features = encode(encoder, pixels)
    assert features.grid == (4, 4)
    assert features.num_prefix_tokens == PREFIX[family]
    assert torch.equal(features.tokens, expected), "the same operations on the same weights: no tolerance"
    assert torch.equal(features.patches, expected[:, PREFIX[family] :])


@pytest.mark.parametrize(("feature_layer", "kept"), [(-1, 4), (-2, 3), (1, 1)])
def test_blocks_after_the_feature_layer_are_gone(family, feature_layer, kept, make_tower, pixels):
    tower = make_tower(family)
    blocks = tower.get_submodule(ENCODERS[family].blocks)
    ran = []
    for index, block in enumerate(list(blocks)):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    encoder = load_vision_encoder(tower, feature_layer)
    encode(encoder, pixels)
    assert len(blocks) == kept
    assert ran == list(range(kept))


@pytest.mark.parametrize(
    ("hidden_layers", "feature_layer"), [([1, 2, 3], -2), ([3, 1], 3), ([-2, -4, -2], -1), ([4], 4), ([0, 3, -5], -2)]
)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_further_layers_are_the_hidden_states(family, kernel, hidden_layers, feature_layer, make_tower, pixels):
    encoder = load_vision_encoder(
        make_tower(family, attn_implementation=kernel), feature_layer, hidden_layers=hidden_layers
    )
    with torch.no_grad():
        untouched = make_tower(family, attn_implementation=kernel)(pixels, output_hidden_states=True).hidden_states
    for _ in range(2):
        features = encode(encoder, pixels)
        expected = torch.stack([untouched[level] for level in hidden_layers], dim=1)
        assert torch.equal(features.hidden_layers, expected), "the same operations on the same weights: no tolerance"
        assert torch.equal(features.tokens, untouched[feature_layer])


def test_no_level_is_kept_unasked(family, make_tower, pixels):
    features = encode(load_vision_encoder(make_tower(family)), pixels)
    assert features.hidden_layers is None
    assert set(features.arrays) == {"tokens", "cls_attention"}


@pytest.mark.parametrize(
    ("level", "message"), [(-1, "hidden layer -1 is block 4 .*ends at block 3"), (4, "hidden layer 4 is block 4")]
)
def test_hidden_layers_above_the_feature_layer(family, level, message, make_tower):
    with pytest.raises(UsageError, match=message):
        load_vision_encoder(make_tower(family), -2, hidden_layers=[1, level])
    with pytest.raises(UsageError, match=r"hidden layer 5 is outside .* of 4 blocks: take -5\.\.-1 or 0\.\.4"):
        load_vision_encoder(make_tower(family), -2, hidden_layers=[5])


@pytest.mark.parametrize("grid", [(2, 2), (3, 4), (1, 4)])
def test_resized_pixels_make_the_grid(family, grid, make_tower, pixels):
    tower = make_tower(family)
    small = resized(pixels, tower.config, grid)
    assert small.shape == (2, 3, 7 * grid[0], 7 * grid[1])
    assert encode(load_vision_encoder(tower), small).grid == grid
    assert resized(pixels.bfloat16(), tower.config, grid).dtype == torch.bfloat16
    even = torch.full_like(pixels, 0.25)
    # Measured 6e-8: the filter's weights sum to 1 up to rounding.
    torch.testing.assert_close(resized(even, tower.config, grid), even[..., : 7 * grid[0], : 7 * grid[1]])


def test_frozen(family, make_tower):
    encoder = load_vision_encoder(make_tower(family).train())
    assert not encoder.tower.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(("size", "grid"), [((56, 56), (8, 8)), ((28, 42), (4, 6)), ((42, 14), (6, 2))])
def test_other_image_sizes(family, size, grid, make_tower):
    """The position embedding is interpolated, as Hugging Face does it when told to."""
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    features = encode(load_vision_encoder(make_tower(family)), pixels)
    told = {"interpolate_pos_encoding": True} if ENCODERS[family].fixed_size else {}
    with torch.no_grad():
        expected = make_tower(family)(pixels, output_hidden_states=True, **told).hidden_states[-2]
    assert features.grid == grid
    assert features.cls_attention.shape == (2, 4, grid[0] * grid[1])
    assert torch.equal(features.tokens, expected)


def test_images_do_not_see_each_other(family, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family))
    both, last = encode(encoder, pixels), encode(encoder, pixels[1:])
    # Measured 0 (tokens, up to 13) and 7.5e-9 (row); another matmul may sum one image in another order than two.
    torch.testing.assert_close(both.tokens[1:], last.tokens, rtol=0, atol=2e-5)
    torch.testing.assert_close(both.cls_attention[1:], last.cls_attention, rtol=0, atol=1e-6)


def test_deepcopy(family, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family))
    expected = encode(encoder, pixels)
    assert torch.equal(encode(copy.deepcopy(encoder), pixels).tokens, expected.tokens)


@pytest.mark.parametrize("feature_layer", [0, 5, -5, -6])
def test_feature_layer_outside_the_model(family, feature_layer, make_tower):
    with pytest.raises(UsageError, match=r"4 blocks.* -4\.\.-1 or 1\.\.4"):
        load_vision_encoder(make_tower(family), feature_layer)


def test_unknown_encoder_type():
    bert = BertModel(BertConfig(**TEXT))
    with pytest.raises(UsageError, match=r"vision encoder type 'bert'.*clip_vision_model, dinov2"):
        load_vision_encoder(bert, -1)


def test_from_a_folder(family, make_tower, pixels, tmp_path):
    tower = make_tower(family)
    tower.save_pretrained(tmp_path)
    expected = encode(load_vision_encoder(tower), pixels)
    loaded = encode(load_vision_encoder(str(tmp_path)), pixels)
    assert torch.equal(loaded.tokens, expected.tokens)
    assert torch.equal(loaded.cls_attention, expected.cls_attention)
    half = load_vision_encoder(str(tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("family", "config_class", "model_class"),
    [("clip_vision_model", CLIPConfig, CLIPModel), ("siglip_vision_model", SiglipConfig, SiglipModel)],
)
def test_from_the_folder_of_two_towers(family, config_class, model_class, make_tower, pixels, tmp_path):
    """CLIP's and SigLIP's own checkpoints: the vision half of them."""
    tower = make_tower(family)
    model = model_class(config_class(vision_config=tower.config.to_dict(), text_config=TEXT))
    model.vision_model.load_state_dict(tower.state_dict())
    model.save_pretrained(tmp_path)
    expected = encode(load_vision_encoder(tower), pixels)
    assert torch.equal(encode(load_vision_encoder(str(tmp_path)), pixels).tokens, expected.tokens)


@pytest.mark.parametrize(
    "name", ["timm:vit_large_patch14_clip_336.openai", "open_clip:EVA02-L-14-336@merged2b_s6b_b61k"]
)
def test_a_library_that_is_not_there(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name.partition(":")[0], None)
    with pytest.raises(UsageError, match=r"pip install 'acformer\[timm\]'"):
        load_vision_encoder(name)


def test_a_whole_model_needs_a_hugging_face_encoder():
    with pytest.raises(UsageError, match="timm:vit: a model is built and trained with a Hugging Face encoder only"):
        load_tower("timm:vit", torch.float32)


def test_pixel_statistics(make_tower, tmp_path):
    make_tower("dinov2").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot load"):
        pixel_statistics(str(tmp_path))
    file = tmp_path / "preprocessor_config.json"
    file.write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    with pytest.raises(CheckpointError, match="gives no image_mean and image_std"):
        pixel_statistics(str(tmp_path))
    file.write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    tower = load_vision_encoder(str(tmp_path)).tower
    assert pixel_statistics(tower) == pixel_statistics(str(tmp_path)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot load .*nothing-here"):
        load_vision_encoder(str(tmp_path / "nothing-here"))


def test_whatever_is_wrong_with_a_model_is_one_error(make_tower, tmp_path):
    make_tower("dinov2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({"patch_size": 0}, {"hidden_size": None}, {"num_hidden_layers": "two"}, {"hidden_act": "silly"}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(CheckpointError, match=f"cannot load '{tmp_path}': .") as caught:
            load_vision_encoder(str(tmp_path))
        assert "\n" not in str(caught.value)


def damaged_folder(tower, folder: Path, damage) -> str:
    tower.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    damage(weights, next(name for name in weights if "layer" in name and name.endswith("weight")))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_missing_weight(family, make_tower, tmp_path):
    folder = damaged_folder(make_tower(family), tmp_path, lambda weights, name: weights.pop(name))
    with pytest.raises(CheckpointError, match=r"1 weights are missing or of another shape, first: .*layer"):
        load_vision_encoder(folder)


def test_weight_of_another_shape(family, make_tower, tmp_path):
    def widen(weights, name):
        weights[name] = torch.zeros(3, 5)

    with pytest.raises(CheckpointError, match=r"layer.*\(?3, 5"):
        load_vision_encoder(damaged_folder(make_tower(family), tmp_path, widen))


def test_no_weights_at_all(tmp_path, make_tower):
    make_tower("dinov2").config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot load"):
        load_vision_encoder(str(tmp_path))
