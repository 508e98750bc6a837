"""`bench encoder`: what the [CLS] row and the anchors add to a plain pass, and what the authors' way costs."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from acformer.anchors.selectors import SELECTORS
from acformer.lab.bench import authors
from acformer.lab.bench.floors import cls_row_flops, encoder_flops
from acformer.lab.bench.presets import fresh
from acformer.lab.bench.report import Row
from acformer.lab.bench.settings import Settings
from acformer.lab.bench.timing import Variant, measure
from acformer.vision.encoder import VisionEncoder, tower_inputs, truncate

VARIANTS = ("plain", "cls_row", "anchors", "all_layers", "authors")


def rows(settings: Settings) -> list[Row]:
    """One a batch and variant; `ratio` is to the plain pass of the same round."""
    config, image_size = settings.preset.config, settings.preset.config.image_size
    tower = fresh(config.vision_config, settings.device, settings.dtype)
    names = settings.variants or VARIANTS
    found = []
    for batch in settings.batch:
        pixels = torch.randn(batch, 3, image_size, image_size, device=settings.device, dtype=settings.dtype)
        known = encoder_variants(tower, config.feature_layer, pixels, settings.tokens[0] - 1)
        chosen = {name: known[name] for name in dict.fromkeys(["plain", *names])}
        with torch.inference_mode():
            timings = measure(
                chosen, settings.device, settings.dtype, settings.rounds, label=settings.label("batch", batch)
            )
        found += [{"batch": batch, "variant": name, **timings.row(name, "plain")} for name in chosen]
    return found


def encoder_variants(
    tower: PreTrainedModel, feature_layer: int, pixels: Tensor, num_anchors: int
) -> dict[str, Variant]:
    """Ways to the same features, cheapest first; the tower's weights are shared.

    plain: SDPA up to the feature layer, nothing else. cls_row: the same with the [CLS] row. anchors: and the selection.
    all_layers: SDPA through all blocks, as LLaVA does. authors: see `bench.authors`.
    """
    config, batch = tower.config, pixels.shape[0]
    h, w = (side // config.patch_size for side in pixels.shape[-2:])
    plain, encoder = truncate(sharing(tower), feature_layer), VisionEncoder(sharing(tower), feature_layer)
    eager = sharing(tower)
    eager.set_attn_implementation("eager")
    inputs = tower_inputs(config, pixels)
    to_layer, row = encoder_flops(config, (h, w), feature_layer), cls_row_flops(config, (h, w))
    whole = encoder_flops(config, (h, w))
    return {
        "plain": Variant(lambda: plain(**inputs), batch * to_layer),
        "cls_row": Variant(lambda: encoder(pixels), batch * (to_layer + row)),
        "anchors": Variant(lambda: ours(encoder, pixels, num_anchors), batch * (to_layer + row)),
        "all_layers": Variant(lambda: tower(**inputs), batch * whole),
        "authors": Variant(lambda: theirs(eager, pixels, feature_layer, num_anchors), batch * whole),
    }


def ours(encoder: VisionEncoder, pixels: Tensor, num_anchors: int) -> Tensor:
    """Pixels -> anchors."""
    return SELECTORS["anchors"](encoder(pixels), num_anchors)


def theirs(tower: PreTrainedModel, pixels: Tensor, feature_layer: int, num_anchors: int) -> Tensor:
    """Pixels -> anchors, the authors' way."""
    return authors.select(authors.encode(tower, pixels, feature_layer)[1], num_anchors)


def sharing(tower: PreTrainedModel) -> PreTrainedModel:
    """A copy with a config of its own and the same weights."""
    return copy.deepcopy(tower, {id(weight): weight for weight in tower.parameters()})
