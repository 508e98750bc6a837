"""The Triton kernel in Triton's interpreter, and through its compiler, on a machine without a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from acformer.anchors import search as anchors
from acformer.anchors.search import select_anchors, select_anchors_reference, select_anchors_torch

pytestmark = [
    pytest.mark.extras,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (make test-extras installs it)"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


IS_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="module")
def search():
    """The kernel's operator, with the kernel interpreted: Triton asks the environment when it is first imported."""
    if not IS_INTERPRETER:
        pytest.skip("test_in_the_interpreter runs it, in a process of its own")
    from acformer.anchors.kernel import select_anchors_triton

    return select_anchors_triton


@pytest.mark.skipif(IS_INTERPRETER, reason="this is the interpreter")
def test_in_the_interpreter():
    """All tests of this file that ask for `search`."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-m", "extras", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stdout


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).softmax(-1).to(dtype)


@st.composite
def problems(draw) -> tuple[torch.Tensor, int]:
    """Scores (B, H, N), often with heavy ties, signed zeros, infinities of both signs, and a number of anchors."""
    batch, heads, patches = draw(st.integers(1, 2)), draw(st.integers(1, 6)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = draw(st.sampled_from([1, 2, 10, 10**6]))
    scores = torch.randint(-levels, levels + 1, (batch, heads, patches), generator=generator) / levels
    for special in draw(st.lists(st.sampled_from([0.0, -0.0, torch.inf, -torch.inf, 1e-45]), max_size=3)):
        scores[torch.rand(scores.shape, generator=generator) < 0.2] = special
    return scores.to(draw(st.sampled_from(DTYPES))), draw(st.integers(1, patches))


@settings(max_examples=60)
@given(problem=problems())
def test_kernel_is_reference(search, problem):
    scores, num_anchors = problem
    assert torch.equal(search(scores, num_anchors), select_anchors_reference(scores, num_anchors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "patches", "num_anchors"),
    [(16, 576, 144), (12, 576, 256), (6, 1024, 700), (5, 729, 728), (2, 4096, 255), (3, 100, 2), (1, 1, 1)],
)
def test_encoders(search, heads, patches, num_anchors, dtype):
    """Counts that heads do not divide, more anchors than half the patches, sizes that are no powers of two."""
    scores = rows(1, heads, patches, dtype=dtype)
    anchors = search(scores, num_anchors)
    assert anchors.dtype == torch.int64
    assert torch.equal(anchors, select_anchors_reference(scores, num_anchors))


def test_any_strides(search):
    """A row is a slice of a longer one, and its heads may lie innermost: nothing is copied beforehand."""
    for scores in (rows(2, 4, 21)[:, :, 1:], rows(2, 20, 4).transpose(1, 2), rows(1, 4, 20).expand(2, 4, 20)):
        assert torch.equal(search(scores, 7), select_anchors_reference(scores, 7))


def test_no_images(search):
    assert search(rows(0, 4, 9), 3).shape == (0, 3)


@pytest.mark.parametrize("kernel", [True, False])
def test_nan_ranks_below_every_number(search, kernel):
    """Of either sign, in the kernel as in torch's operations (which are asked past the CPU's check)."""
    scores = torch.full((1, 2, 12), torch.nan)
    scores[:, :, ::2].neg_()
    scores[:, 0, 5], scores[:, 0, 9] = -torch.inf, 0.0
    assert (search if kernel else select_anchors_torch)(scores, 4).tolist() == [[0, 1, 5, 9]]


def test_compiles_whole(search, monkeypatch):
    """`select_anchors` with its kernel is one graph for every number of anchors, also those that heads do not fill."""
    monkeypatch.setattr(anchors, "_has_kernel", lambda scores: True)
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(select_anchors, fullgraph=True, backend=backend, dynamic=True)
    for batch, num_anchors in [(2, 7), (2, 8), (3, 2)]:
        scores = rows(batch, 4, 20)
        assert torch.equal(compiled(scores, num_anchors), select_anchors_reference(scores, num_anchors))
    assert backend.frame_count == 1
    torch.compiler.reset()


def test_operator(search):
    """Schema, fake kernel and autograd registration are in order."""
    torch.library.opcheck(search, (rows(2, 4, 20), 7))


class _Cuda(torch.Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True


def test_who_goes_to_the_kernel(search, monkeypatch):
    """Tensors of a GPU, where Triton can run; float64 and more patches than a program holds stay with torch."""
    monkeypatch.setattr(anchors, "select_anchors_torch", lambda scores, num_anchors: "torch")
    monkeypatch.setattr("acformer.anchors.kernel.select_anchors_triton", lambda scores, num_anchors: "kernel")
    monkeypatch.setattr(anchors, "HAS_TRITON", True)
    select = select_anchors.__wrapped__  # past the tests' own check of shapes
    gpu = rows(1, 2, 9).as_subclass(_Cuda)
    assert select(gpu, 3) == "kernel"
    assert select(rows(1, 2, 9), 3) == "torch"
    assert select(gpu.double(), 3) == "torch"
    assert select(rows(1, 1, anchors.MAX_KERNEL_PATCHES + 1).as_subclass(_Cuda), 3) == "torch"
    monkeypatch.setattr(anchors, "HAS_TRITON", False)
    assert select(gpu, 3) == "torch"


COMPILE = """
import sys
from acformer.anchors.kernel import progressive_search
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
names = progressive_search.arg_names
for arch, dtype in [(80, "*fp32"), (90, "*bf16"), (90, "*fp16")]:
    types = {name: "i32" for name in names} | {"scores": dtype, "anchors": "*i64", "BLOCK": "constexpr"}
    source = ASTSource(progressive_search, types, {(names.index("BLOCK"),): 1024})
    print(len(compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]))
"""


@pytest.mark.skipif(IS_INTERPRETER, reason="the interpreter compiles nothing")
def test_compiles_for_gpus():
    """What the interpreter does not see, types and layouts: machine code for Ampere and Hopper, by Triton's ptxas."""
    child = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert len(child.stdout.split()) == 3
