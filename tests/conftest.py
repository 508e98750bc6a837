"""Shared by all tests: shapes checked as types, tiny encoders, made-up features, a record of what torch runs."""

import os
import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import tiny
import torch
from hypothesis import settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, PreTrainedModel
from typed import check_types

import acformer.connectors
from acformer.connectors import Connector, Geometry
from acformer.vision.features import VisionFeatures

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: more threads would wait for one another
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("acformer", deadline=None, derandomize=True, database=None)
settings.load_profile("acformer")


_connector_files = [f"acformer.connectors.{m.name}" for m in pkgutil.iter_modules(acformer.connectors.__path__)]
_typed = [
    "acformer.anchors.search",
    "acformer.vision.cls_attention",
    "acformer.vision.encoder",
    "acformer.vision.features",
    "acformer.connectors",
    *_connector_files,
]
check_types(*map(import_module, _typed))

FAMILIES = tiny.ENCODERS
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Every `model_type` of vision encoder."""
    return request.param


@pytest.fixture
def make_tower() -> Callable[..., PreTrainedModel]:
    """(family, seed, attention kernel, config fields) -> a tiny encoder; the same seed gives the same weights."""

    def make(family: str, *, seed: int = 0, attn_implementation: str = "sdpa", **fields: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = tiny.vision_config(family, **{**TINY, **fields})
        if "vision_use_head" in fields:  # an older transformers has no such field, but obeys it
            config.vision_use_head = fields["vision_use_head"]
        tower = AutoModel.from_config(config, attn_implementation=attn_implementation).eval()
        with torch.no_grad():
            for parameter in tower.parameters():  # fresh weights are so small that every patch looks the same
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
        return tower

    return make


@pytest.fixture
def pixels() -> Tensor:
    """(2, 3, 28, 28) noise: a batch for the tiny encoders."""
    return torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make_features() -> Callable[..., VisionFeatures]:
    """(geometry or connector, batch, dtype) -> random `VisionFeatures` that fit it, with its hidden layers."""

    def make(
        reader: Geometry | Connector, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> VisionFeatures:
        is_geometry = isinstance(reader, Geometry)
        geometry = reader if is_geometry else reader.geometry._replace(grid=reader.input_grid)
        generator = torch.Generator().manual_seed(seed)
        shape = batch, geometry.num_prefix_tokens + geometry.num_patches, geometry.vision_hidden_size
        tokens = torch.randn(shape, generator=generator).to(dtype)
        row = torch.randn(batch, 4, geometry.num_patches, generator=generator).softmax(-1)
        num_hidden_layers = 0 if is_geometry else len(reader.hidden_layers)
        hidden_layers = (
            torch.randn(batch, num_hidden_layers, *shape[1:], generator=generator).to(dtype)
            if num_hidden_layers
            else None
        )
        return VisionFeatures(tokens, row, geometry.grid, geometry.num_prefix_tokens, hidden_layers)

    return make


class OpRecord(TorchDispatchMode):
    """Names of the operations that torch runs and the shapes of the tensors that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.ops.append(func.overloadpacket.__name__)
        self.shapes += [tuple(leaf.shape) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        return output


@pytest.fixture
def record_ops() -> type[OpRecord]:
    """`with record_ops() as record:` what torch runs inside."""
    return OpRecord
