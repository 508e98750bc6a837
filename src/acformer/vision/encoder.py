"""Image encoder in, `VisionFeatures` out: the one form in which every connector receives an image.

An encoder is an ordinary vision model of Hugging Face, timm or open_clip, cut after its feature layer: blocks that
nobody reads do not run and are not stored. `encode` is the one way from pixels to features; `VisionEncoder` and
`AcFormerModel` both go it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from acformer.errors import UsageError
from acformer.vision.cls_attention import record_row
from acformer.vision.families import encoder_family, num_prefix_tokens, patch_grid, patch_size
from acformer.vision.features import VisionFeatures
from acformer.vision.library import library_model
from acformer.vision.recording import THREAD, Recording, record_blocks


class VisionEncoder(nn.Module):
    """A frozen vision model that gives `VisionFeatures`; made by `load_vision_encoder`."""

    def __init__(
        self,
        tower: PreTrainedModel,
        feature_layer: int = -2,
        hidden_layers: Sequence[int] = (),
        input_grid: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.layers = hidden_layer_blocks(tower.config, hidden_layers, feature_layer)
        self.tower = prepare(tower, feature_layer).eval().requires_grad_(False)
        self.input_grid = input_grid

    def forward(self, pixel_values: Float[Tensor, "B C Y X"]) -> VisionFeatures:
        """(B, 3, Y, X) pixels as the model's image processor makes them -> features of (Y // p, X // p) patches."""
        return encode(self.tower, pixel_values, self.layers, self.input_grid)[1]


def load_vision_encoder(
    model: str | nn.Module,
    feature_layer: int = -2,
    *,
    hidden_layers: Sequence[int] = (),
    input_grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> VisionEncoder:
    """Load and freeze an image encoder, cut at the feature layer.

    Args:
        model: a hub name or local folder of a Hugging Face model (CLIP, DINOv2, DINOv3, SigLIP, SigLIP 2 and the
            others of `acformer.vision.families.ENCODERS`), `embedded:dinov2-s14` (see `acformer fetch`), `timm:NAME`,
            `open_clip:NAME@WEIGHTS` (see `load_library_model`); or a model of these libraries, which is cut in place.
        feature_layer: index into `hidden_states`; -2, the paper's choice, is the output of the last block but one.
        hidden_layers: further indices, at or below the feature layer, kept in `VisionFeatures.hidden_layers` in this
            order; 0 is the embedding, which the first block reads.
        input_grid: (h, w) patches to which images are resized first; by default they are taken as they are.
        dtype: of the weights, when they are loaded here.

    What stands in for the [CLS] attention where there is no [CLS] (SigLIP): the attention of the pooling head's probe
    to the feature layer's tokens; None without such a head.

    Raises:
        UsageError: an encoder type that is not known, a feature layer outside the model, a hidden layer above it, a
            library that is not installed.
        CheckpointError: no model under that name, or weights that do not match the architecture.
    """
    from acformer.vision.load import load_tower  # here, so that a model brings none of it along

    tower = load_tower(model, dtype) if isinstance(model, str) else model
    if not isinstance(tower, PreTrainedModel):
        tower = library_model(tower)
    return VisionEncoder(tower, feature_layer, hidden_layers, input_grid)


def encode(
    tower: PreTrainedModel,
    pixel_values: Tensor,
    layers: Sequence[int] = (),
    input_grid: tuple[int, int] | None = None,
    **kwargs: Any,
) -> tuple[BaseModelOutputWithPooling, VisionFeatures]:
    """One pass of a tower that `prepare` made ready: its own output, and the features read off it.

    Args:
        tower: the vision tower. A frozen one leaves no graph behind, one that is trained does.
        pixel_values: (B, 3, Y, X), on any device, of any dtype: moved to the tower's.
        layers: numbers of blocks whose output is wanted beside the last one's, 0 for the embedding.
        input_grid: (h, w) patches to which the images are resized first.
        **kwargs: further arguments of the tower, such as `output_hidden_states`.

    Raises:
        UsageError: images that the tower does not take; tokens in another number than its family says; a kernel from
            which the [CLS] row cannot be read.
    """
    weight = next(parameter for parameter in tower.parameters() if parameter.is_floating_point())
    if not weight.is_meta:  # a tower that is offloaded moves its inputs itself
        pixel_values = pixel_values.to(weight.device, weight.dtype)
    if input_grid is not None:
        pixel_values = resized(pixel_values, tower.config, input_grid)
    arguments: dict[str, Any] = {**kwargs, **tower_inputs(tower.config, pixel_values), "return_dict": True}
    blocks: Any = tower.get_submodule(encoder_family(tower.config).blocks)
    recording, outer = Recording((*layers, len(blocks))), THREAD.recording
    learns = pixel_values.requires_grad or any(parameter.requires_grad for parameter in tower.parameters())
    THREAD.recording = recording
    try:
        # No graph of a frozen encoder, also where `enable_input_require_grads` would start one in its embeddings. Not
        # inference_mode, whose tensors the connector could not save for its backward pass without a copy.
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            output = tower(**arguments)
    finally:
        THREAD.recording = outer
    features = _features(tower.config, recording, patch_grid(tower.config, *pixel_values.shape[-2:]), blocks, layers)
    last = features.tokens if output.last_hidden_state is None else output.last_hidden_state
    return BaseModelOutputWithPooling(last, None, output.hidden_states, output.attentions), features


def _features(
    config: PreTrainedConfig, recording: Recording, grid: tuple[int, int], blocks: Any, layers: Sequence[int]
) -> VisionFeatures:
    tokens, row, prefix = recording.tokens[len(blocks)], recording.row, num_prefix_tokens(config)
    if tokens.shape[1] != prefix + grid[0] * grid[1]:
        raise UsageError(
            f"the encoder gives {tokens.shape[1]} tokens for {grid[0]} x {grid[1]} patches, where its entry in "
            f"acformer.vision.families says {prefix} + {grid[0] * grid[1]}: "
            "its patches are not in their places, or another number of tokens stands before them"
        )
    if row is None and blocks.gives_cls_attention:
        raise UsageError(
            "the encoder's last block calls neither transformers' attention functions nor torch's "
            "scaled_dot_product_attention, so its [CLS] attention cannot be read (for timm, set TIMM_FUSED_ATTN=1)"
        )
    row = None if row is None else row[:, :, prefix - tokens.shape[1] :]  # (B, H, P+N) -> (B, H, N)
    # K times (B, P+N, D) -> (B, K, P+N, D)
    hidden = torch.stack([recording.tokens[layer] for layer in layers], dim=1) if layers else None
    return VisionFeatures(tokens, row, grid, prefix, hidden)


def prepare(tower: PreTrainedModel, feature_layer: int) -> PreTrainedModel:
    """Cut a tower after its feature layer and make it ready for `encode`, in place and once."""
    blocks = _blocks(tower)
    if "gives_cls_attention" in vars(blocks):
        raise UsageError("this vision model already belongs to an encoder; load another copy for a second one")
    truncate(tower, feature_layer)
    record_blocks(blocks)
    blocks.gives_cls_attention = record_row(tower)  # type: ignore[assignment]
    return tower


def tower_inputs(config: PreTrainedConfig, pixel_values: Tensor) -> dict[str, Any]:
    """(B, 3, Y, X) pixels -> the arguments with which the tower itself is called."""
    return encoder_family(config).inputs(config, pixel_values)


def num_blocks(config: PreTrainedConfig, layer: int, name: str = "feature_layer", least: int = 1) -> int:
    """Blocks to run for `hidden_states[layer]`, `least` or more; `name` is what an error calls the layer."""
    total = config.num_hidden_layers
    blocks = layer if layer >= 0 else total + 1 + layer
    if not least <= blocks <= total:
        valid = f"{least - total - 1}..-1 or {least}..{total}"
        raise UsageError(f"{name} {layer} is outside the encoder of {total} blocks: take {valid}")
    return blocks


def hidden_layer_blocks(config: PreTrainedConfig, hidden_layers: Sequence[int], feature_layer: int) -> list[int]:
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


def truncate(tower: PreTrainedModel, feature_layer: int) -> PreTrainedModel:
    """Drop the blocks after the feature layer, in place; the config goes on describing the whole encoder."""
    del _blocks(tower)[num_blocks(tower.config, feature_layer) :]
    return tower


def _blocks(tower: PreTrainedModel) -> nn.ModuleList | nn.Sequential:
    path = encoder_family(tower.config).blocks
    found = dict(tower.named_modules()).get(path)
    if not isinstance(found, nn.ModuleList | nn.Sequential):
        raise UsageError(f"{type(tower).__name__} has no list of blocks named {path!r}, where its family keeps them")
    return found


def resized(pixel_values: Tensor, config: PreTrainedConfig, grid: tuple[int, int]) -> Tensor:
    """The images as (B, 3, h p, w p) for h x w patches of p pixels: bicubic, with antialiasing, in float32."""
    size = [side * patch_size(config) for side in grid]
    small = F.interpolate(pixel_values.float(), size, mode="bicubic", antialias=True)
    return small.to(pixel_values.dtype)
