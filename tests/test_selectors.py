"""What every selector keeps, and each of them on cases small enough to work out by hand.

`-k NAME` runs the contract tests of one selector (`TestEvery`), and those that it has for itself.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from acformer.anchors import selectors
from acformer.anchors.search import select_anchors, select_anchors_reference
from acformer.anchors.selectors import SELECTORS, image_noise
from acformer.connectors.base import Geometry
from acformer.connectors.queries import SelectedQueries
from acformer.errors import UsageError
from acformer.vision.features import VisionFeatures

every = pytest.mark.parametrize("name", SELECTORS.names())
drawn = pytest.mark.parametrize("name", [name for name in SELECTORS.names() if SELECTORS[name].sample is not None])


def features_of(
    patches: Tensor | None = None, attention: Tensor | None = None, grid: tuple[int, int] | None = None
) -> VisionFeatures:
    """[CLS] and these patches (B, N, D), this attention (B, H, N); what is not given is noise."""
    given = attention if patches is None else patches
    assert given is not None
    batch, size = given.shape[0], given.shape[-1] if patches is None else given.shape[1]
    patches = torch.randn(batch, size, 8) if patches is None else patches
    attention = torch.rand(batch, 3, size).softmax(-1) if attention is None else attention
    return VisionFeatures(F.pad(patches, (0, 0, 1, 0)), attention, grid or (1, size), 1)


@st.composite
def problems(draw) -> tuple[VisionFeatures, int]:
    """A few images, some with many ties, and 1..N patches to choose."""
    h, w, batch = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = draw(st.sampled_from([1, 2, 10**6]))
    patches = torch.randint(-levels, levels + 1, (batch, h * w, 8), generator=generator) / levels
    attention = torch.randint(0, levels + 1, (batch, 3, h * w), generator=generator) / levels
    return features_of(patches, attention, (h, w)), draw(st.integers(1, h * w))


def images(features: VisionFeatures, order: list[int]) -> VisionFeatures:
    return features._replace(tokens=features.tokens[order], cls_attention=features.cls_attention[order])


def is_a_choice(index: Tensor, features: VisionFeatures, num: int) -> bool:
    """int64, as many as asked for, of the image, distinct and in raster order."""
    inside = int(index.min()) >= 0 and int(index.max()) < features.patches.shape[1]
    right_size = index.shape == (features.tokens.shape[0], num) and index.dtype == torch.int64
    return right_size and inside and bool((index.diff(dim=-1) > 0).all())


class TestEvery:
    @every
    @given(problems())
    def test_gives_what_was_asked_for(self, name, problem):
        assert is_a_choice(SELECTORS[name](*problem), *problem)

    @drawn
    @given(problems())
    def test_draws_what_was_asked_for(self, name, problem):
        assert is_a_choice(SELECTORS[name].sample(*problem), *problem)

    @every
    @given(problems(), st.data())
    def test_images_do_not_see_each_other(self, name, problem, data):
        features, num = problem
        if name == "diverse":  # whose distances come from one product, summed in another order for another batch
            noise = torch.randn(features.tokens.shape, generator=torch.Generator().manual_seed(0))
            features = features._replace(tokens=features.tokens + noise)
        batch = features.tokens.shape[0]
        order = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=batch))
        assert torch.equal(SELECTORS[name](images(features, order), num), SELECTORS[name](features, num)[order])

    @every
    def test_the_same_each_time(self, name):
        features = features_of(torch.randn(3, 30, 8))
        assert torch.equal(SELECTORS[name](features, 7), SELECTORS[name](features, 7))

    @drawn
    def test_draws_differ(self, name):
        features = features_of(torch.randn(3, 30, 8))
        assert not torch.equal(SELECTORS[name].sample(features, 7), SELECTORS[name].sample(features, 7))

    @drawn
    def test_a_seed_repeats_a_draw(self, name):
        features, draws = features_of(torch.randn(3, 30, 8)), []
        for _ in range(2):
            torch.manual_seed(7)
            draws.append(SELECTORS[name].sample(features, 7))
        assert torch.equal(*draws)

    @every
    @pytest.mark.parametrize("num", [-1, 0, 31])
    def test_impossible_numbers(self, name, num):
        with pytest.raises(UsageError, match=rf"in 1\.\.30 \(the number of patches\), got {num}"):
            SELECTORS[name](features_of(torch.randn(3, 30, 8)), num)

    @every
    def test_no_gradient_and_no_wait_for_the_device(self, name):
        """On a device without values nothing can be read back."""
        features = features_of(torch.randn(3, 30, 8, requires_grad=True))
        assert not SELECTORS[name](features, 4).requires_grad
        there = VisionFeatures(features.tokens.to("meta"), features.cls_attention.to("meta"), (5, 6), 1)
        assert SELECTORS[name](there, 4).shape == (3, 4)

    @every
    def test_no_loop_over_images(self, name, record_ops):
        counts = set()
        for batch in (1, 2, 64):
            features = features_of(torch.randn(batch, 30, 8))
            with record_ops() as record:
                SELECTORS[name](features, 4)
            counts.add(len(record.ops))
        assert len(counts) == 1, counts

    @every
    def test_compiles_into_one_graph(self, name):
        torch.compiler.reset()
        features = features_of(torch.randn(2, 30, 8), grid=(5, 6))
        compiled = torch.compile(lambda features: SELECTORS[name](features, 4), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(features), SELECTORS[name](features, 4))
        torch.compiler.reset()

    @every
    def test_half_precision(self, name):
        features = features_of(torch.randn(2, 30, 8))
        half = features._replace(tokens=features.tokens.bfloat16(), cls_attention=features.cls_attention.bfloat16())
        assert is_a_choice(SELECTORS[name](half, 5), half, 5)

    @pytest.mark.parametrize("name", ["anchors", "cls_topk", "diverse", "norm", "spaced"])
    def test_nan_is_refused_by_the_name_of_what_holds_it(self, name):
        features = features_of(torch.randn(3, 30, 8))
        read = "features.patches" if name in ("diverse", "norm") else "cls_attention"
        for held in ("features.patches", "cls_attention"):
            broken = features._replace(tokens=features.tokens.clone(), cls_attention=features.cls_attention.clone())
            (broken.patches if held == "features.patches" else broken.cls_attention)[1, 2, 3] = torch.nan
            if held == read:
                with pytest.raises(ValueError, match=f"^{read} holds NaN"):
                    SELECTORS[name](broken, 4)
            else:
                assert is_a_choice(SELECTORS[name](broken, 4), broken, 4)

    @every
    def test_nan_repeats_no_patch_where_nobody_looks(self, name):
        """In a compiled graph, as on an accelerator."""
        torch.compiler.reset()
        features = features_of(torch.randn(3, 30, 8), grid=(5, 6))
        features.tokens[0, 5], features.tokens[1, 7, 2], features.tokens[2] = torch.nan, torch.nan, torch.nan
        compiled = torch.compile(lambda features: SELECTORS[name](features, 30), fullgraph=True, backend="aot_eager")
        assert is_a_choice(compiled(features), features, 30)
        torch.compiler.reset()

    @every
    def test_scores_are_not_below_zero(self, name, monkeypatch):
        """What draws at random divides scores by noise: a negative one would turn the order round."""
        seen = []

        def watched(scores, num):
            seen.append(scores)
            return select_anchors(scores, num)

        monkeypatch.setattr(selectors, "select_anchors", watched)
        SELECTORS[name](features_of(torch.randn(2, 30, 8)), 5)
        assert all(bool((scores >= 0).all()) for scores in seen)

    @every
    def test_says_what_it_is(self, name):
        assert 30 < len(SELECTORS[name].summary) < 120
        assert SELECTORS[name].summary.endswith(".")

    def test_who_reads_the_row(self):
        features = features_of(torch.randn(2, 30, 8))._replace(cls_attention=None)
        for name in ("diverse", "grid", "norm", "random"):
            assert not SELECTORS[name].needs_cls_attention
            assert is_a_choice(SELECTORS[name](features, 5), features, 5)
        for name in ("anchors", "cls_topk", "spaced"):
            assert SELECTORS[name].needs_cls_attention
            with pytest.raises(UsageError, match=r"no \[CLS\] attention.*: diverse, grid, norm, random"):
                SELECTORS[name](features, 5)

    def test_images_of_one_patch(self):
        for selector in SELECTORS.values():
            assert selector(features_of(torch.randn(2, 1, 8)), 1).tolist() == [[0], [0]]


class TestByScore:
    @given(problems())
    def test_anchors_are_the_papers(self, problem):
        features, num = problem
        assert torch.equal(SELECTORS["anchors"](features, num), select_anchors_reference(features.cls_attention, num))

    def test_cls_topk_is_joint(self):
        """Heads first would take 0 for the first head and 2 for the second; their mean likes 0 and 1 best."""
        features = features_of(attention=torch.tensor([[[0.6, 0.4, 0.0, 0.0], [0.1, 0.4, 0.45, 0.05]]]))
        assert SELECTORS["cls_topk"](features, 2).tolist() == [[0, 1]]
        assert SELECTORS["anchors"](features, 2).tolist() == [[0, 2]]

    def test_norm(self):
        features = features_of(torch.tensor([[[1.0, 1], [-3, 0], [0, 2], [0, -2], [1, 2]]]))
        assert SELECTORS["norm"](features, 1).tolist() == [[1]]
        assert SELECTORS["norm"](features, 3).tolist() == [[1, 2, 4]], "of the two of length 2 the first"

    @pytest.mark.parametrize("name", ["anchors", "cls_topk", "norm"])
    def test_ties_go_to_the_lower_index(self, name):
        features = features_of(torch.ones(1, 9, 2), torch.full((1, 2, 9), 1 / 9))
        assert SELECTORS[name](features, 4).tolist() == [[0, 1, 2, 3]]

    @pytest.mark.parametrize("name", ["anchors", "cls_topk"])
    def test_draws_in_proportion_to_the_scores(self, name):
        """Gumbel top-1 takes a patch as often as its score says, and never one with score 0."""
        torch.manual_seed(0)
        scores = torch.tensor([0.5, 0.3, 0.2, 0.0])
        features = features_of(attention=scores.expand(20_000, 1, 4))
        often = SELECTORS[name].sample(features, 1).flatten().bincount(minlength=4) / 20_000
        # Three standard errors of the largest share, 3 sqrt(0.25 / 20,000).
        torch.testing.assert_close(often, scores, rtol=0, atol=0.011)
        assert often[3] == 0

    def test_draws_without_replacement(self):
        """The chance that 0 and 1 are the two chosen: 0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7."""
        torch.manual_seed(0)
        features = features_of(attention=torch.tensor([0.5, 0.3, 0.2]).expand(20_000, 1, 3))
        pairs = SELECTORS["cls_topk"].sample(features, 2)
        share = (pairs == torch.tensor([0, 1])).all(-1).float().mean().item()
        assert share == pytest.approx(0.3 + 0.15 / 0.7, abs=0.011)  # three standard errors


class TestGrid:
    @pytest.mark.parametrize(
        ("grid", "num", "expected"),
        [
            ((4, 4), 4, [5, 7, 13, 15]),
            ((4, 4), 1, [10]),
            ((2, 6), 3, [7, 9, 11]),
            ((6, 2), 3, [3, 7, 11]),
            ((3, 3), 5, [0, 2, 6, 7, 8]),
        ],
    )
    def test_by_hand(self, grid, num, expected):
        features = features_of(torch.randn(2, grid[0] * grid[1], 8), grid=grid)
        assert SELECTORS["grid"](features, num).tolist() == [expected] * 2

    def test_every_second_patch_both_ways(self):
        """144 of CLIP's 24 x 24."""
        points = SELECTORS["grid"](features_of(torch.zeros(1, 576, 2), grid=(24, 24)), 144)
        assert points.tolist() == [[24 * y + x for y in range(1, 24, 2) for x in range(1, 24, 2)]]

    @given(st.integers(1, 30), st.integers(1, 30), st.data())
    def test_is_even(self, h, w, data):
        """Rows used differ in points by one at the most, and lie h / R apart, rounded either way."""
        num = data.draw(st.integers(1, h * w))
        points = SELECTORS["grid"](features_of(torch.zeros(1, h * w, 1), grid=(h, w)), num)[0]
        rows, counts = (points // w).unique(return_counts=True)
        assert int(counts.max() - counts.min()) <= 1
        if len(rows) > 1:
            assert {*rows.diff().tolist()} <= {h // len(rows), -(-h // len(rows))}


class TestRandom:
    def test_the_image_is_the_seed(self):
        """Whatever else is in the batch, and whatever the state of torch's generator; other images, other patches."""
        features = features_of(torch.randn(64, 100, 8))
        chosen = SELECTORS["random"](features, 10)
        assert torch.equal(SELECTORS["random"](images(features, [5, 60]), 10), chosen[[5, 60]])
        assert len({tuple(row) for row in chosen.tolist()}) == 64

    def test_the_last_digits_hardly_matter(self):
        """They differ between batches of different sizes. Of 2,000 images, measured, 1 changes; 104 with 4e-3."""
        generator = torch.Generator().manual_seed(0)
        features = features_of(torch.randn(2000, 100, 8, generator=generator))
        noise = torch.randn(features.tokens.shape, generator=generator)
        shaken = features._replace(tokens=features.tokens * (1 + 1e-5 * noise))
        changed = (SELECTORS["random"](shaken, 10) != SELECTORS["random"](features, 10)).any(dim=-1)
        assert changed.sum() <= 4

    @pytest.mark.parametrize("draw", [SELECTORS["random"].select, SELECTORS["random"].sample], ids=["own", "drawn"])
    def test_every_patch_is_as_likely(self, draw):
        """Shares of 100 patches among 10 of each of 10,000 images: mean 0.1, standard error 0.003."""
        torch.manual_seed(0)
        chosen = draw(features_of(torch.randn(10_000, 100, 4)), 10)
        share = chosen.flatten().bincount(minlength=100) / 10_000
        assert float((share - 0.1).abs().max()) < 0.012, "four standard errors"
        together = (chosen == 3).any(-1) & (chosen == 4).any(-1)
        assert together.float().mean().item() == pytest.approx(0.1 * 9 / 99, abs=0.004), "neighbours are no pair"

    def test_noise_is_uniform(self):
        torch.manual_seed(0)
        noise = image_noise(features_of(torch.randn(1000, 100, 4))).flatten() / 2**24
        for power in (1, 2, 3):  # moments of the uniform distribution; standard errors below 0.001
            assert (noise**power).mean().item() == pytest.approx(1 / (power + 1), abs=0.004)


class TestDiverse:
    def test_by_hand(self):
        """Angles 0, 10, 90, 200 and 205 degrees: 90 is the loneliest, then come 205, as far as cos can tell, and 0."""
        angle = torch.tensor([0.0, 10, 90, 200, 205]).deg2rad()
        features = features_of(torch.stack([angle.cos(), angle.sin()], dim=-1)[None] * torch.rand(1, 5, 1).add(1))
        assert SELECTORS["diverse"](features, 1).tolist() == [[2]]
        assert SELECTORS["diverse"](features, 2).tolist() == [[2, 4]]
        assert SELECTORS["diverse"](features, 3).tolist() == [[0, 2, 4]]

    @pytest.mark.parametrize("num", [1, 2, 5, 20])
    def test_is_the_loop(self, num):
        """DivPrune's greedy search, patch by patch, in float64."""
        torch.manual_seed(0)
        features = features_of(torch.randn(4, 20, 8))
        for image, patches in enumerate(features.patches.double()):
            unit = patches / patches.norm(dim=-1, keepdim=True)

            def distance(i: int, j: int, unit: Tensor = unit) -> float:
                return 1 - float(unit[i] @ unit[j])

            chosen: list[int] = []
            while len(chosen) < num:
                others = [i for i in range(20) if i not in chosen]
                score = {i: min(distance(i, j) for j in (chosen or others) if j != i) for i in others}
                chosen.append(max(others, key=lambda i: score[i]))
            assert SELECTORS["diverse"](features, num)[image].tolist() == sorted(chosen)

    def test_copies_come_last(self):
        patches = torch.eye(4)[[0, 0, 1, 1, 2, 3]][None]
        chosen = SELECTORS["diverse"](features_of(patches), 4)[0].tolist()
        assert chosen == [0, 2, 4, 5], "one of each, the lower of equals"


class TestSpaced:
    def test_by_hand(self):
        """sigma^2 = 0.35^2 * 8 / 2 = 0.49: a choice leaves its neighbour 1 - exp(-1 / 0.98) = 0.64 of its score."""
        for neighbour, chosen in ((0.39, [0, 7]), (0.41, [0, 1])):  # 0.64 of it is 0.249 and 0.262
            attention = torch.tensor([[[0.5, neighbour, 0.1, 0.0, 0.0, 0.0, 0.0, 0.255]]])
            assert SELECTORS["spaced"](features_of(attention=attention), 2).tolist() == [chosen]

    @pytest.mark.parametrize("num", [1, 3, 8, 30])
    def test_is_the_loop(self, num):
        """Patch by patch, in float64."""
        torch.manual_seed(0)
        features = features_of(attention=torch.rand(4, 3, 30).double(), grid=(5, 6))
        for image, attention in enumerate(features.cls_attention.mean(1)):
            left, chosen = attention.tolist(), []
            while len(chosen) < num:
                best = max((n for n in range(30) if n not in chosen), key=lambda n: left[n])
                chosen.append(best)
                for n in range(30):
                    apart = (n % 6 - best % 6) ** 2 + (n // 6 - best // 6) ** 2
                    left[n] *= 1 - math.exp(-apart / (2 * 0.35**2 * 30 / num))
            assert SELECTORS["spaced"](features, num)[image].tolist() == sorted(chosen)

    def test_covers_more_things_than_a_top_k(self):
        """Nine bumps of very different height on a 16 x 16 grid: nine choices find all of them, a top-k few."""
        order = torch.arange(256)
        x, y = order % 16, order // 16
        centres = [(2 + 5 * i, 2 + 5 * j) for j in range(3) for i in range(3)]
        height = torch.linspace(1, 5, 9)
        bumps = [h * torch.exp(-((x - a) ** 2 + (y - b) ** 2) / 2) for h, (a, b) in zip(height, centres, strict=True)]
        features = features_of(attention=torch.stack(bumps).sum(0).expand(1, 2, -1), grid=(16, 16))
        assert SELECTORS["spaced"](features, 9).tolist() == [[a + 16 * b for a, b in centres]]
        assert len({*SELECTORS["cls_topk"](features, 9)[0].tolist()} & {a + 16 * b for a, b in centres}) < 6

    def test_is_no_matter_of_the_scale_of_scores(self):
        features = features_of(attention=torch.rand(2, 3, 30).softmax(-1), grid=(5, 6))
        larger = features._replace(cls_attention=1000 * features.cls_attention)
        assert torch.equal(SELECTORS["spaced"](features, 9), SELECTORS["spaced"](larger, 9))


@pytest.mark.parametrize("name", ["diverse", "dominant_contextual"])
def test_autocast_changes_no_choice(name):
    """Training under bf16 and evaluation without must read the same patches; features as DINOv2's, half noise."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(8, 145, 64, generator=generator) + torch.randn(64, generator=generator)
    row = torch.rand(8, 6, 144, generator=generator)
    features = VisionFeatures(tokens, row, (12, 12), 1)
    queries = SelectedQueries(Geometry(64, 32, (12, 12), 1), 36, name).eval()
    plain = queries(features, 37)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(queries(features, 37), plain)
