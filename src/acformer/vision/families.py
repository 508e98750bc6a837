"""Families of vision transformers: where each keeps its blocks, its attention and its [CLS] token, a line each."""

from dataclasses import dataclass
from typing import TypeAlias

from transformers import PreTrainedConfig, PreTrainedModel

from acformer.errors import unknown_name
from acformer.vision.timm_encoders import LibraryConfig, LibraryTower

Tower: TypeAlias = PreTrainedModel | LibraryTower
TowerConfig: TypeAlias = PreTrainedConfig | LibraryConfig


@dataclass(frozen=True)
class EncoderFamily:
    """Where a family of vision models keeps what we need; dotted module paths."""

    blocks: str
    """The list of transformer blocks, from the model."""
    attention: str
    """The module that calls the kernel, from a block."""
    fixed_size: bool
    """Whether the model must be told to interpolate its position embedding to another image size."""
    prefix: int
    """Tokens before the patches, registers not counted."""
    probe: str | None = None
    """The pooling head's attention, from the model, where there is no [CLS]."""


ENCODERS = {
    "clip_vision_model": EncoderFamily("encoder.layers", "self_attn", fixed_size=True, prefix=1),
    "dinov2": EncoderFamily("encoder.layer", "attention", fixed_size=False, prefix=1),
    "dinov2_with_registers": EncoderFamily("encoder.layer", "attention", fixed_size=False, prefix=1),
    "siglip_vision_model": EncoderFamily(
        "encoder.layers", "self_attn", fixed_size=True, prefix=0, probe="head.attention"
    ),
}
LIBRARY_ENCODERS = {  # from `LibraryTower`
    "timm": EncoderFamily("model.blocks", "attn", fixed_size=False, prefix=1),
    "timm_without_cls": EncoderFamily("model.blocks", "attn", fixed_size=False, prefix=0, probe="model.attn_pool"),
    "open_clip": EncoderFamily("model.transformer.resblocks", "attn", fixed_size=False, prefix=1),
}


def encoder_family(config: TowerConfig) -> EncoderFamily:
    """The line for a vision config; `UsageError` listing Hugging Face's known ones otherwise."""
    known = LIBRARY_ENCODERS if isinstance(config, LibraryConfig) else ENCODERS
    if config.model_type not in known:
        raise unknown_name("vision encoder type", config.model_type, known)
    return known[config.model_type]


def num_prefix_tokens(config: TowerConfig) -> int:
    """P: [CLS] and registers, which stand before the patches."""
    return encoder_family(config).prefix + config.to_dict().get("num_register_tokens", 0)
