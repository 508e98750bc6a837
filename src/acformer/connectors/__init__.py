"""Connectors by name. To add one: write its file, add its line to `CONNECTORS`, run the contract tests.

One outside this package is found by its entry point in `acformer.connectors`.
"""

import inspect
import math
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, get_args

from acformer.connectors.acformer import AcFormerConnector
from acformer.connectors.base import Connector, Geometry
from acformer.connectors.c_abstractor import CAbstractorConnector
from acformer.connectors.d_abstractor import DAbstractorConnector
from acformer.connectors.downsample import DownsampleConnector
from acformer.connectors.e_vit import EViTConnector
from acformer.connectors.ldp_v2 import LDPv2Connector
from acformer.connectors.linear import LinearConnector
from acformer.connectors.mlp import MLPConnector
from acformer.connectors.perceiver import PerceiverConnector
from acformer.connectors.pixel_shuffle import PixelShuffleConnector
from acformer.connectors.pooling import PoolingConnector
from acformer.connectors.pooling_pr import PoolingPRConnector
from acformer.connectors.q_former import QFormerConnector
from acformer.connectors.random_pr import RandomPRConnector
from acformer.connectors.token_packer import TokenPackerConnector
from acformer.connectors.top_p import TopPConnector
from acformer.errors import UsageError, unknown_name
from acformer.registry import Registry

CONNECTORS = Registry[type[Connector]](
    "connector",
    "acformer.connectors",
    {
        "acformer": AcFormerConnector,
        "c_abstractor": CAbstractorConnector,
        "d_abstractor": DAbstractorConnector,
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
        "random_pr": RandomPRConnector,
        "token_packer": TokenPackerConnector,
        "top_p": TopPConnector,
    },
)


def list_connectors() -> list[str]:
    """Names that `build_connector` takes, sorted."""
    return CONNECTORS.names()


def connector_options(name: str) -> dict[str, Any]:
    """Keyword arguments of a connector and their defaults; `UsageError` for a name that is not known."""
    return {key: parameter.default for key, parameter in _parameters(name).items()}


def build_connector(name: str, geometry: Geometry, **kwargs: Any) -> Connector:
    """A new connector: VisionFeatures -> (B, T, E).

    Args:
        name: one of `list_connectors()`.
        geometry: widths D and E, patch grid and prefix tokens that it stands between.
        **kwargs: its own options, see `connector_options(name)`. A value has the type that the option is annotated
            with; a number is positive, or not below its default where that is 0 or less.

    Raises:
        UsageError: unknown name or option (with the nearest valid one), a value of the wrong type or out of range,
        or one that the geometry cannot take.
    """
    parameters = _parameters(name)
    for key, value in kwargs.items():
        if key not in parameters:
            raise unknown_name(f"option of connector {name!r}", key, parameters)
        _check(name, parameters[key], value)
    if geometry.num_patches < 1:
        h, w = geometry.grid
        raise UsageError(f"the image is smaller than one patch of the encoder: {h} x {w} patches")
    return CONNECTORS[name](geometry, **kwargs)


def budget_options(name: str, geometry: Geometry, num_tokens: int) -> dict[str, Any]:
    """Options with which a connector gives `num_tokens` tokens, or the nearest number it can on this geometry.

    Empty where it always gives all patches. What it really gives is the built connector's `num_tokens`.
    `UsageError` for a name that is not known or less than one token.
    """
    connector = CONNECTORS[name]
    if num_tokens < 1:
        raise UsageError(f"an image must cost at least 1 visual token, got num_tokens={num_tokens}")
    return connector.for_budget(geometry, num_tokens)


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(CONNECTORS[name], eval_str=True).parameters
    return {key: parameter for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}


def _check(name: str, option: inspect.Parameter, value: Any) -> None:
    """`UsageError` unless the value is of the annotated type and in range; other types are the connector's to check."""
    kinds = get_args(option.annotation) if isinstance(option.annotation, UnionType) else (option.annotation,)
    if not {*kinds} <= {bool, int, float, str, NoneType, Sequence[int]}:
        return
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    if Sequence[int] in kinds and isinstance(value, list | tuple):
        fits = all(type(item) is int for item in value)
    if fits and type(value) in (int, float):
        lowest = option.default if type(option.default) in (int, float) and option.default <= 0 else None
        fits = value < math.inf and (value > 0 if lowest is None else value >= lowest)
    if not fits:
        positive = "positive " if {int, float} & {*kinds} else ""
        names = {NoneType: "nothing", Sequence[int]: "list of ints"}
        wanted = " or ".join(names.get(kind) or kind.__name__ for kind in kinds)
        raise UsageError(f"option {option.name} of connector {name!r} must be a {positive}{wanted}, got {value!r}")


__all__ = [
    "CONNECTORS",
    "Connector",
    "Geometry",
    "budget_options",
    "build_connector",
    "connector_options",
    "list_connectors",
]
