"""Whether an encoder's line in `ENCODERS` is right: our features against the untouched model's own output."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from acformer.errors import UsageError
from acformer.vision.encoder import VisionEncoder, tower_inputs
from acformer.vision.families import encoder_family, image_size
from acformer.vision.features import VisionFeatures

ROW_TOLERANCE = 1e-5
"""Between rows of [CLS] attention, with entries below 1: two orders of summation (2e-7 measured in float32)."""


def check_encoder(tower: PreTrainedModel, feature_layer: int = -2) -> VisionFeatures:
    """Compare what a vision model of transformers says with what is read off it; the model itself is left alone.

    On noise of the model's own image size: the tokens of the feature layer and of every layer below it are the model's
    `hidden_states`, the [CLS] attention is the row of the eager map, and every patch of the image is at its place.

    Args:
        tower: small, random and in float32 if you like; it is copied.
        feature_layer: the one to check, -2 or lower: of the last, some models return what their final norm has changed.

    Returns:
        The features, for a look at their shapes.

    Raises:
        UsageError: what differs.
    """
    generator = torch.Generator().manual_seed(0)
    side = image_size(tower.config)
    pixels = torch.randn(1, 3, side, side, generator=generator).to(next(tower.parameters()))
    eager = copy.deepcopy(tower).eval()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = eager(**tower_inputs(tower.config, pixels), output_hidden_states=True, output_attentions=True)
    depth = len(theirs.hidden_states)
    layers = range(depth + feature_layer if feature_layer < 0 else feature_layer)
    encoder = VisionEncoder(copy.deepcopy(eager), feature_layer, layers)
    ours = _encode(encoder, pixels)
    states = [*ours.hidden_layers.unbind(1), ours.tokens]  # type: ignore[union-attr]
    for layer, (mine, their) in enumerate(zip(states, theirs.hidden_states, strict=False)):
        if not torch.equal(mine, their):
            raise UsageError(f"hidden layer {layer} is not the model's hidden_states[{layer}]: see `blocks`")
    _check_row(ours, theirs.attentions[len(layers) - 1], bool(encoder_family(tower.config).probe))
    _check_places(encoder, pixels)
    return ours


def _check_row(features: VisionFeatures, attention: Tensor, has_probe: bool) -> None:
    """The row against that of the (B, H, L, L) map; a probe's row is in no map."""
    row, prefix = features.cls_attention, features.num_prefix_tokens
    if row is None or has_probe:
        return
    largest = (row - attention[:, :, 0, prefix:]).abs().max()
    if largest > ROW_TOLERANCE:
        raise UsageError(f"the [CLS] attention differs from the row of the eager map by {largest:.1e}: see `attention`")


def _check_places(encoder: VisionEncoder, pixels: Tensor) -> None:
    """Another first, third and last patch change the tokens at their places most, before the first block."""
    before = _encode(encoder, pixels)
    h, w = before.grid
    patch = pixels.shape[-1] // w
    for y, x in {(0, 0), (0, min(2, w - 1)), (h - 1, w - 1)}:
        changed = pixels.clone()
        changed[..., y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] += 1
        difference = _encode(encoder, changed).hidden_layers - before.hidden_layers  # type: ignore[operator]
        most = int(difference[0, 0].abs().sum(-1).argmax())  # (B, K, P+N, D): of the embedding
        if most != before.num_prefix_tokens + y * w + x:
            raise UsageError(
                f"the patch in row {y}, column {x} changes token {most} most, not token "
                f"{before.num_prefix_tokens} + {y * w + x}: the patches are not in raster order behind `prefix`"
            )


def _encode(encoder: VisionEncoder, pixels: Tensor) -> VisionFeatures:
    with torch.no_grad():
        return encoder(pixels)
