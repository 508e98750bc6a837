"""`torch.compile` takes an image to visual tokens without a graph break, and learns a number of anchors once.

What compiles again. Under `dynamic=True` nothing but sizes of 1 and 0, which torch always sets apart: one graph serves
every number of anchors from 2 H on, whatever its remainder by H; below it, where some heads take one patch and others
two or none, each such pattern is a graph of its own. By default the first number is a constant and the second
one makes it a variable, so that there are two graphs.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from acformer.anchors.search import select_anchors
from acformer.connectors import Geometry, build_connector
from acformer.vision.encoder import load_vision_encoder
from acformer.vision.families import num_prefix_tokens

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Pipeline(nn.Module):
    """Pixels in, visual tokens out: encoder, selection, connector."""

    def __init__(self, tower):
        super().__init__()
        self.encoder = load_vision_encoder(tower)
        geometry = Geometry(32, 24, (4, 4), num_prefix_tokens(tower.config))
        self.connector = build_connector("acformer", geometry, num_anchors=4, depth=1, num_heads=2, head_dim=8)

    def forward(self, pixels: Tensor, num_tokens: int) -> Tensor:
        return self.connector(self.encoder(pixels), num_tokens)


def rows(batch: int, patches: int) -> Tensor:
    return torch.randn(batch, 2, patches, generator=torch.Generator().manual_seed(0)).softmax(-1)


@pytest.mark.slow
def test_one_graph_for_every_number_of_anchors():
    """And for every batch and number of patches (batch 3, H 2: equal sizes would be taken for one variable)."""
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(select_anchors, fullgraph=True, backend=backend, dynamic=True)
    for batch, patches, num_anchors in [(3, 20, 7), (3, 20, 8), (3, 20, 19), (4, 20, 4), (3, 30, 25), (5, 40, 39)]:
        scores = rows(batch, patches)
        assert torch.equal(compiled(scores, num_anchors), select_anchors(scores, num_anchors))
    assert backend.frame_count == 1


@pytest.mark.parametrize("family", ["clip_vision_model", "dinov2"])
@pytest.mark.slow
def test_images_to_tokens_and_back(family, make_tower, pixels):
    """Two graphs for any number of tokens; gradients of the connector as without the compiler."""
    pipeline = Pipeline(make_tower(family, **SMALL))
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pipeline, fullgraph=True, backend=backend)
    for num_tokens in (5, 6, 9, 12, 16):
        assert_alike(compiled, pipeline, pixels, num_tokens)
    assert backend.frame_count == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports
@pytest.mark.slow
def test_inductor(make_tower, pixels):
    """The default backend, forwards: C++ here, Triton on a GPU. Measured 2e-7."""
    pipeline = Pipeline(make_tower("clip_vision_model", **SMALL))
    with torch.no_grad():
        tokens = torch.compile(pipeline, fullgraph=True)(pixels, 6)
        torch.testing.assert_close(tokens, pipeline(pixels, 6), rtol=1e-4, atol=1e-5)


def assert_alike(compiled: nn.Module, pipeline: Pipeline, pixels: Tensor, num_tokens: int) -> None:
    """The same tokens and gradients: the same operations in the same order, but for how gradients are summed."""
    tokens, gradients = [], []
    for module in (compiled, pipeline):
        pipeline.zero_grad()
        output = module(pixels, num_tokens)
        output.square().sum().backward()
        tokens.append(output.detach())
        gradients.append([parameter.grad for parameter in pipeline.connector.parameters()])
    assert tokens[0].shape == (2, num_tokens, 24)
    torch.testing.assert_close(*tokens, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
