"""`load_vision_encoder` against the untouched Hugging Face models, all families of the table."""

import copy
import json
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, BertConfig, BertModel, BlipVisionModel, Siglip2ImageProcessorPil

from acformer.errors import CheckpointError, UsageError
from acformer.vision.check import check_encoder
from acformer.vision.encoder import load_vision_encoder, resized, tower_inputs
from acformer.vision.families import ENCODERS, image_size, patch_sequence
from acformer.vision.features import VisionFeatures
from acformer.vision.load import pixel_statistics

FOLDERS = ("clip_vision_model", "dinov2")  # the weights of the second have other names on disk than in memory
TWO_TOWERS = [
    kind
    for kind in ("chinese_clip", "clip", "metaclip_2", "siglip", "siglip2", "tipsv2")
    if f"{kind}_vision_model" in tiny.ENCODERS
]
TEXT = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}


def encode(encoder, pixels) -> VisionFeatures:
    with torch.no_grad():
        return encoder(pixels)


@pytest.mark.parametrize(("kernel", "feature_layer"), [("sdpa", -2), ("sdpa", 4), ("eager", -1), ("eager", 1)])
def test_tokens_are_the_hidden_states(family, kernel, feature_layer, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family, attn_implementation=kernel), feature_layer)
    expected = hidden_states(make_tower(family, attn_implementation=kernel), pixels)[feature_layer]
    features = encode(encoder, pixels)
    assert features.grid == (4, 4)
    assert features.num_prefix_tokens == expected.shape[1] - 16
    assert torch.equal(features.tokens, expected), "the same operations on the same weights: no tolerance"
    assert torch.equal(features.patches, expected[:, -16:])


def test_the_line_passes_its_check(family, make_tower):
    features = check_encoder(make_tower(family))
    assert features.tokens.shape == (1, features.num_prefix_tokens + 16, 32)


def test_every_encoder_is_tried():
    """Those of an older transformers may be missing; of the newest, none."""
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("an older transformers")
    left_out = {*ENCODERS} - {*tiny.ENCODERS}
    assert left_out == set(), "AutoModel does not build these: see AutoModel.register in docs/add-an-encoder.md"


def test_the_page_that_adds_an_encoder(monkeypatch, capsys):
    """Its list is the table, its Python runs."""
    page = (Path(__file__).parents[1] / "docs/add-an-encoder.md").read_text()
    listed = re.findall(r"`(\w+)`", page.partition("vision config:\n")[2].partition("\n\nThe table")[0])
    assert sorted(listed) == sorted(ENCODERS)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.setitem(ENCODERS, "altclip_vision_model", None)  # taken out again afterwards
    exec(code, {})
    assert capsys.readouterr().out == "torch.Size([1, 17, 32]) (4, 4) 1\n"


def test_attention_that_is_not_transformers_own(monkeypatch):
    monkeypatch.setitem(ENCODERS, "blip_vision_model", ENCODERS["clip_vision_model"])
    config = tiny.vision_config("blip_vision_model", hidden_size=32, num_attention_heads=4, image_size=28, patch_size=7)
    with pytest.raises(UsageError, match="BlipAttention does not go through transformers' attention functions"):
        load_vision_encoder(BlipVisionModel(config))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prefix": (2,)}, r"gives 17 tokens for 4 x 4 patches, where its entry .* says 2 \+ 16"),
        ({"prefix": ()}, r"gives 17 tokens for 4 x 4 patches, where its entry .* says 0 \+ 16"),
        ({"blocks": "encoder.layer"}, "ViTModel has no list of blocks named 'encoder.layer'"),
        ({"blocks": "embeddings"}, "ViTModel has no list of blocks named 'embeddings'"),
        ({"attention": "self_attn"}, "the blocks of ViTModel have no 'self_attn'"),
        ({"attention": "mlp"}, r"its \[CLS\] attention cannot be read"),
    ],
)
def test_a_wrong_line(wrong, message, make_tower, monkeypatch):
    monkeypatch.setitem(ENCODERS, "vit", replace(ENCODERS["vit"], **wrong))
    with pytest.raises(UsageError, match=message):
        check_encoder(make_tower("vit"))


def test_patches_that_are_not_in_raster_order(make_tower, monkeypatch):
    """Their number is right, so that a pass cannot notice: the check must."""

    def transposed(config, pixels):
        return {"pixel_values": pixels.mT}

    monkeypatch.setitem(ENCODERS, "dinov2", replace(ENCODERS["dinov2"], inputs=transposed))
    with pytest.raises(UsageError, match=r"row 0, column 2 changes token 9 most, not token 1 \+ 2"):
        check_encoder(make_tower("dinov2"))


def test_the_check_sees_another_row(make_tower, monkeypatch):
    monkeypatch.setattr("acformer.vision.cls_attention.cls_row", lambda *_: torch.full((1, 4, 17), 1 / 17))
    with pytest.raises(UsageError, match=r"the \[CLS\] attention differs from the row of the eager map by"):
        check_encoder(make_tower("vit"))


def test_the_check_sees_another_layer(make_tower, monkeypatch):
    """Blocks in pairs: every second hidden state is not what a block of the list gives."""
    tower = make_tower("vit")
    tower.pairs = nn.ModuleList([*tower.layers[:2], *tower.layers[:2]])
    monkeypatch.setitem(ENCODERS, "vit", replace(ENCODERS["vit"], blocks="pairs"))
    with pytest.raises(UsageError, match=r"hidden layer 0 is not the model's hidden_states\[0\]|hidden layer"):
        check_encoder(tower)


@pytest.mark.parametrize("mask_ratio", [0.75, 0.0])
def test_masked_and_shuffled_patches_are_refused(mask_ratio, make_tower, pixels, monkeypatch):
    """ViTMAE: with a ratio of 0 the number of tokens is right, and their order still drawn at random."""
    tower = make_tower("vit_mae", mask_ratio=mask_ratio)
    with pytest.raises(UsageError, match="hides and shuffles the patches"):
        load_vision_encoder(tower)
    monkeypatch.setitem(ENCODERS, "vit_mae", ENCODERS["vit"])
    with pytest.raises(UsageError, match="hides and shuffles the patches"):
        load_vision_encoder(tower)


def test_tokens_in_another_number_are_seen_at_every_pass(make_tower, pixels, monkeypatch):
    encoder = load_vision_encoder(make_tower("dinov2"))
    encode(encoder, pixels)
    monkeypatch.setattr(encoder.tower.embeddings, "forward", lambda pixel_values, **_: torch.randn(2, 5, 32))
    with pytest.raises(UsageError, match=r"gives 5 tokens for 4 x 4 patches, where its entry .* says 1 \+ 16"):
        encode(encoder, pixels)


def test_naflex_patches_are_those_of_its_own_processor(make_tower):
    """SigLIP 2 at native resolution, against the patches, shapes and mask with which transformers feeds it."""
    image = tiny.picture(size=(70, 42))
    own = Siglip2ImageProcessorPil(patch_size=7, max_num_patches=60, do_resize=False)
    given = own(image, return_tensors="pt")
    assert given["spatial_shapes"].tolist() == [[6, 10]]
    # (1, 60, 147) -> (1, 3, 42, 70): the image that these patches are cut from
    pixels = given["pixel_values"].unflatten(1, (6, 10)).unflatten(-1, (7, 7, 3))
    pixels = pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    tower = make_tower("siglip2_vision_model")
    assert torch.equal(patch_sequence(tower.config, pixels)["pixel_values"], given["pixel_values"])
    with torch.no_grad():
        expected = tower(**given, output_hidden_states=True).hidden_states[-2]
    features = encode(load_vision_encoder(tower), pixels)
    assert features.grid == (6, 10)
    assert torch.equal(features.tokens, expected)


def test_naflex_as_in_a_padded_batch(make_tower):
    """Patches of another image beside it, and the mask that hides the padding, change nothing of its features."""
    tower = make_tower("siglip2_vision_model")
    images = [tiny.picture(seed, size) for seed, size in enumerate([(42, 28), (70, 42)])]
    given = Siglip2ImageProcessorPil(patch_size=7, max_num_patches=60, do_resize=False)(images, return_tensors="pt")
    with torch.no_grad():
        expected = tower(**given, output_hidden_states=True).hidden_states[-2][0, :24]
    pixels = given["pixel_values"][:1, :24].unflatten(1, (4, 6)).unflatten(-1, (7, 7, 3))
    pixels = pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    # Measured 4e-6 in values up to 9: a masked kernel sums in another order.
    torch.testing.assert_close(encode(load_vision_encoder(tower), pixels).tokens[0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "family", tiny.mostly_slow(tiny.ENCODERS, "clip_vision_model", "siglip2_vision_model", "radio")
)
def test_threads_get_the_features_of_their_own_images(family, make_tower):
    """What a pass leaves behind travels with the pass: with it on the module, some of these calls got another's."""
    encoder = load_vision_encoder(make_tower(family), hidden_layers=[1])
    images = torch.randn(6, 1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    expected = [encode(encoder, image) for image in images]

    def differ(number: int) -> int:
        wrong = 0
        for _ in range(30):
            found = encode(encoder, images[number])
            wrong += any(not torch.equal(value, found.arrays[name]) for name, value in expected[number].arrays.items())
        return wrong

    assert sum(in_threads(differ, range(len(images)))) == 0


def test_threads_on_one_model():
    model = tiny.model("token_packer")
    images = torch.randn(6, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = [model.get_image_features(image).pooler_output[0] for image in images]

    @torch.no_grad()
    def differ(number: int) -> int:
        found = (model.get_image_features(images[number]).pooler_output[0] for _ in range(100))
        return sum(not torch.equal(tokens, expected[number]) for tokens in found)

    assert sum(in_threads(differ, range(len(images)))) == 0


def in_threads(function, numbers) -> list[int]:
    """In a thread each, which take turns every few microseconds."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(numbers)) as pool:
            return list(pool.map(function, numbers))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.slow
def test_the_library_is_imported_in_many_threads_at_once():
    code = (
        "import sys, threading\nfrom concurrent.futures import ThreadPoolExecutor\nimport acformer\n"
        "sys.setswitchinterval(1e-5)\nstart = threading.Barrier(len(acformer.__all__))\n"
        "def load(name):\n    start.wait()\n    return getattr(acformer, name)\n"
        "with ThreadPoolExecutor(len(acformer.__all__)) as pool:\n"
        "    print(len(list(pool.map(load, acformer.__all__))))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "12", result.stderr


def hidden_states(tower, pixels) -> tuple[torch.Tensor, ...]:
    """All of them, of an untouched model."""
    with torch.no_grad():
        return tower(**tower_inputs(tower.config, pixels), output_hidden_states=True).hidden_states


@pytest.mark.parametrize(("feature_layer", "kept"), [(-2, 3), (1, 1)])
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
    ("kernel", "hidden_layers", "feature_layer"),
    [("sdpa", [3, 1], 3), ("sdpa", [-2, -4, -2], -1), ("eager", [4], 4), ("eager", [0, 3, -5], -2)],
)
def test_further_layers_are_the_hidden_states(family, kernel, hidden_layers, feature_layer, make_tower, pixels):
    encoder = load_vision_encoder(
        make_tower(family, attn_implementation=kernel), feature_layer, hidden_layers=hidden_layers
    )
    untouched = hidden_states(make_tower(family, attn_implementation=kernel), pixels)
    for _ in range(2):
        features = encode(encoder, pixels)
        expected = torch.stack([untouched[layer] for layer in hidden_layers], dim=1)
        assert torch.equal(features.hidden_layers, expected), "the same operations on the same weights: no tolerance"
        assert torch.equal(features.tokens, untouched[feature_layer])


def test_no_further_layer_is_kept_unasked(family, make_tower, pixels):
    features = encode(load_vision_encoder(make_tower(family)), pixels)
    assert features.hidden_layers is None
    has_row = bool(ENCODERS[family].prefix or ENCODERS[family].probe)
    assert set(features.arrays) == {"tokens", *(["cls_attention"] if has_row else [])}


@pytest.mark.parametrize(
    ("layer", "message"), [(-1, "hidden layer -1 is block 4 .*ends at block 3"), (4, "hidden layer 4 is block 4")]
)
@pytest.mark.parametrize("family", FOLDERS)
def test_hidden_layers_above_the_feature_layer(family, layer, message, make_tower):
    with pytest.raises(UsageError, match=message):
        load_vision_encoder(make_tower(family), -2, hidden_layers=[1, layer])
    with pytest.raises(UsageError, match=r"hidden layer 5 is outside .* of 4 blocks: take -5\.\.-1 or 0\.\.4"):
        load_vision_encoder(make_tower(family), -2, hidden_layers=[5])


@pytest.mark.parametrize("grid", [(3, 4), (1, 4)])
@pytest.mark.parametrize("family", tiny.OF_ANY_SIZE)
def test_resized_pixels_make_the_grid(family, grid, make_tower, pixels):
    tower = make_tower(family)
    small = resized(pixels, tower.config, grid)
    assert small.shape == (2, 3, 7 * grid[0], 7 * grid[1])
    features = encode(load_vision_encoder(make_tower(family), input_grid=grid), pixels)
    assert features.grid == grid
    assert torch.equal(features.tokens, encode(load_vision_encoder(tower), small).tokens)
    assert resized(pixels.bfloat16(), tower.config, grid).dtype == torch.bfloat16
    even = torch.full_like(pixels, 0.25)
    # Measured 6e-8: the filter's weights sum to 1 up to rounding.
    torch.testing.assert_close(resized(even, tower.config, grid), even[..., : 7 * grid[0], : 7 * grid[1]])


def test_frozen(family, make_tower):
    encoder = load_vision_encoder(make_tower(family).train())
    assert not encoder.tower.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(("size", "grid"), [((56, 56), (8, 8)), ((28, 42), (4, 6))])
@pytest.mark.parametrize("family", tiny.OF_ANY_SIZE)
def test_other_image_sizes(family, size, grid, make_tower):
    """The position embedding is interpolated, as Hugging Face does it when asked to."""
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    features = encode(load_vision_encoder(make_tower(family)), pixels)
    assert features.grid == grid
    assert features.patches.shape == (2, grid[0] * grid[1], 32)
    assert torch.equal(features.tokens, hidden_states(make_tower(family), pixels)[-2])


def test_an_encoder_that_takes_its_own_size_alone(make_tower):
    encoder = load_vision_encoder(make_tower("aimv2_vision_model"))
    with pytest.raises(UsageError, match="does not take images of 56 x 28 pixels: give it 28 x 28"):
        encoder(torch.zeros(1, 3, 56, 28))
    native = load_vision_encoder(make_tower("aimv2_vision_model", is_native=True))
    assert encode(native, torch.zeros(1, 3, 56, 28)).grid == (8, 4)


def test_pixels_are_moved_to_the_dtype_of_the_weights(family, make_tower, pixels):
    features = encode(load_vision_encoder(make_tower(family).bfloat16()), pixels)
    expected = hidden_states(make_tower(family).bfloat16(), pixels.bfloat16())[-2]
    assert features.tokens.dtype == torch.bfloat16
    assert torch.equal(features.tokens, expected)


def test_sizes_that_are_pairs_or_are_not_there(make_tower):
    config = tiny.vision_config("internvl_vision", image_size=28, patch_size=7)
    assert (tuple(config.image_size), image_size(config)) == ((28, 28), 28)
    tower = make_tower("internvl_vision")
    tower.config.patch_size = (7, 14)
    with pytest.raises(UsageError, match=r"patch_size is \(7, 14\): only square ones"):
        load_vision_encoder(tower)(torch.zeros(1, 3, 28, 28))
    assert image_size(tiny.vision_config("siglip2_vision_model", image_size=28, patch_size=7)) == 28


def test_images_do_not_see_each_other(family, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family))
    both, last = encode(encoder, pixels), encode(encoder, pixels[1:])
    # Measured 0 (tokens, up to 13) and 7.5e-9 (row); another matmul may sum one image in another order than two.
    torch.testing.assert_close(both.tokens[1:], last.tokens, rtol=0, atol=2e-5)
    if last.cls_attention is not None:
        torch.testing.assert_close(both.cls_attention[1:], last.cls_attention, rtol=0, atol=1e-6)


def test_copies_and_pickles(family, make_tower, pixels):
    encoder = load_vision_encoder(make_tower(family), hidden_layers=[0, 2])
    expected = encode(encoder, pixels)
    for again in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        found = encode(again, pixels)
        assert found.arrays.keys() == expected.arrays.keys()
        assert all(torch.equal(found.arrays[name], value) for name, value in expected.arrays.items())


@pytest.mark.parametrize("feature_layer", [0, 5, -5, -6])
@pytest.mark.parametrize("family", FOLDERS)
def test_feature_layer_outside_the_model(family, feature_layer, make_tower):
    with pytest.raises(UsageError, match=r"4 blocks.* -4\.\.-1 or 1\.\.4"):
        load_vision_encoder(make_tower(family), feature_layer)


def test_unknown_encoder_type():
    bert = BertModel(BertConfig(**TEXT))
    with pytest.raises(UsageError, match=r"encoder type 'bert'.*clip_vision_model, deit, dinov2, .*acformer\.encoders"):
        load_vision_encoder(bert, -1)


def test_from_a_folder(family, make_tower, pixels, tmp_path):
    tower = make_tower(family)
    tower.save_pretrained(tmp_path)
    expected = encode(load_vision_encoder(tower), pixels)
    loaded = encode(load_vision_encoder(str(tmp_path)), pixels)
    assert torch.equal(loaded.tokens, expected.tokens)
    assert all(torch.equal(loaded.arrays[name], value) for name, value in expected.arrays.items())
    half = load_vision_encoder(str(tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_from_the_folder_of_two_towers(kind, make_tower, pixels, tmp_path):
    """CLIP's, SigLIP's and their kin's own checkpoints: the vision half of them."""
    tower = make_tower(f"{kind}_vision_model")
    config = CONFIG_MAPPING[kind](vision_config=tower.config.to_dict(), text_config=TEXT)
    model = AutoModel.from_config(config)
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


def test_pixel_statistics(make_tower, tmp_path):
    make_tower("dinov2").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot load"):
        pixel_statistics(str(tmp_path))
    file = tmp_path / "preprocessor_config.json"
    for wrong in ("", '"image_std": null', '"image_std": [1, 1, 0]', '"image_std": [1]', '"image_std": [1, 1, NaN]'):
        file.write_text(f'{{"image_mean": [0.1, 0.2, 0.3]{"," if wrong else ""} {wrong}}}')
        with pytest.raises(CheckpointError, match="gives no image_mean and image_std of three numbers"):
            pixel_statistics(str(tmp_path))
    file.write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": false}')
    assert pixel_statistics(str(tmp_path)) == ([0, 0, 0], [1, 1, 1])
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
    damage(weights, next(name for name in weights if name.endswith("weight") and weights[name].ndim == 2))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("family", FOLDERS)
def test_missing_weight(family, make_tower, tmp_path):
    folder = damaged_folder(make_tower(family), tmp_path, lambda weights, name: weights.pop(name))
    with pytest.raises(CheckpointError, match=r"1 weights are missing or of another shape, first: .*weight"):
        load_vision_encoder(folder)


@pytest.mark.parametrize("family", FOLDERS)
def test_weight_of_another_shape(family, make_tower, tmp_path):
    def widen(weights, name):
        weights[name] = torch.zeros(3, 5)

    with pytest.raises(CheckpointError, match=r"1 weights are .*weight.*\(?3, 5"):
        load_vision_encoder(damaged_folder(make_tower(family), tmp_path, widen))


def test_no_weights_at_all(tmp_path, make_tower):
    make_tower("dinov2").config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot load"):
        load_vision_encoder(str(tmp_path))
