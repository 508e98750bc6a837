"""`bench connector`: every connector at the same number of visual tokens, forward alone and with its gradients."""

from functools import partial

import torch
from torch import Tensor

from acformer.connectors import Connector
from acformer.lab.bench.presets import build_connectors, random_features
from acformer.lab.bench.roofline import connector_bytes, connector_flops, connector_step_flops
from acformer.lab.bench.settings import Settings
from acformer.lab.bench.timing import Result, Variant, timed_rows
from acformer.vision.features import VisionFeatures


def rows(settings: Settings) -> list[Result]:
    """One a batch, connector and pass; `ratio` is to `mlp`, where that is among them.

    Sizes other than T are the registry's defaults (the paper's), not the recipe's. Encoder and language model are
    not in it: what fewer tokens or a smaller image save there, `bench train` and `bench generate` show.
    """
    preset, device, dtype = settings.preset, settings.device, settings.dtype
    connectors = build_connectors(preset, settings.connectors, settings.tokens, device, dtype, recipe_options=False)
    found = []
    for batch in settings.batch:
        variants = []
        for (name, tokens), connector in connectors.items():
            size = sum(parameter.numel() for parameter in connector.parameters())
            for part, variant in connector_variants(settings, connector, batch).items():
                labels = {"batch": batch, "connector": name, "tokens": tokens, "parameters": size, "pass": part}
                variants.append((labels, variant))
        found += timed_rows(settings, variants, {"connector": "mlp"}, ["pass"], label=("batch", batch))
    return sorted(found, key=lambda row: (row["batch"], row["pass"]))


def connector_variants(settings: Settings, connector: Connector, batch: int) -> dict[str, Variant]:
    """`forward`, without a graph, and `forward + backward` of all its weights."""
    features = random_features(settings.preset, connector, batch, settings.device, settings.dtype)
    weights = connector_bytes(connector)  # read, and their gradients written
    return {
        "forward": Variant(partial(forward, connector, features), batch * connector_flops(connector), weights),
        "forward + backward": Variant(
            partial(forward_and_backward, connector, features), batch * connector_step_flops(connector), 2 * weights
        ),
    }


def forward(connector: Connector, features: VisionFeatures) -> Tensor:
    """Visual tokens, no gradients."""
    with torch.no_grad():
        return connector(features)


def forward_and_backward(connector: Connector, features: VisionFeatures) -> None:
    """Gradients of all weights, which are freed again."""
    connector(features).sum().backward()
    connector.zero_grad()
