"""Image encoder in, `VisionFeatures` out: the one form in which every connector receives an image.

An encoder is an ordinary vision model of Hugging Face, timm or open_clip, frozen, cut after its feature layer: blocks
that nobody reads do not run and are not stored.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoModel,
    CLIPVisionModel,
    LlavaImageProcessorPil,
    PreTrainedModel,
    SiglipVisionModel,
)

from acformer.errors import AcFormerError, CheckpointError, UsageError
from acformer.fetch.embedded import resolve
from acformer.untrusted import load_config
from acformer.vision.cls_attention import ClsAttentionTap
from acformer.vision.families import Tower, TowerConfig, encoder_family, num_prefix_tokens
from acformer.vision.features import VisionFeatures
from acformer.vision.timm_encoders import LibraryTower, is_library_name, library_tower, load_library_tower


class VisionEncoder(nn.Module):
    """A frozen vision model that gives `VisionFeatures`; made by `load_vision_encoder`."""

    def __init__(self, tower: Tower, feature_layer: int = -2, hidden_layers: Sequence[int] = ()):
        super().__init__()
        blocks = hidden_layer_blocks(tower.config, hidden_layers, feature_layer)
        self.tower = truncate(tower, feature_layer).eval().requires_grad_(False)
        self.tap = ClsAttentionTap(self.tower, blocks)

    def forward(self, pixel_values: Float[Tensor, "B C Y X"]) -> VisionFeatures:
        """(B, 3, Y, X) pixels as the model's image processor makes them -> features of (Y // p, X // p) patches."""
        self.tower(pixel_values, **size_kwargs(self.tower.config, pixel_values))
        return features_from_tap(self.tap, self.tower.config, pixel_values)


def load_vision_encoder(
    model: str | nn.Module,
    feature_layer: int = -2,
    *,
    hidden_layers: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> VisionEncoder:
    """Load and freeze an image encoder, cut at the feature layer.

    Args:
        model: a hub name or local folder of a Hugging Face model (CLIP, DINOv2 with or without registers, SigLIP),
            `embedded:dinov2-s14` (see `acformer fetch`), `timm:NAME`, `open_clip:NAME@WEIGHTS` (see
            `load_library_tower`); or a model of these libraries, which is cut in place.
        feature_layer: index into `hidden_states`; -2, the paper's choice, is the output of the last block but one.
        hidden_layers: further indices, at or below the feature layer, kept in `VisionFeatures.hidden_layers` in this
            order; 0 is the embedding, which the first block reads.
        dtype: of the weights, when they are loaded here.

    What stands in for the [CLS] attention where there is no [CLS] (SigLIP): the attention of the pooling head's probe
    to the feature layer's tokens; None without such a head.

    Raises:
        UsageError: an encoder type that is not known, a feature layer outside the model, a hidden layer above it, a
            library that is not installed.
        CheckpointError: no model under that name, or weights that do not match the architecture.
    """
    tower = _named_tower(model, dtype) if isinstance(model, str) else model
    if not isinstance(tower, PreTrainedModel | LibraryTower):
        tower = library_tower(tower)
    return VisionEncoder(tower, feature_layer, hidden_layers)


def pixel_statistics(vision: str | Tower) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, by channel, with which the encoder wants its pixels normalised.

    vision: an encoder's tower, or a name as `load_vision_encoder` takes it; `UsageError` or `CheckpointError` where
    the model does not say.
    """
    if isinstance(vision, str) and is_library_name(vision):
        vision = _named_tower(vision, torch.float32)
    if isinstance(vision, LibraryTower):
        config = vision.config
        if config.image_mean is None or config.image_std is None:
            raise UsageError(f"{vision.name_or_path or 'the model'} does not say the mean and std of its pixels")
        return list(config.image_mean), list(config.image_std)
    name = resolve(vision if isinstance(vision, str) else vision.name_or_path)
    with loading(name):
        # The file itself: AutoImageProcessor wants torchvision in transformers < 5.19.
        own, _ = LlavaImageProcessorPil.get_image_processor_dict(name)
    mean, std = own.get("image_mean"), own.get("image_std")
    if not (_are_three_numbers(mean) and _are_three_numbers(std) and all(std)):
        raise CheckpointError(
            f"{name}: its preprocessor_config.json gives no image_mean and image_std of three numbers, not 0: "
            f"{mean!r}, {std!r}"
        )
    return list(mean), list(std)


def _are_three_numbers(values: Any) -> bool:
    is_list = isinstance(values, list | tuple) and len(values) == 3
    return is_list and all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def num_blocks(config: TowerConfig, layer: int, name: str = "feature_layer", least: int = 1) -> int:
    """Blocks to run for `hidden_states[layer]`, `least` or more; `name` is what an error calls the layer."""
    total = config.num_hidden_layers
    blocks = layer if layer >= 0 else total + 1 + layer
    if not least <= blocks <= total:
        valid = f"{least - total - 1}..-1 or {least}..{total}"
        raise UsageError(f"{name} {layer} is outside the encoder of {total} blocks: take {valid}")
    return blocks


def hidden_layer_blocks(config: TowerConfig, hidden_layers: Sequence[int], feature_layer: int) -> list[int]:
    """Blocks to run for each hidden layer, 0 for the embedding; `UsageError` for one above the feature layer."""
    last = num_blocks(config, feature_layer)
    blocks = [num_blocks(config, layer, "hidden layer", least=0) for layer in hidden_layers]
    for layer, block in zip(hidden_layers, blocks, strict=True):
        if block > last:
            raise UsageError(
                f"hidden layer {layer} is block {block} of the encoder, which ends at block {last} (feature_layer "
                f"{feature_layer}): take lower hidden layers or a higher feature_layer"
            )
    return blocks


def truncate(tower: Tower, feature_layer: int) -> Tower:
    """Drop the blocks after the feature layer, in place; the config goes on describing the whole encoder."""
    keep = num_blocks(tower.config, feature_layer)
    blocks: Any = tower.get_submodule(encoder_family(tower.config).blocks)
    del blocks[keep:]
    return tower


def size_kwargs(config: TowerConfig, pixel_values: Tensor) -> dict[str, bool]:
    """What the tower must be told when the images are not of its training size."""
    same = tuple(pixel_values.shape[-2:]) == (config.image_size, config.image_size)
    return {"interpolate_pos_encoding": True} if encoder_family(config).fixed_size and not same else {}


def patch_grid(config: TowerConfig, height: int, width: int) -> tuple[int, int]:
    """(h, w) patches of an image of that many pixels."""
    return height // config.patch_size, width // config.patch_size


def require_whole_patches(config: TowerConfig, image_size: int) -> None:
    """`UsageError` where a square of that many pixels a side is not cut into whole patches.

    The encoder leaves out what remains on the right and at the bottom, and a drawn patch would lie beside its place.
    """
    patch, rest = config.patch_size, image_size % config.patch_size
    if rest or not image_size:
        sizes = " or ".join(str(size) for size in (image_size - rest, image_size - rest + patch) if size)
        raise UsageError(
            f"an image size of {image_size} is not a whole number of patches of {patch} pixels: take {sizes}"
        )


def features_from_tap(tap: ClsAttentionTap, config: TowerConfig, pixel_values: Tensor) -> VisionFeatures:
    """Gather what the tower's forward pass over `pixel_values` has left in its tap."""
    tokens, row, hidden_layers = tap.read()
    grid = patch_grid(config, *pixel_values.shape[-2:])
    return VisionFeatures(tokens, row, grid, num_prefix_tokens(config), hidden_layers)


def resized(pixel_values: Tensor, config: TowerConfig, grid: tuple[int, int]) -> Tensor:
    """The images as (B, 3, h p, w p) for h x w patches of p pixels: bicubic, with antialiasing, in float32."""
    size = [side * config.patch_size for side in grid]
    small = F.interpolate(pixel_values.float(), size, mode="bicubic", antialias=True)
    return small.to(pixel_values.dtype)


def load_tower(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The vision half of a checkpoint; of CLIP's and SigLIP's two-tower checkpoints only that half is read."""
    if is_library_name(name):
        raise UsageError(
            f"{name}: a model is built and trained with a Hugging Face encoder only, see load_vision_encoder"
        )
    with loading(name):
        model_type = load_config(name).model_type
        loader = {
            "clip": CLIPVisionModel,
            "clip_vision_model": CLIPVisionModel,
            "siglip": SiglipVisionModel,
            "siglip_vision_model": SiglipVisionModel,
        }.get(model_type, AutoModel)
        # Other shapes are let through to be told below, where transformers' own error would not name them.
        tower, report = loader.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    if report["missing_keys"] or report["mismatched_keys"]:
        missing = sorted(report["missing_keys"]) or sorted(str(key) for key in report["mismatched_keys"])
        raise CheckpointError(f"{name}: {len(missing)} weights are missing or of another shape, first: {missing[0]}")
    return tower


def _named_tower(name: str, dtype: torch.dtype) -> Tower:
    if not is_library_name(name):
        return load_tower(resolve(name), dtype)
    with loading(name):
        return load_library_tower(name, dtype)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn the many errors of a failed load into one `CheckpointError` that names the model; ours stay as they are."""
    try:
        yield
    except AcFormerError:
        raise
    except Exception as error:  # files, configs and models have no end of ways to say that they are wrong
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it works only with code that comes along with it, and such code is never run"
        raise CheckpointError(f"cannot load {name!r}: {reason}") from error
