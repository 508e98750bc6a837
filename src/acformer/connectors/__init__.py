"""Connectors by name. To add one: write its file, add its line to `CONNECTORS`, run the contract tests."""

import inspect
from typing import Any

from acformer.connectors.acformer import AcFormerConnector
from acformer.connectors.base import Connector, Geometry
from acformer.connectors.mlp import MLPConnector
from acformer.connectors.perceiver import PerceiverConnector
from acformer.errors import unknown_name

CONNECTORS: dict[str, type[Connector]] = {
    "acformer": AcFormerConnector,
    "mlp": MLPConnector,
    "perceiver": PerceiverConnector,
}


def list_connectors() -> list[str]:
    """Names that `build_connector` takes, sorted."""
    return sorted(CONNECTORS)


def connector_options(name: str) -> dict[str, Any]:
    """Keyword arguments of a connector and their defaults; `UsageError` for a name that is not known."""
    if name not in CONNECTORS:
        raise unknown_name("connector", name, CONNECTORS)
    parameters = inspect.signature(CONNECTORS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def build_connector(name: str, geometry: Geometry, **kwargs: Any) -> Connector:
    """A new connector: VisionFeatures -> (B, T, E).

    Args:
        name: one of `list_connectors()`.
        geometry: widths D and E, patch grid and prefix tokens that it stands between.
        **kwargs: its own options, see `connector_options(name)`.

    Raises:
        UsageError: unknown name or option (with the nearest valid one), or a value that the geometry cannot take.
    """
    options = connector_options(name)
    for key in kwargs:
        if key not in options:
            raise unknown_name(f"option of connector {name!r}", key, options)
    return CONNECTORS[name](geometry, **kwargs)


__all__ = [
    "CONNECTORS",
    "Connector",
    "Geometry",
    "build_connector",
    "connector_options",
    "list_connectors",
]
