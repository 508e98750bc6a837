"""The release's weights give the release's outputs; LLaVA's give LLaVA's logits."""

import copy
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, LlavaConfig, LlavaForConditionalGeneration

from acformer.connectors import Geometry, build_connector
from acformer.errors import CheckpointError
from acformer.hf import AcFormerForConditionalGeneration
from acformer.hf.convert import connector_from_release, from_llava, perceiver_from_release, stack_from_release

RELEASE = load_file(Path(__file__).parent / "fixtures" / "resampler.safetensors")
STATE = {name.removeprefix("state."): tensor for name, tensor in RELEASE.items() if name.startswith("state.")}
GEOMETRY = Geometry(64, 48, (6, 8), 1)  # D of the fixture, an E of our own, its 49 features
IMAGE_TOKEN = 90


@pytest.fixture
def state() -> dict[str, Tensor]:
    return dict(STATE)


@pytest.fixture
def projector_file() -> dict[str, Tensor]:
    """What LLaVA's training would save of the fixture's stack and a projector of float64."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(64, 48).double(), torch.nn.Linear(48, 48).double()
    weights = {f"model.mm_projector.0.{name}": tensor for name, tensor in STATE.items()}
    for place, layer in ((1, first), (3, second)):
        weights |= {f"model.mm_projector.{place}.{name}": t for name, t in layer.state_dict().items()}
    return weights


class TestStack:
    def test_gives_the_release_output(self, state):
        stack = stack_from_release(state, head_dim=16)
        output = stack(RELEASE["input.queries"], RELEASE["input.features"])
        # Measured 1.6e-15 in outputs up to 3.9: float64, another attention kernel.
        torch.testing.assert_close(output, RELEASE["output"], rtol=0, atol=1e-10)

    def test_sizes_are_read_off_the_weights(self, state):
        stack = stack_from_release(state, head_dim=16)
        assert len(stack.layers) == 2
        assert stack.layers[0].attention.num_heads == 4
        assert stack.layers[0].feed_forward[1].out_features == 256

    def test_weights_are_copies_that_train(self, state):
        stack = stack_from_release(state, head_dim=16)
        assert all(parameter.requires_grad for parameter in stack.parameters())
        with torch.no_grad():
            stack.norm.weight.zero_()
        assert bool(state["norm.weight"].any())

    def test_latents_are_not_missed(self, state):
        state.pop("latents")
        stack_from_release(state, head_dim=16)

    @pytest.mark.parametrize("name", sorted(STATE.keys() - {"latents"}))
    def test_missing_weight(self, state, name):
        state.pop(name)
        with pytest.raises(CheckpointError, match=f"missing.*{name}|{name} is missing"):
            stack_from_release(state, head_dim=16)

    def test_missing_layer(self, state):
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("layers.0.")}
        with pytest.raises(CheckpointError, match=r"layers\.0\..* is missing"):
            stack_from_release(kept, head_dim=16)

    def test_unexpected_weight(self, state):
        state["layers.0.0.to_q.bias"] = torch.zeros(64)
        with pytest.raises(CheckpointError, match=r"1 unexpected \(layers\.0\.0\.to_q\.bias\)"):
            stack_from_release(state, head_dim=16)

    def test_wrong_shape(self, state):
        state["layers.1.0.to_out.weight"] = torch.zeros(64, 3)
        with pytest.raises(CheckpointError, match=r"layers\.1\.0\.to_out\.weight .*\(64, 3\), not \(64, 64\)"):
            stack_from_release(state, head_dim=16)

    def test_quantised(self, state):
        state["layers.1.0.to_out.weight"] = torch.zeros(64, 64, dtype=torch.int8)
        with pytest.raises(CheckpointError, match=r"layers\.1\.0\.to_out\.weight is torch\.int8"):
            stack_from_release(state, head_dim=16)

    def test_scalar(self, state):
        state["norm.weight"] = torch.tensor(1.0)
        with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(\)"):
            stack_from_release(state, head_dim=16)

    def test_head_width_that_does_not_divide(self, state):
        with pytest.raises(CheckpointError, match=r"to_q\.weight has 64 rows.*head_dim=24"):
            stack_from_release(state, head_dim=24)


class TestConnector:
    @pytest.mark.parametrize("prefix", ["model.mm_projector.", "base_model.model.model.mm_projector.", ""])
    def test_any_prefix(self, projector_file, prefix, make_features):
        weights = {prefix + name.removeprefix("model.mm_projector."): t for name, t in projector_file.items()}
        connector = connector_from_release(weights, GEOMETRY, head_dim=16, num_anchors=8)
        features = make_features(GEOMETRY, dtype=torch.float64)
        queries = connector.queries(features, 9)
        hidden = stack_from_release(STATE, head_dim=16)(queries, features.tokens)
        first, second = (
            [projector_file[f"model.mm_projector.{place}.{name}"] for name in ("weight", "bias")] for place in (1, 3)
        )
        hidden = torch.nn.functional.gelu(hidden @ first[0].T + first[1])
        # Measured 4.4e-16.
        torch.testing.assert_close(connector(features), hidden @ second[0].T + second[1], rtol=0, atol=1e-13)

    @pytest.mark.parametrize("suffix", ["bin", "safetensors"])
    def test_from_a_file(self, projector_file, suffix, make_features, tmp_path):
        path = tmp_path / f"mm_projector.{suffix}"
        if suffix == "bin":
            torch.save(projector_file, path)
        else:
            save_file(projector_file, path)
        features = make_features(GEOMETRY, dtype=torch.float64)
        expected = connector_from_release(projector_file, GEOMETRY, head_dim=16, num_anchors=8)(features)
        for name in (path, str(path)):
            connector = connector_from_release(name, GEOMETRY, head_dim=16, num_anchors=8)
            assert torch.equal(connector(features), expected)

    def test_any_budget(self, projector_file, make_features):
        connector = connector_from_release(projector_file, GEOMETRY, head_dim=16, num_anchors=8)
        assert connector.num_tokens == 9
        features = make_features(GEOMETRY, dtype=torch.float64)
        assert connector(features, 20).shape == (2, 20, 48)

    def test_saves_as_our_connector(self, projector_file):
        connector = connector_from_release(projector_file, GEOMETRY, head_dim=16, num_anchors=8)
        ours = build_connector("acformer", GEOMETRY, num_anchors=8, depth=2, num_heads=4, head_dim=16)
        ours.load_state_dict(connector.state_dict())

    def test_perceiver_keeps_the_latents(self, projector_file, make_features):
        connector = perceiver_from_release(projector_file, GEOMETRY, head_dim=16)
        assert connector.num_tokens == 9
        assert torch.equal(connector.queries.latents, STATE["latents"])
        assert connector(make_features(GEOMETRY, dtype=torch.float64)).shape == (2, 9, 48)

    def test_perceiver_without_latents(self, projector_file):
        projector_file.pop("model.mm_projector.0.latents")
        with pytest.raises(CheckpointError, match=r"0\.latents is missing"):
            perceiver_from_release(projector_file, GEOMETRY, head_dim=16)

    def test_another_width(self, projector_file):
        with pytest.raises(CheckpointError, match=r"1\.bias has shape \(48,\), not \(40,\)"):
            connector_from_release(projector_file, GEOMETRY._replace(text_hidden_size=40), head_dim=16, num_anchors=8)

    def test_missing_and_unexpected(self, projector_file):
        projector_file["model.mm_projector.2.weight"] = projector_file.pop("model.mm_projector.3.weight")
        with pytest.raises(CheckpointError, match=r"1 missing \(3\.weight\) and 1 unexpected \(2\.weight\)"):
            connector_from_release(projector_file, GEOMETRY, head_dim=16, num_anchors=8)

    def test_weights_of_llavas_own_mlp(self):
        """LLaVA-1.5's `mm_projector.bin`: no stack in it."""
        weights = {"model.mm_projector.0.weight": torch.zeros(48, 64)}
        with pytest.raises(CheckpointError, match=r"0\.norm\.weight is missing"):
            connector_from_release(weights, GEOMETRY)

    def test_a_file_with_code_in_it_is_not_run(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "boom"),)

        torch.save({"0.norm.weight": Bomb()}, tmp_path / "mm_projector.bin")
        with pytest.raises(CheckpointError, match="could run code"):
            connector_from_release(tmp_path / "mm_projector.bin", GEOMETRY)
        assert not (tmp_path / "boom").exists()

    @pytest.mark.parametrize("name", ["mm_projector.bin", "mm_projector.safetensors"])
    @pytest.mark.parametrize("content", [None, b"", b"not weights at all"])
    def test_unreadable_file(self, name, content, tmp_path):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name) as caught:
            connector_from_release(tmp_path / name, GEOMETRY)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "content", [[1, 2], {"0.norm.weight": "x"}, torch.zeros(3)], ids=["list", "dict", "tensor"]
    )
    def test_file_of_something_else(self, content, tmp_path):
        torch.save(content, tmp_path / "mm_projector.bin")
        with pytest.raises(CheckpointError, match="no dict of weights"):
            connector_from_release(tmp_path / "mm_projector.bin", GEOMETRY)


def llava(family: str = "clip_vision_model", seed: int = 0, **fields) -> LlavaForConditionalGeneration:
    """LLaVA of a few thousand random weights, 4 x 4 patches."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CONFIG_MAPPING[family](**sizes, image_size=16, patch_size=4),
        text_config=CONFIG_MAPPING["llama"](**sizes | {"num_hidden_layers": 2}, vocab_size=100),
        image_token_index=IMAGE_TOKEN,
        **fields,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights are so small that every answer looks the same
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def prompt(num_visual_tokens: int) -> dict[str, Tensor]:
    """Two sequences with an image each, at different places."""
    words = torch.arange(2 * 8).reshape(2, 8)
    image = torch.full((num_visual_tokens,), IMAGE_TOKEN)
    rows = [torch.cat([row[:cut], image, row[cut:]]) for row, cut in zip(words, (1, 5), strict=True)]
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.stack(rows), "pixel_values": pixels}


@torch.no_grad()
def logits(model, inputs) -> Tensor:
    return model(**inputs).logits


class TestLlava:
    @pytest.mark.parametrize("feature_layer", [-2, -1, 2])
    @pytest.mark.parametrize(("strategy", "num_visual_tokens"), [("default", 16), ("full", 17)])
    def test_same_logits(self, feature_layer, strategy, num_visual_tokens):
        theirs = llava(vision_feature_layer=feature_layer, vision_feature_select_strategy=strategy)
        ours = from_llava(theirs)
        assert isinstance(ours, AcFormerForConditionalGeneration)
        assert ours.config.num_placeholders == num_visual_tokens
        inputs = prompt(num_visual_tokens)
        # Measured 0 in logits up to 1.8: the same kernels on the same weights.
        torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), rtol=0, atol=1e-5)

    @pytest.mark.parametrize(("family", "tokens"), [("dinov2", 17), ("siglip_vision_model", 16)])
    def test_other_encoders(self, family, tokens):
        theirs = llava(family, vision_feature_select_strategy="full")
        inputs = prompt(tokens)
        torch.testing.assert_close(logits(from_llava(theirs), inputs), logits(theirs, inputs), rtol=0, atol=1e-5)

    def test_images_matter(self):
        ours, inputs = from_llava(llava()), prompt(16)
        swapped = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
        assert not torch.allclose(logits(ours, inputs), logits(ours, swapped), atol=1e-3)

    def test_blocks_nobody_reads_are_dropped(self):
        ours = from_llava(llava(vision_feature_layer=-2))
        assert len(ours.model.vision_tower.encoder.layers) == 3

    def test_the_original_is_left_alone(self):
        theirs, inputs = llava(), prompt(16)
        before, config = logits(theirs, inputs), copy.deepcopy(theirs.config)
        ours = from_llava(theirs)
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.zero_()
        ours.config.text_config.vocab_size = 1
        assert torch.equal(logits(theirs, inputs), before)
        assert theirs.config.to_dict() == config.to_dict()

    def test_dtype_mode_and_generation(self):
        theirs = llava().to(torch.bfloat16).train()
        theirs.generation_config.max_new_tokens = 7
        ours = from_llava(theirs)
        assert ours.dtype == torch.bfloat16
        assert ours.training
        assert ours.generation_config.max_new_tokens == 7

    def test_saves_and_loads(self, tmp_path):
        ours, inputs = from_llava(llava()), prompt(16)
        ours.save_pretrained(tmp_path)
        loaded = AcFormerForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded, inputs), logits(ours, inputs))

    @pytest.mark.parametrize(
        ("fields", "told"),
        [
            ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer=\[-2, -1\]"),
            ({"vision_feature_layer": 0}, "vision_feature_layer .*4 blocks"),
            ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
            ({"multimodal_projector_bias": False}, "multimodal_projector_bias=False"),
            ({"family": "siglip_vision_model"}, "'default' is unsupported.*drops the first token.*has 0"),
            ({"family": "dinov2_with_registers"}, "'default' is unsupported.*drops the first token.*has 5"),
            ({"family": "vit"}, "vision encoder 'vit' is unsupported"),
        ],
    )
    def test_unsupported(self, fields, told):
        with pytest.raises(CheckpointError, match=told):
            from_llava(llava(**fields))
