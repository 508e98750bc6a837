"""Connectors by name. To add one: write its file, add its line to `CONNECTORS`, run the contract tests.

One outside this package is found by its entry point in `acformer.connectors`.
"""

from collections.abc import Mapping
from typing import Any

from acformer.connectors.acformer import AcFormerConnector
from acformer.connectors.acformer_v2 import AcFormerV2Connector
from acformer.connectors.base import Connector, Geometry
from acformer.connectors.c_abstractor import CAbstractorConnector
from acformer.connectors.d_abstractor import DAbstractorConnector
from acformer.connectors.downsample import DownsampleConnector
from acformer.connectors.ldp_v2 import LDPv2Connector
from acformer.connectors.mlp import LinearConnector, MLPConnector
from acformer.connectors.pixel_shuffle import PixelShuffleConnector
from acformer.connectors.q_former import QFormerConnector
from acformer.connectors.resampler import (
    DirectConnector,
    EViTConnector,
    PerceiverConnector,
    PoolingConnector,
    PoolingPRConnector,
)
from acformer.connectors.token_packer import TokenPackerConnector
from acformer.errors import UsageError
from acformer.registry import Alias, Registry, check_options, options_of

CONNECTORS = Registry[type[Connector]](
    "connector",
    "acformer.connectors",
    {
        "acformer": AcFormerConnector,
        "acformer_v2": AcFormerV2Connector,
        "c_abstractor": CAbstractorConnector,
        "d_abstractor": DAbstractorConnector,
        "direct": DirectConnector,
        "downsample": DownsampleConnector,
        "e_vit": EViTConnector,
        "ldp_v2": LDPv2Connector,
        "linear": LinearConnector,
        "mlp": MLPConnector,
        "perceiver": PerceiverConnector,
        "pixel_shuffle": PixelShuffleConnector,
        "pooling": PoolingConnector,
        "pooling_pr": PoolingPRConnector,
        "q_former": QFormerConnector,
        "token_packer": TokenPackerConnector,
    },
    aliases={  # as the paper calls them
        "random_pr": Alias("acformer", {"selector": "random"}),
        "top_p": Alias("direct"),
    },
)


def list_connectors() -> list[str]:
    """Names that `build_connector` takes, sorted; further names for some of them are `CONNECTORS.aliases`."""
    return CONNECTORS.names()


def connector_options(name: str) -> dict[str, Any]:
    """Keyword arguments of a connector and their defaults; `UsageError` for a name that is not known."""
    options = {key: parameter.default for key, parameter in options_of(CONNECTORS[name]).items()}
    return {**options, **CONNECTORS.resolve(name).options}


def complete_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a connector: those that are given, former names understood, and the defaults of the others.

    As JSON would give them back: a tuple is a list. `UsageError` for a name that is not known, or for an option that
    was removed and did something.
    """
    found = {**connector_options(name), **_of_today(name, options)}
    return {key: list(value) if isinstance(value, tuple | list) else value for key, value in found.items()}


def build_connector(name: str, geometry: Geometry, **kwargs: Any) -> Connector:
    """A new connector: VisionFeatures -> (B, T, E).

    Args:
        name: one of `list_connectors()`, or an alias.
        geometry: widths D and E, patch grid and prefix tokens that it stands between.
        **kwargs: its own options, see `connector_options(name)`. A value has the type that the option is annotated
            with; a number is positive, or not below its default where that is 0 or less.

    Raises:
        UsageError: unknown name or option (with the nearest valid one), a value of the wrong type or out of range,
            or one that the geometry cannot take.
    """
    connector = CONNECTORS[name]
    options = {**CONNECTORS.resolve(name).options, **_of_today(name, kwargs)}
    check_options(f"connector {name!r}", connector, options)
    if geometry.num_patches < 1:
        h, w = geometry.grid
        raise UsageError(f"the image is smaller than one patch of the encoder: {h} x {w} patches")
    return connector(geometry, **options)


def budget_options(name: str, geometry: Geometry, num_tokens: int) -> dict[str, Any]:
    """Options with which a connector gives `num_tokens` tokens, or the nearest number it can on this geometry.

    Empty where it always gives all patches. What it really gives is the built connector's `num_tokens`.
    `UsageError` for a name that is not known or less than one token.
    """
    connector = CONNECTORS[name]
    if num_tokens < 1:
        raise UsageError(f"an image must cost at least 1 visual token, got num_tokens={num_tokens}")
    return connector.for_budget(geometry, num_tokens)


def _of_today(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a config or recipe that was written when some of them had other names, or others were there."""
    connector = CONNECTORS[name]
    removed = connector.removed_options
    for key in removed.keys() & options.keys():
        if options[key] != removed[key]:
            raise UsageError(
                f"option {key}={options[key]!r} of connector {name!r} was removed (see CHANGELOG.md): leave it out; "
                "weights that were trained with it need an older acformer"
            )
    kept = {key: value for key, value in options.items() if key not in removed}
    return {connector.former_options.get(key, key): value for key, value in kept.items()}


__all__ = [
    "CONNECTORS",
    "Connector",
    "Geometry",
    "budget_options",
    "build_connector",
    "complete_options",
    "connector_options",
    "list_connectors",
]
