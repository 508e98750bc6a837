"""`bench connector`: every connector at the same number of visual tokens, forward alone and with its gradients."""

from functools import partial

import torch
from torch import Tensor

from acformer.connectors import Connector
from acformer.lab.bench.floors import connector_bytes, connector_flops, connector_step_flops
from acformer.lab.bench.presets import connectors_at, made_up_features
from acformer.lab.bench.report import Row
from acformer.lab.bench.settings import Settings
from acformer.lab.bench.timing import Variant, measure
from acformer.vision.features import VisionFeatures


def rows(settings: Settings) -> list[Row]:
    """One a batch, connector and pass; `ratio` is to `mlp`, where that is among them.

    Sizes other than T are the registry's defaults (the paper's), not the recipe's. Encoder and language model are
    not in it: what fewer tokens or a smaller image save there, `bench train` and `bench generate` show.
    """
    geometry, device, dtype = settings.preset.geometry, settings.device, settings.dtype
    known = connectors_at(geometry, settings.connectors, settings.tokens, device, dtype)
    found = []
    for batch in settings.batch:
        variants: dict[str, Variant] = {}
        connectors: dict[str, Row] = {}
        for (name, given), connector in known.items():
            for what, variant in connector_variants(settings, connector, batch).items():
                key = f"{name} {given} {what}"
                connectors[key] = {"connector": name, "tokens": given, "parameters": _size(connector), "pass": what}
                variants[key] = variant
        label = settings.label("batch", batch)
        timings = measure(variants, device, dtype, settings.rounds, label=label)
        for key, row in connectors.items():
            base = next((k for k in variants if k.startswith("mlp ") and connectors[k]["pass"] == row["pass"]), None)
            found.append({"batch": batch, **row, **timings.row(key, base)})
    return sorted(found, key=lambda row: (row["batch"], row["pass"]))


def connector_variants(settings: Settings, connector: Connector, batch: int) -> dict[str, Variant]:
    """`forward`, without a graph, and `forward + backward` of all its weights."""
    heads = settings.preset.config.vision_config.num_attention_heads
    features = made_up_features(connector, heads, batch, settings.device, settings.dtype)
    weights = connector_bytes(connector)  # read, and their gradients written
    return {
        "forward": Variant(partial(look, connector, features), batch * connector_flops(connector), weights),
        "forward + backward": Variant(
            partial(learn, connector, features), batch * connector_step_flops(connector), 2 * weights
        ),
    }


def look(connector: Connector, features: VisionFeatures) -> Tensor:
    """Visual tokens, no gradients."""
    with torch.no_grad():
        return connector(features)


def learn(connector: Connector, features: VisionFeatures) -> None:
    """Gradients of all weights, which are forgotten again."""
    connector(features).sum().backward()
    connector.zero_grad()


def _size(connector: Connector) -> int:
    return sum(parameter.numel() for parameter in connector.parameters())
