"""`bench generate`: from an image to the first token, and from token to token, at several numbers of visual tokens.

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
from acformer.hf.cache_name import CACHE
from acformer.lab.bench.presets import build_connectors, random_model
from acformer.lab.bench.roofline import (
    cls_row_flops,
    connector_bytes,
    connector_flops,
    encoder_flops,
    kv_bytes,
    text_flops,
    text_weights,
)
from acformer.lab.bench.settings import Settings
from acformer.lab.bench.timing import Result, Variant, timed_rows
from acformer.vision.features import VisionFeatures

QUESTION = 32
"""Tokens of the prompt beside the image's."""
STEPS = 8
"""Tokens generated for one measurement."""


def rows(settings: Settings) -> list[Result]:
    """One a connector, T and part; `ratio` is to `mlp`. Only the steps of generation come at every batch size.

    encoder, selector (part of the connector), connector, prefill (the language model on T + question tokens), first
    token (all of these), token (a step, at each batch size).
    """
    preset, device, dtype = settings.preset, settings.device, settings.dtype
    model = random_model(preset.config, device, dtype)
    names = dict.fromkeys(["mlp", *settings.connectors])
    variants = []
    with torch.inference_mode():
        for (name, tokens), connector in build_connectors(preset, names, settings.tokens, device, dtype).items():
            kv_mib = round(kv_bytes(preset.config.text_config, tokens, dtype) / 2**20, 3)
            for (part, batch), variant in parts(model, connector, settings).items():
                labels = {"connector": name, "tokens": tokens, "part": part, "batch": batch, "kv_mib_image": kv_mib}
                variants.append((labels, variant))
        return timed_rows(settings, variants, {"connector": "mlp"}, ["part", "batch"])


def parts(
    model: AcFormerForConditionalGeneration, connector: Connector, settings: Settings
) -> dict[tuple[str, int], Variant]:
    """What an image and an answer are made of, with this connector in the model; by name and batch size."""
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

    encode_flops = encoder_flops(config.vision_config, connector.input_grid, config.feature_layer)
    encode_flops += cls_row_flops(config.vision_config, connector.input_grid)
    connect_flops, prefill_flops = connector_flops(connector), text_flops(text, prompt.shape[1])
    connector_weights, weights = connector_bytes(connector), text_weights(text) * settings.dtype.itemsize
    all_flops = encode_flops + connect_flops + prefill_flops
    found = {
        ("encoder", 1): Variant(partial(encode, model, connector, pixels), encode_flops),
        **selection(connector, features),
        ("connector", 1): Variant(partial(connector, features), connect_flops, connector_weights),
        ("prefill", 1): Variant(lambda: model(inputs_embeds=embeddings, logits_to_keep=1), prefill_flops, weights),
        ("first token", 1): Variant(lambda: answer(pixel_values=pixels), all_flops, connector_weights + weights),
    }
    cache = answer(vision_features=features)[CACHE]
    for batch in settings.batch:
        found["token", batch] = generation(model, cache, prompt.shape[1], batch, settings)
    return found


def encode(model: AcFormerForConditionalGeneration, connector: Connector, pixels: Tensor) -> VisionFeatures:
    """The encoder's pass, as this connector wants it."""
    model.model.connector = connector
    return model.get_vision_features(pixels)


def selection(connector: Connector, features: VisionFeatures) -> dict[tuple[str, int], Variant]:
    """The choice of patches alone, where the connector makes one; without a roofline, see `bench.selector`."""
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
    for number, layer in enumerate(cache.layers):  # keys and values (1, heads, L, head width) for every row
        own.update(layer.keys.expand(batch, -1, -1, -1), layer.values.expand(batch, -1, -1, -1), number)
    ids = torch.full((batch, 1), 2, device=settings.device)

    def run() -> None:
        for _ in range(STEPS):
            model(input_ids=ids, cache=own, logits_to_keep=1)
        own.crop(-STEPS)

    past = length + (STEPS - 1) / 2
    nbytes = text_weights(text) * dtype.itemsize + batch * kv_bytes(text, 1, dtype) * past
    return Variant(run, batch * text_flops(text, 1, round(past)), nbytes, times=STEPS)


def prompt_ids(tokens: int, config: Any, device: torch.device) -> Tensor:
    """(1, T + QUESTION): an image, then a question."""
    image, word = config.image_token_id, config.image_token_id - 1
    return torch.tensor([[image] * tokens + [word] * QUESTION], device=device)
