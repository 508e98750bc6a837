"""The fast anchor search against the paper's loop, and both against what the release gave."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from safetensors.torch import load_file
from torch import Tensor

from acformer.anchors.search import quotas, select_anchors, select_anchors_reference

RELEASE = load_file(Path(__file__).parent / "fixtures" / "selector.safetensors")
SEARCHES = (select_anchors, select_anchors_reference)
both = pytest.mark.parametrize("search", SEARCHES, ids=["fast", "reference"])


def rows(batch: int, heads: int, patches: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, heads, patches, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@st.composite
def problems(draw) -> tuple[Tensor, int]:
    """Scores (B, H, N) of any float dtype, often with heavy ties, signed zeros or infinities; 1..N anchors."""
    batch, heads, patches = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = draw(st.sampled_from([1, 2, 3, 10, 10**6]))
    scores = torch.randint(-levels, levels, (batch, heads, patches), generator=generator) / levels
    if draw(st.booleans()):
        special = draw(st.sampled_from([-torch.inf, torch.inf, 0.0, -0.0, 1e-45, -1e-45]))
        scores[torch.rand(scores.shape, generator=generator) < draw(st.sampled_from([0.1, 0.9, 1.0]))] = special
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    num_anchors = draw(st.one_of(st.integers(1, patches), st.just(patches), st.integers(1, min(heads, patches))))
    return scores.to(dtype), num_anchors


@both
@pytest.mark.parametrize("case", range(7))
def test_release_indices(search, case):
    """Index for index where the heads divide the anchors, as they do in every case (its index 0 is [CLS])."""
    num_anchors = int(RELEASE[f"{case}.num_tokens"])
    anchors = search(RELEASE[f"{case}.cls_row"][:, :, 1:], num_anchors)
    assert torch.equal(anchors + 1, RELEASE[f"{case}.indices"][:, 1:])


@given(problems())
def test_fast_is_reference(problem):
    scores, num_anchors = problem
    assert torch.equal(select_anchors(scores, num_anchors), select_anchors_reference(scores, num_anchors))


@given(problems())
def test_exactly_the_anchors_asked_for(problem):
    scores, num_anchors = problem
    anchors = select_anchors(scores, num_anchors)
    assert anchors.shape == (scores.shape[0], num_anchors)
    assert anchors.dtype == torch.int64
    assert bool((anchors.diff(dim=-1) > 0).all()), "ascending and distinct"
    assert int(anchors.min()) >= 0
    assert int(anchors.max()) < scores.shape[-1]


@given(problems(), st.integers(0, 10**6))
def test_images_do_not_see_each_other(problem, seed):
    scores, num_anchors = problem
    order = torch.randperm(scores.shape[0], generator=torch.Generator().manual_seed(seed))
    assert torch.equal(select_anchors(scores[order], num_anchors), select_anchors(scores, num_anchors)[order])


@both
def test_remainder_goes_to_the_first_heads(search):
    """5 anchors of 3 heads: two, two, one. Head h likes best the patches from 10 * h on."""
    scores = torch.zeros(1, 3, 30)
    for head in range(3):
        scores[0, head, 10 * head : 10 * head + 10] = torch.arange(10, 0, -1)
    assert search(scores, 5).tolist() == [[0, 1, 10, 11, 20]]


@given(st.integers(1, 600), st.integers(1, 40))
def test_quotas(num_anchors, num_heads):
    base, remainder = divmod(num_anchors, num_heads)
    assert quotas(num_anchors, num_heads) == [base + 1] * remainder + [base] * (num_heads - remainder)


@both
def test_fewer_anchors_than_heads(search):
    scores = torch.eye(6).expand(2, 6, 6)
    assert search(scores, 2).tolist() == [[0, 1], [0, 1]]


@both
def test_ties_go_to_the_lower_index(search):
    assert search(torch.ones(1, 2, 7, dtype=torch.bfloat16), 3).tolist() == [[0, 1, 2]]


@both
def test_head_order_matters(search):
    """The first head takes the patch that both like best, the other its second: no joint top-2 does that."""
    scores = torch.tensor([[[0.9, 0.0, 0.1, 0.0], [0.8, 0.7, 0.0, 0.5]]])
    assert search(scores, 2).tolist() == [[0, 1]]
    assert search(scores.flip(1), 2).tolist() == [[0, 2]]
    assert scores.amax(dim=1).topk(2).indices.tolist() == [[0, 1]], "joint, whatever the order of the heads"


@both
def test_gradients_are_not_needed(search):
    scores = rows(1, 2, 9).requires_grad_()
    assert not search(scores, 4).requires_grad


@both
def test_no_images(search):
    assert search(rows(0, 4, 9), 3).shape == (0, 3)


@both
@pytest.mark.parametrize("num_anchors", [-1, 0, 10])
def test_impossible_count(search, num_anchors):
    with pytest.raises(ValueError, match=rf"1\.\.9 .* got {num_anchors}"):
        search(rows(1, 3, 9), num_anchors)


@both
def test_shapes_are_checked_under_pytest(search):
    """What `conftest.py` puts around every typed function."""
    with pytest.raises(TypeCheckError, match="cls_attention"):
        search(rows(1, 3, 9)[0], 2)


@both
def test_wrong_number_of_dimensions(search):
    with pytest.raises(ValueError, match=r"\(batch, heads, patches\), got \(3, 9\)"):
        search.__wrapped__(rows(1, 3, 9)[0], 2)  # past the tests' own shape check, which refuses it earlier


@both
def test_nan_is_refused_where_looking_is_free(search):
    scores = rows(1, 3, 9)
    scores[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        search(scores, 2)


def test_nothing_waits_for_the_device(record_ops):
    """On a device without values nothing can be read back; on the CPU only the look for NaN is."""
    assert select_anchors(rows(2, 4, 50).to("meta"), 13).shape == (2, 13)
    with record_ops() as record:
        select_anchors(rows(2, 4, 50), 13)
    assert record.ops.count("_local_scalar_dense") == 1


def test_no_loop_over_images(record_ops):
    counts = set()
    for batch in (1, 2, 64):
        with record_ops() as record:
            select_anchors(rows(batch, 4, 50), 13)
        counts.add(len(record.ops))
    assert len(counts) == 1, counts


@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield torch.compile(select_anchors, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


def test_compiles_into_one_graph(compiled):
    """Another batch, number of heads, patches or anchors in a later call is no obstacle."""
    for batch, heads, patches, num_anchors in [(2, 4, 20, 7), (3, 4, 20, 8), (2, 3, 20, 7), (2, 4, 30, 2)]:
        scores = rows(batch, heads, patches)
        assert torch.equal(compiled(scores, num_anchors), select_anchors(scores, num_anchors))


def test_nan_ranks_below_every_number_when_compiled(compiled):
    scores = torch.full((2, 2, 20), torch.nan)
    scores[:, 0, 5], scores[:, 0, 9] = -torch.inf, 0.0
    scores[:, 1, 11], scores[:, 1, 17] = 1.0, -torch.inf
    assert compiled(scores, 4).tolist() == [[5, 9, 11, 17]] * 2
    assert compiled(scores[:, :, :6], 3).tolist() == [[0, 1, 5]] * 2
