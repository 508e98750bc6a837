"""The release's weights in our modules give the release's outputs; LLaVA's give LLaVA's logits."""

import copy
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, LlavaConfig, LlavaForConditionalGeneration

from acformer.connectors import Geometry, build_connector
from acformer.connectors.blocks import CrossAttentionStack
from acformer.errors import CheckpointError
from acformer.hf import AcFormerForConditionalGeneration
from acformer.hf.convert import from_llava

RELEASE = load_file(Path(__file__).parent / "fixtures" / "resampler.safetensors")
RELEASE_NAMES = {  # the release's -> ours, in `layers.i.`
    "0.norm_latents": "attention.norm_queries",
    "0.norm_media": "attention.norm_features",
    "0.to_q": "attention.q_proj",
    "0.to_kv": "attention.kv_proj",
    "0.to_out": "attention.o_proj",
    "1": "feed_forward",
}
GEOMETRY = Geometry(64, 48, (6, 8), 1)  # D of the fixture, an E of our own, its 49 features
SIZES = {"depth": 2, "num_heads": 4, "head_dim": 16, "ff_mult": 4}
IMAGE_TOKEN = 90


def release_weights() -> dict[str, Tensor]:
    """Of the fixture's stack, under our names; its `latents` are not in it, which the release never reads."""
    weights = {}
    for name, tensor in RELEASE.items():
        if name.startswith("state.") and name != "state.latents":
            layer, theirs, rest = re.fullmatch(r"state\.(layers\.\d+\.|)(0\.[a-z_]+|1|norm)\.(.+)", name).groups()
            weights[f"{layer}{RELEASE_NAMES.get(theirs, theirs)}.{rest}"] = tensor
    return weights


class TestRelease:
    def test_the_stack_gives_the_releases_output(self):
        stack = CrossAttentionStack(64, **SIZES).double()
        stack.load_state_dict(release_weights())
        output = stack(RELEASE["input.queries"], RELEASE["input.features"])
        # Measured 1.6e-15 in outputs up to 3.9: float64, another attention kernel.
        torch.testing.assert_close(output, RELEASE["output"], rtol=0, atol=1e-10)

    def test_the_connector_is_that_stack_and_the_projector(self, make_features):
        torch.manual_seed(0)
        connector = build_connector("acformer", GEOMETRY, num_anchors=8, **SIZES).double()
        connector.stack.load_state_dict(release_weights())
        stack = CrossAttentionStack(64, **SIZES).double()
        stack.load_state_dict(release_weights())
        features = make_features(GEOMETRY, dtype=torch.float64)
        hidden = stack(connector.queries(features, 9), features.tokens)
        first, _, second = connector.projector
        hidden = torch.nn.functional.gelu(hidden @ first.weight.T + first.bias)
        # Measured 4.4e-16.
        torch.testing.assert_close(connector(features), hidden @ second.weight.T + second.bias, rtol=0, atol=1e-13)

    def test_its_latents_are_queries_of_a_perceiver(self, make_features):
        connector = build_connector("perceiver", GEOMETRY, num_queries=9, **SIZES).double()
        connector.stack.load_state_dict(release_weights())
        connector.queries.load_state_dict({"latents": RELEASE["state.latents"]})
        features = make_features(GEOMETRY, dtype=torch.float64)
        hidden = connector.stack(RELEASE["state.latents"].expand(2, -1, -1), features.tokens)
        assert torch.equal(connector(features), connector.projector(hidden))


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
        ("fields", "message"),
        [
            ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer=\[-2, -1\]"),
            ({"vision_feature_layer": 0}, "vision_feature_layer .*4 blocks"),
            ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
            ({"multimodal_projector_bias": False}, "multimodal_projector_bias=False"),
            ({"family": "siglip_vision_model"}, "'default' is unsupported.*drops the first token.*has 0"),
            ({"family": "dinov2_with_registers"}, "'default' is unsupported.*drops the first token.*has 5"),
            ({"family": "vit_mae"}, "vision encoder 'vit_mae' is unsupported"),
        ],
    )
    def test_unsupported(self, fields, message):
        with pytest.raises(CheckpointError, match=message):
            from_llava(llava(**fields))
