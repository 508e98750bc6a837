"""Models of true geometry with random weights, whose speed does not depend on them; nothing is downloaded.

Sizes come from the recipes of the same names, so that what is timed is what is trained.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, CLIPVisionConfig, Dinov2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

from acformer.connectors import Connector, Geometry, budget_options, build_connector
from acformer.errors import UsageError, unknown_name
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration
from acformer.training.recipe import load_recipe
from acformer.vision.features import VisionFeatures

CLIP_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
DINOV2_S14: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
SMOLLM2_135M: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49216,  # with <image>, padded to 64
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
VICUNA_7B: dict[str, Any] = {"vocab_size": 32064, "max_position_embeddings": 4096}  # else Llama's own defaults
VICUNA_13B: dict[str, Any] = {
    **VICUNA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
PRESETS: dict[str, tuple[str, dict[str, Any] | None, int]] = {
    "tiny": ("tiny", None, 16),
    "smol": ("smol", SMOLLM2_135M, 4),
    "llava15-7b": ("llava15-7b-acformer145", VICUNA_7B, 8),
    "llava15-13b": ("llava15-7b-acformer145", VICUNA_13B, 8),
}
"""Recipe, language model (None: the recipe says it), samples of a training step."""


@dataclass(frozen=True)
class Preset:
    """A model's config, and what is asked of it by default.

    tokens: visual tokens an image; where there are 576 patches the paper's, else the same shares. train_batch: samples
    of a training step.
    """

    name: str
    config: AcFormerConfig
    tokens: tuple[int, ...]
    train_batch: int

    @property
    def geometry(self) -> Geometry:
        """The sizes between which a connector stands."""
        return self.config.geometry

    def describe(self) -> dict[str, Any]:
        """What the JSON says of it."""
        vision, text, (h, w) = self.config.vision_config, self.config.text_config, self.geometry.grid
        return {
            "preset": self.name,
            "vision": f"{vision.model_type}, {vision.num_hidden_layers} blocks of width {vision.hidden_size}, "
            f"{vision.num_attention_heads} heads, {h} x {w} patches, feature layer {self.config.feature_layer}",
            "text": f"{text.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size}, "
            f"{text.num_attention_heads} heads ({text.num_key_value_heads} of keys), vocabulary {text.vocab_size}",
            "weights": "random: speed does not depend on them",
        }


def load_preset(name: str) -> Preset:
    """By name; `UsageError` with the valid ones for any other."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    recipe, text, train_batch = PRESETS[name]
    spec = load_recipe(recipe).model
    is_dinov2 = spec.vision == "embedded:dinov2-s14"
    config = AcFormerConfig(
        vision_config=Dinov2Config(**DINOV2_S14) if is_dinov2 else CLIPVisionConfig(**CLIP_L_336),
        text_config=LlamaConfig(**(text or _new_text(spec.text, spec.tokenizer_vocab))),
        **spec.architecture(),
        image_token_id=1,
    )
    patches = config.geometry.num_patches
    tokens = tuple(patches * share // 576 + 1 for share in (256, 144, 64))
    return Preset(name, config, tokens, train_batch)


def random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model with initialised weights, made where it shall be; `UsageError` if it does not fit there."""
    is_ours = isinstance(config, AcFormerConfig)
    make = AcFormerForConditionalGeneration._from_config if is_ours else AutoModel.from_config
    with torch.device("meta"):
        model = make(config, dtype=dtype)
    check_memory(sum(p.numel() for p in model.parameters()) * dtype.itemsize, device)
    model.to_empty(device=device)
    model.init_weights()
    return model.eval()


def build_connectors(
    preset: Preset,
    names: Iterable[str],
    tokens: Iterable[int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    recipe_options: bool = True,
) -> dict[tuple[str, int], Connector]:
    """Connectors by name and T: each once for every T that it can give.

    recipe_options: the recipe's own connector has the recipe's options, and not the registry's defaults.
    """
    config, geometry = preset.config, preset.config.geometry
    found: dict[tuple[str, int], Connector] = {}
    for name in names:
        own = config.connector_kwargs if recipe_options and name == config.connector else {}
        for number in tokens:
            options = {**own, **budget_options(name, geometry, number)}
            with torch.device("meta"):
                num_tokens = build_connector(name, geometry, **options).num_tokens
            if (name, num_tokens) not in found:
                with torch.device(device):
                    found[name, num_tokens] = build_connector(name, geometry, **options).to(dtype)
    return found


def random_features(
    preset: Preset, connector: Connector, batch: int, device: torch.device, dtype: torch.dtype
) -> VisionFeatures:
    """Features in the shapes that a connector reads; scores in float32, as encoders give them."""
    sizes, (h, w) = connector.geometry, connector.input_grid
    shape = (batch, sizes.num_prefix_tokens + h * w, sizes.vision_hidden_size)
    tokens = torch.randn(shape, device=device, dtype=dtype)
    num_heads = preset.config.vision_config.num_attention_heads
    row = torch.rand(batch, num_heads, h * w, device=device).softmax(-1)
    hidden_layers = torch.stack([tokens] * len(connector.hidden_layers), dim=1) if connector.hidden_layers else None
    return VisionFeatures(tokens, row, (h, w), sizes.num_prefix_tokens, hidden_layers)


def check_memory(nbytes: int, device: torch.device) -> None:
    """`UsageError` with both numbers, where weights alone exceed the memory that is free on the device."""
    free = free_memory(device)
    if free is not None and nbytes > free:
        raise UsageError(
            f"the weights alone take {nbytes / 2**30:.1f} GiB and {device} has {free / 2**30:.1f} GiB free: take a "
            "smaller --preset, --dtype bfloat16 or another --device"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that could still be had; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    lines = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
    return next(1024 * int(value) for name, value, *_ in lines if name == "MemAvailable:")


def _new_text(options: Any, vocab_size: int) -> dict[str, Any]:
    """A recipe's own language model as options of `LlamaConfig`."""
    return {"vocab_size": vocab_size, **{key: value for key, value in options.items() if key != "model_type"}}
