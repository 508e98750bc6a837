"""acformer: multimodal LLMs that read their image through visual anchors (AcFormer, NeurIPS 2024).

The public names load on first use, so that `import acformer` and the command line's `--help` stay instant.
"""

from importlib import import_module
from threading import RLock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acformer.anchors.search import select_anchors, select_anchors_reference
    from acformer.connectors import Connector, build_connector, list_connectors
    from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration, AcFormerProcessor
    from acformer.images import load_image
    from acformer.vision.encoder import load_vision_encoder
    from acformer.vision.features import VisionFeatures
    from acformer.viz import show_anchors

__version__ = "0.1.0"

_LOADING = RLock()  # transformers cannot be imported by two threads at once: names of its own are missing then

_HOMES = {
    "AcFormerConfig": "hf",
    "AcFormerForConditionalGeneration": "hf",
    "AcFormerProcessor": "hf",
    "Connector": "connectors",
    "VisionFeatures": "vision.features",
    "build_connector": "connectors",
    "list_connectors": "connectors",
    "load_image": "images",
    "load_vision_encoder": "vision.encoder",
    "select_anchors": "anchors.search",
    "select_anchors_reference": "anchors.search",
    "show_anchors": "viz",
}

__all__ = [
    "AcFormerConfig",
    "AcFormerForConditionalGeneration",
    "AcFormerProcessor",
    "Connector",
    "VisionFeatures",
    "build_connector",
    "list_connectors",
    "load_image",
    "load_vision_encoder",
    "select_anchors",
    "select_anchors_reference",
    "show_anchors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'acformer' has no attribute {name!r}")
    with _LOADING:
        return getattr(import_module(f"acformer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
