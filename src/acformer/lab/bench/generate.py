"""`bench generate`: from a picture to the first token, and from token to token, at several numbers of visual tokens.

Parts are timed each by itself and the first token as a whole. Unlike `model.generate` there is no sampling loop around
a step, so times are those of the model alone; the cache is the dynamic one, nothing is compiled.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from acformer.connectors import Connector
from acformer.connectors.queries import SelectedQueries
from acformer.connectors.resampler import QueryConnector
from acformer.hf import AcFormerForConditionalGeneration
from acformer.lab.bench.floors import (
    cls_row_flops,
    connector_bytes,
    connector_flops,
    encoder_flops,
    kv_bytes,
    text_flops,
    text_weights,
)
from acformer.lab.bench.presets import connectors_at, fresh
from acformer.lab.bench.report import Row
from acformer.lab.bench.settings import Settings
from acformer.lab.bench.timing import Variant, measure
from acformer.vision.features import VisionFeatures

QUESTION = 32
"""Tokens of the prompt beside the image's."""
STEPS = 8
"""Tokens generated for one measurement."""


def rows(settings: Settings) -> list[Row]:
    """One a connector, T and part; `ratio` is to `mlp`. Only the steps of generation come at every batch size.

    encoder, selector (part of the connector), connector, prefill (the language model on T + question tokens), first
    token (all of these), token (a step, at each batch size).
    """
    config, geometry = settings.preset.config, settings.preset.geometry
    model = fresh(config, settings.device, settings.dtype)
    names = dict.fromkeys(["mlp", *settings.connectors])
    options = settings.preset.options
    connectors = connectors_at(geometry, names, settings.tokens, settings.device, settings.dtype, options)
    variants: dict[str, Variant] = {}
    labels: dict[str, Row] = {}
    with torch.inference_mode():
        for (name, tokens), connector in connectors.items():
            for (part, batch), variant in parts(model, connector, settings).items():
                key = f"{name} {tokens} {part} {batch}"
                variants[key] = variant
                labels[key] = {"connector": name, "tokens": tokens, "part": part, "batch": batch}
        timings = measure(variants, settings.device, settings.dtype, settings.rounds, label=settings.label())
    found = []
    for key, row in labels.items():
        same = [k for k, other in labels.items() if other["part"] == row["part"] and other["batch"] == row["batch"]]
        base = next((k for k in same if labels[k]["connector"] == "mlp"), None)
        kept = kv_bytes(config.text_config, row["tokens"], settings.dtype)
        found.append({**row, "kv_mib_image": round(kept / 2**20, 3), **timings.row(key, base)})
    return found


def parts(
    model: AcFormerForConditionalGeneration, connector: Connector, settings: Settings
) -> dict[tuple[str, int], Variant]:
    """What a picture and an answer are made of, with this connector in the model; by name and batch size."""
    config, tokens = settings.preset.config, connector.num_tokens
    text, size = config.text_config, config.image_size
    pixels = torch.randn(1, 3, size, size, device=settings.device, dtype=settings.dtype)
    model.model.connector = connector
    features = model.get_vision_features(pixels)
    prompt = prompt_ids(tokens, config, settings.device)
    embeddings = model.get_input_embeddings()(prompt)

    def answer(**images: Any) -> Any:
        model.model.connector = connector
        return model(input_ids=prompt, logits_to_keep=1, **images)

    encode = encoder_flops(config.vision_config, connector.input_grid, config.feature_layer)
    encode += cls_row_flops(config.vision_config, connector.input_grid)
    connect, read = connector_flops(connector), text_flops(text, prompt.shape[1])
    connector_weights, weights = connector_bytes(connector), text_weights(text) * settings.dtype.itemsize
    both = connector_weights + weights
    found = {
        ("encoder", 1): Variant(partial(look, model, connector, pixels), encode),
        **selection(connector, features),
        ("connector", 1): Variant(partial(connector, features), connect, connector_weights),
        ("prefill", 1): Variant(lambda: model(inputs_embeds=embeddings, logits_to_keep=1), read, weights),
        ("first token", 1): Variant(lambda: answer(pixel_values=pixels), encode + connect + read, both),
    }
    cache = answer(vision_features=features).past_key_values
    for batch in settings.batch:
        found["token", batch] = generation(model, cache, prompt.shape[1], batch, settings)
    return found


def look(model: AcFormerForConditionalGeneration, connector: Connector, pixels: Tensor) -> VisionFeatures:
    """The encoder, as this connector wants it."""
    model.model.connector = connector
    return model.get_vision_features(pixels)


def selection(connector: Connector, features: VisionFeatures) -> dict[tuple[str, int], Variant]:
    """The choice of patches alone, where the connector makes one; it has no floor, see `bench.selector`."""
    if not isinstance(connector, QueryConnector) or not isinstance(connector.queries, SelectedQueries):
        return {}
    queries = connector.queries
    num = connector.num_tokens - queries.num_cls - queries.num_fused
    return {("selector", 1): Variant(partial(queries.choose, features, num))}


def generation(
    model: AcFormerForConditionalGeneration, cache: DynamicCache, length: int, batch: int, settings: Settings
) -> Variant:
    """`STEPS` steps after a prompt whose cache is there; a step reads all weights and every row's cache once."""
    text, dtype = settings.preset.config.text_config, settings.dtype
    own = DynamicCache()
    for number, layer in enumerate(cache.layers):
        own.update(layer.keys.expand(batch, -1, -1, -1), layer.values.expand(batch, -1, -1, -1), number)
    ids = torch.full((batch, 1), 2, device=settings.device)

    def run() -> None:
        for _ in range(STEPS):
            model(input_ids=ids, past_key_values=own, logits_to_keep=1)
        own.crop(-STEPS)

    past = length + (STEPS - 1) / 2
    nbytes = text_weights(text) * dtype.itemsize + batch * kv_bytes(text, 1, dtype) * past
    return Variant(run, batch * text_flops(text, 1, round(past)), nbytes, times=STEPS)


def prompt_ids(tokens: int, config: Any, device: torch.device) -> Tensor:
    """(1, T + QUESTION): an image, then a question."""
    image, word = config.image_token_id, config.image_token_id - 1
    return torch.tensor([[image] * tokens + [word] * QUESTION], device=device)
