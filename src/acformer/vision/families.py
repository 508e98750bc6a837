"""Families of vision transformers, a line each: where its blocks and its attention are, what stands before the patches.

To add one: docs/add-an-encoder.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, MetaClip2VisionConfig, MetaClip2VisionModel, PreTrainedConfig

from acformer.errors import UsageError
from acformer.registry import Registry
from acformer.vision.library import LibraryVisionConfig


def any_size(config: PreTrainedConfig, pixels: Tensor) -> dict[str, Any]:
    """Arguments of a tower that takes images of any size."""
    return {"pixel_values": pixels}


def interpolating(config: PreTrainedConfig, pixels: Tensor) -> dict[str, Any]:
    """Of one that must be told to interpolate its position embedding where images are not of its training size."""
    other = tuple(pixels.shape[-2:]) != (image_size(config),) * 2
    return {"pixel_values": pixels, **({"interpolate_pos_encoding": True} if other else {})}


def own_size(config: PreTrainedConfig, pixels: Tensor) -> dict[str, Any]:
    """Of one that takes images of its training size alone; AIMv2's native models say that they take any."""
    side, (height, width) = image_size(config), pixels.shape[-2:]
    if (height, width) != (side, side) and not getattr(config, "is_native", False):
        raise UsageError(
            f"an encoder of type {config.model_type!r} does not take images of {height} x {width} pixels: "
            f"give it {side} x {side}"
        )
    return {"pixel_values": pixels}


def patch_sequence(config: PreTrainedConfig, pixels: Tensor) -> dict[str, Any]:
    """Of SigLIP 2's native-resolution model (NaFlex): the patches as vectors, and how many there are each way.

    All images of a batch have the same size here, so nothing is padded and there is no mask.
    """
    side = patch_size(config)
    h, w = patch_grid(config, *pixels.shape[-2:])
    cells = pixels[..., : h * side, : w * side].unflatten(-1, (w, side)).unflatten(-3, (h, side))  # (B, 3, h, p, w, p)
    patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, h w, p p 3): raster order, channels last
    shapes = torch.tensor([[h, w]], device=pixels.device)  # of one image: its positions serve the whole batch
    return {"pixel_values": patches, "pixel_attention_mask": None, "spatial_shapes": shapes}


@dataclass(frozen=True)
class EncoderFamily:
    """Where a family of vision models keeps what we need; dotted module paths."""

    blocks: str
    """The list of transformer blocks, from the model."""
    attention: str
    """The module that calls the kernel, from a block."""
    prefix: tuple[int | str, ...] = (1,)
    """Tokens before the patches, [CLS] first: numbers, and names of the config's fields that hold numbers."""
    inputs: Callable[[Any, Tensor], dict[str, Any]] = any_size
    """(config, pixels (B, 3, Y, X)) -> the arguments of the model's forward pass."""
    probe: str | None = None
    """Where there is no [CLS]: the pooling head's attention, from the model, whose learned query stands in."""


ENCODERS = Registry[EncoderFamily](
    "vision encoder type",
    "acformer.encoders",
    {
        "aimv2_vision_model": EncoderFamily("encoder.layers", "attention", (), own_size, probe="head"),
        "beit": EncoderFamily("layers", "attention"),
        "chinese_clip_vision_model": EncoderFamily("encoder.layers", "self_attn", inputs=interpolating),
        "clip_vision_model": EncoderFamily("encoder.layers", "self_attn", inputs=interpolating),
        "deit": EncoderFamily("layers", "attention", (2,), interpolating),
        "dinov2": EncoderFamily("encoder.layer", "attention"),
        "dinov2_with_registers": EncoderFamily("encoder.layer", "attention", (1, "num_register_tokens")),
        "dinov3_vit": EncoderFamily("model.layer", "attention", (1, "num_register_tokens")),
        "ijepa": EncoderFamily("layers", "attention", (), interpolating),
        "internvl_vision": EncoderFamily("encoder.layer", "attention"),
        "metaclip_2_vision_model": EncoderFamily("encoder.layers", "self_attn", inputs=interpolating),
        "mlcd_vision_model": EncoderFamily("encoder.layers", "self_attn"),
        "pixio": EncoderFamily("layers", "attention", ("n_cls_tokens",)),
        "radio": EncoderFamily("encoder.layer", "attention", ("num_cls_tokens", "num_registers")),
        "sapiens2": EncoderFamily("model.layer", "attention", (1, "num_register_tokens")),
        "siglip_vision_model": EncoderFamily("encoder.layers", "self_attn", (), interpolating, "head.attention"),
        "siglip2_vision_model": EncoderFamily("encoder.layers", "self_attn", (), patch_sequence, "head.attention"),
        "tipsv2_vision_model": EncoderFamily("encoder.layer", "attention", (1, "num_register_tokens")),
        "vit": EncoderFamily("layers", "attention", inputs=interpolating),
        "vit_msn": EncoderFamily("layers", "attention", inputs=interpolating),
    },
)
"""By the `model_type` of Hugging Face's vision config; your own: set an item, or offer an entry point."""

LIBRARY_ENCODERS = {
    "timm": EncoderFamily("model.blocks", "attn", (1, "num_register_tokens")),
    "timm_without_cls": EncoderFamily("model.blocks", "attn", ("num_register_tokens",), probe="model.attn_pool"),
    "open_clip": EncoderFamily("model.transformer.resblocks", "attn"),
}
"""By the `layout` of a `LibraryVisionConfig`."""


def encoder_family(config: PreTrainedConfig) -> EncoderFamily:
    """The line for a vision config.

    Raises:
        UsageError: there is none, or a model that hides and shuffles patches as it reads them.
    """
    if isinstance(config, LibraryVisionConfig):
        return LIBRARY_ENCODERS[config.layout]
    if getattr(config, "mask_ratio", None) is not None:
        raise UsageError(
            f"an encoder of type {config.model_type!r} hides and shuffles the patches as it reads them (mask_ratio "
            f"{config.mask_ratio}), so that its tokens have no place in the image: load its weights as another type"
        )
    return ENCODERS[config.model_type]


def num_prefix_tokens(config: PreTrainedConfig) -> int:
    """P: [CLS] and registers, which stand before the patches."""
    numbers = encoder_family(config).prefix
    return sum(number if isinstance(number, int) else getattr(config, number) for number in numbers)


def patch_size(config: PreTrainedConfig) -> int:
    """Pixels a side of a patch; `UsageError` for one that is not square."""
    return _side("patch_size", config.patch_size)


def image_size(config: PreTrainedConfig) -> int:
    """Pixels a side of the images that the encoder was trained on; `UsageError` where they are not square.

    Of SigLIP 2's native-resolution model, which has none: the square that its position embedding was made for.
    """
    if getattr(config, "image_size", None) is None:
        return math.isqrt(config.num_patches) * patch_size(config)
    return _side("image_size", config.image_size)


def patch_grid(config: PreTrainedConfig, height: int, width: int) -> tuple[int, int]:
    """(h, w) patches of an image of that many pixels."""
    side = patch_size(config)
    return height // side, width // side


def require_whole_patches(config: PreTrainedConfig, image_size: int) -> None:
    """`UsageError` where a square of that many pixels a side is not cut into whole patches.

    The encoder leaves out what remains on the right and at the bottom, and a drawn patch would lie beside its place.
    """
    patch = patch_size(config)
    rest = image_size % patch
    if rest or not image_size:
        sizes = " or ".join(str(size) for size in (image_size - rest, image_size - rest + patch) if size)
        raise UsageError(
            f"an image size of {image_size} is not a whole number of patches of {patch} pixels: take {sizes}"
        )


def _side(name: str, value: int | list[int] | tuple[int, ...]) -> int:
    sides = {value} if isinstance(value, int) else {*value}
    if len(sides) != 1:
        raise UsageError(f"the encoder's {name} is {value}: only square ones are supported")
    return sides.pop()


# transformers registers MetaCLIP 2 with both of its towers alone.
AutoModel.register(MetaClip2VisionConfig, MetaClip2VisionModel, exist_ok=True)
