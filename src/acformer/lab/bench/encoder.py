"""`bench encoder`: what the [CLS] row and the anchors add to a plain pass, and what the authors' way costs."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from acformer.anchors.selectors import SELECTORS
from acformer.lab.bench import release_baseline
from acformer.lab.bench.presets import random_model
from acformer.lab.bench.roofline import cls_row_flops, encoder_flops
from acformer.lab.bench.settings import Settings
from acformer.lab.bench.timing import Result, Variant, timed_rows
from acformer.vision.encoder import VisionEncoder, tower_inputs, truncate

VARIANTS = ("plain", "cls_row", "anchors", "all_layers", "authors")


def rows(settings: Settings) -> list[Result]:
    """One a batch and variant; `ratio` is to the plain pass of the same round."""
    config, side = settings.preset.config, settings.preset.config.image_size
    tower = random_model(config.vision_config, settings.device, settings.dtype)
    names = dict.fromkeys(["plain", *(settings.variants or VARIANTS)])
    found = []
    for batch in settings.batch:
        pixels = torch.randn(batch, 3, side, side, device=settings.device, dtype=settings.dtype)
        known = encoder_variants(tower, config.feature_layer, pixels, settings.tokens[0] - 1)
        variants = [({"batch": batch, "variant": name}, known[name]) for name in names]
        with torch.inference_mode():
            found += timed_rows(settings, variants, {"variant": "plain"}, label=("batch", batch))
    return found


def encoder_variants(
    tower: PreTrainedModel, feature_layer: int, pixels: Tensor, num_anchors: int
) -> dict[str, Variant]:
    """Ways to the same features, cheapest first; the tower's weights are shared.

    plain: SDPA up to the feature layer, nothing else. cls_row: the same with the [CLS] row. anchors: and the selection.
    all_layers: SDPA through all blocks, as LLaVA does. authors: see `bench.release_baseline`.
    """
    config, batch = tower.config, pixels.shape[0]
    h, w = (side // config.patch_size for side in pixels.shape[-2:])
    plain, encoder = truncate(_shared(tower), feature_layer), VisionEncoder(_shared(tower), feature_layer)
    eager = _shared(tower)
    eager.set_attn_implementation("eager")
    inputs = tower_inputs(config, pixels)
    to_layer, row = encoder_flops(config, (h, w), feature_layer), cls_row_flops(config, (h, w))
    whole = encoder_flops(config, (h, w))

    def anchors() -> Tensor:
        return SELECTORS["anchors"](encoder(pixels), num_anchors)

    def authors() -> Tensor:
        return release_baseline.select(release_baseline.encode(eager, pixels, feature_layer)[1], num_anchors)

    return {
        "plain": Variant(lambda: plain(**inputs), batch * to_layer),
        "cls_row": Variant(lambda: encoder(pixels), batch * (to_layer + row)),
        "anchors": Variant(anchors, batch * (to_layer + row)),
        "all_layers": Variant(lambda: tower(**inputs), batch * whole),
        "authors": Variant(authors, batch * whole),
    }


def _shared(tower: PreTrainedModel) -> PreTrainedModel:
    """A copy with a config of its own and the same weights."""
    return copy.deepcopy(tower, {id(weight): weight for weight in tower.parameters()})
