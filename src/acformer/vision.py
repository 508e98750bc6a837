"""Image encoder in, `VisionFeatures` out: the one form in which every connector receives an image.

An encoder is an ordinary Hugging Face vision model, frozen, cut after its feature layer: blocks that nobody reads
do not run and are not stored.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)

from acformer.cls_attention import ClsAttentionTap, encoder_family, num_prefix_tokens
from acformer.embedded import resolve
from acformer.errors import CheckpointError, UsageError


class VisionFeatures(NamedTuple):
    """What an encoder knows about a batch of images (Sec. 3.1).

    tokens: (B, P+N, D) output R_v of the feature layer, no final LayerNorm; prefix tokens ([CLS], registers) first.
    cls_attention: (B, H, N) attention A of [CLS] to the patches in the same block; None where the encoder has none.
    grid: (h, w) patches, h * w = N.
    num_prefix_tokens: P, 0 for SigLIP.
    levels: (B, K, P+N, D) outputs of the K blocks that a multi-level connector reads (`Connector.levels`, in its
        order); None where it reads the feature layer alone.
    """

    tokens: Float[Tensor, "B L D"]
    cls_attention: Float[Tensor, "B H N"] | None
    grid: tuple[int, int]
    num_prefix_tokens: int
    levels: Float[Tensor, "B K L D"] | None = None

    @property
    def arrays(self) -> dict[str, Tensor]:
        """The tensors by name, those that are there: what a cache keeps of a batch, a row an image."""
        found = {"tokens": self.tokens, "cls_attention": self.cls_attention, "levels": self.levels}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def patches(self) -> Float[Tensor, "B N D"]:
        """(B, N, D): the tokens without the prefix."""
        return self.tokens[:, self.num_prefix_tokens :]


class VisionEncoder(nn.Module):
    """A frozen Hugging Face vision model that gives `VisionFeatures`; made by `load_vision_encoder`."""

    def __init__(self, tower: PreTrainedModel, feature_layer: int = -2, levels: Sequence[int] = ()):
        super().__init__()
        blocks = level_blocks(tower.config, levels, feature_layer)
        self.tower = truncate(tower, feature_layer).eval().requires_grad_(False)
        self.tap = ClsAttentionTap(self.tower, blocks)

    def forward(self, pixel_values: Float[Tensor, "B C Y X"]) -> VisionFeatures:
        """(B, 3, Y, X) pixels as the model's image processor makes them -> features of (Y // p, X // p) patches."""
        self.tower(pixel_values, **size_kwargs(self.tower.config, pixel_values))
        return features_from_tap(self.tap, self.tower.config, pixel_values)


def load_vision_encoder(
    model: str | PreTrainedModel,
    feature_layer: int = -2,
    *,
    levels: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> VisionEncoder:
    """Load and freeze an image encoder (CLIP, DINOv2 with or without registers, SigLIP), cut at the feature layer.

    Args:
        model: a hub name, a local folder, `embedded:dinov2-s14` (see `acformer fetch`), or a Hugging Face vision
            model, which is cut in place.
        feature_layer: index into `hidden_states`; -2, the paper's choice, is the output of the last block but one.
        levels: further indices, at or below the feature layer, kept in `VisionFeatures.levels` in this order.
        dtype: of the weights, when they are loaded here.

    What stands in for the [CLS] attention: CLIP and DINOv2 have it. SigLIP has no [CLS]: its row is the attention
    of the pooling head's probe to the feature layer's tokens, and it has no prefix tokens.

    Raises:
        UsageError: an encoder type that is not known, a feature layer outside the model, a level above it.
        CheckpointError: no model under that name, or weights that do not match the architecture.
    """
    tower = load_tower(resolve(model), dtype) if isinstance(model, str) else model
    return VisionEncoder(tower, feature_layer, levels)


def num_blocks(config: PreTrainedConfig, layer: int, name: str = "feature_layer") -> int:
    """Blocks to run so that the last one's output is `hidden_states[layer]`; `name` is what an error calls it."""
    total = config.num_hidden_layers
    blocks = layer if layer >= 0 else total + 1 + layer
    if not 1 <= blocks <= total:
        raise UsageError(f"{name} {layer} is outside the encoder of {total} blocks: take {-total}..-1 or 1..{total}")
    return blocks


def level_blocks(config: PreTrainedConfig, levels: Sequence[int], feature_layer: int) -> list[int]:
    """Place of the block whose output each of the levels is; `UsageError` for one above the feature layer."""
    last = num_blocks(config, feature_layer)
    blocks = [num_blocks(config, level, "level") for level in levels]
    for level, block in zip(levels, blocks, strict=True):
        if block > last:
            raise UsageError(
                f"level {level} is block {block} of the encoder, which ends at block {last} (feature_layer "
                f"{feature_layer}): take lower levels or a higher feature_layer"
            )
    return [block - 1 for block in blocks]


def truncate(tower: PreTrainedModel, feature_layer: int) -> PreTrainedModel:
    """Drop the blocks after the feature layer, in place; the config goes on describing the whole encoder."""
    keep = num_blocks(tower.config, feature_layer)
    del tower.get_submodule(encoder_family(tower.config).blocks)[keep:]
    return tower


def size_kwargs(config: PreTrainedConfig, pixel_values: Tensor) -> dict[str, bool]:
    """What the tower must be told when the images are not of its training size."""
    same = tuple(pixel_values.shape[-2:]) == (config.image_size, config.image_size)
    return {"interpolate_pos_encoding": True} if encoder_family(config).fixed_size and not same else {}


def patch_grid(config: PreTrainedConfig, height: int, width: int) -> tuple[int, int]:
    """(h, w) patches of an image of that many pixels."""
    return height // config.patch_size, width // config.patch_size


def features_from_tap(tap: ClsAttentionTap, config: PreTrainedConfig, pixel_values: Tensor) -> VisionFeatures:
    """Gather what the tower's forward pass over `pixel_values` has left in its tap."""
    tokens, row, levels = tap.read()
    grid = patch_grid(config, *pixel_values.shape[-2:])
    return VisionFeatures(tokens, row, grid, num_prefix_tokens(config), levels)


def resized(pixel_values: Tensor, config: PreTrainedConfig, grid: tuple[int, int]) -> Tensor:
    """The images as (B, 3, h p, w p) for h x w patches of p pixels: bicubic, with antialiasing, in float32."""
    size = [side * config.patch_size for side in grid]
    small = F.interpolate(pixel_values.float(), size, mode="bicubic", antialias=True)
    return small.to(pixel_values.dtype)


def load_tower(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The vision half of a checkpoint; of CLIP's and SigLIP's two-tower checkpoints only that half is read."""
    with loading(name):
        model_type = AutoConfig.from_pretrained(name).model_type
        loader = {
            "clip": CLIPVisionModel,
            "clip_vision_model": CLIPVisionModel,
            "siglip": SiglipVisionModel,
            "siglip_vision_model": SiglipVisionModel,
        }.get(model_type, AutoModel)
        # Other shapes are let through to be told below, where transformers' own error would not name them.
        tower, report = loader.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    if report["missing_keys"] or report["mismatched_keys"]:
        missing = sorted(report["missing_keys"]) or sorted(str(key) for key in report["mismatched_keys"])
        raise CheckpointError(f"{name}: {len(missing)} weights are missing or of another shape, first: {missing[0]}")
    return tower


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn the many errors of a failed load into one `CheckpointError` that names the model."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"cannot load {name!r}: {reason}") from error
