"""Batches of like length: a permutation of seed and epoch alone, less padding, the same steps in every process."""

from itertools import pairwise

import pytest
import tiny
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from acformer.data.collate import ConversationDataset
from acformer.data.lengths import LengthGroupedSampler, estimated_length, grouped_by_length
from acformer.data.samples import Sample

MANY = st.lists(st.integers(1, 400), max_size=300)


def padding(lengths: list[int], order: list[int], batch: int) -> float:
    """Share of a padded batch's positions that hold nothing."""
    batches = [[lengths[index] for index in order[i : i + batch]] for i in range(0, len(order), batch)]
    return 1 - sum(lengths) / sum(max(rows) * len(rows) for rows in batches)


def sample(words: int, images: int = 1, turns: int = 1) -> Sample:
    question = [{"type": "image"}] * images + [{"type": "text", "text": "what is it?"}]
    said = ({"role": "user", "content": question}, {"role": "assistant", "content": "red " * words}) * turns
    return Sample(str(words), said, tuple(f"{n}.png" for n in range(images * turns)))


@given(MANY, st.integers(1, 40), st.text(max_size=3))
def test_every_index_once_and_only_the_last_step_is_short(lengths, rows, seed):
    order = grouped_by_length(lengths, rows, seed)
    assert sorted(order) == list(range(len(lengths)))
    assert order == grouped_by_length(lengths, rows, seed)
    for start in range(0, len(order) - rows + 1, rows):
        step = [lengths[index] for index in order[start : start + rows]]
        assert step == sorted(step, reverse=True)


def test_another_seed_is_another_order_and_steps_come_in_no_order_of_length():
    lengths = [10 * n for n in range(640)]
    first, second = (grouped_by_length(lengths, 4, seed) for seed in ("0 0", "0 1"))
    assert first != second
    longest = [lengths[first[start]] for start in range(0, 640, 4)]
    rises = sum(one < next_one for one, next_one in pairwise(longest))
    assert 60 < rises < 100, "half of the 159; within the four pieces that are sorted, too"


def test_captions_and_dialogues_do_not_pad_each_other():
    # A caption of LCS-558k has about 30 tokens, a dialogue some hundreds; both have the same image tokens.
    lengths = [145 + 30 + n % 7 for n in range(500)] + [145 + 100 + n % 400 for n in range(500)]
    sampler = LengthGroupedSampler(lengths, 16, 0, lambda: 0)
    shuffled = LengthGroupedSampler([1] * 1000, 16, 0, lambda: 0)
    assert padding(lengths, [*shuffled], 16) > 0.3
    # Measured 0.06 and 0.03; what is left is within a step's 16 neighbours of a piece of 240.
    assert padding(lengths, [*sampler], 16) < 0.08
    assert padding(lengths, [*sampler], 8) < 0.05  # two batches a step


def test_processes_share_steps_of_like_length():
    lengths = [(7 * n) % 100 for n in range(960)]

    def batches(rank):
        sampler = LengthGroupedSampler(lengths, 8, 3, lambda: 1)  # 2 processes with batches of 4
        return [*BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), num_processes=2, process_index=rank)]

    ranks = [batches(rank) for rank in (0, 1)]
    assert sorted(index for rank in ranks for batch in rank for index in batch) == list(range(960))
    steps = [[lengths[index] for batch in step for index in batch] for step in zip(*ranks, strict=True)]
    assert max(max(step) - min(step) for step in steps) < 10  # of 100: a step is 8 neighbours of 240


def test_the_epoch_is_asked_for_when_it_begins():
    epoch = 0
    sampler = LengthGroupedSampler(list(range(20)), 2, 0, lambda: epoch)
    first = [*sampler]
    epoch = 1
    assert [*sampler] != first
    epoch = 0
    assert [*sampler] == first
    assert len(sampler) == 20


@pytest.mark.parametrize("max_length", [None, 60])
def test_lengths_of_a_data_set_are_near_the_true_ones_and_open_nothing(max_length):
    samples = [sample(2), sample(60), sample(3, turns=6), sample(1, images=0), sample(20, images=2)]
    samples += [sample(1, images=40)]
    dataset = ConversationDataset(samples, tiny.processor(), max_length=max_length)
    guessed = dataset.lengths()
    true = [max(len(row["input_ids"]) for row in item) for item in ConversationDataset(samples, tiny.processor())]
    assert sorted(range(6), key=estimates(samples).__getitem__) == sorted(range(6), key=true.__getitem__)
    assert max(guessed) <= (max_length or 1000)


def estimates(samples: list[Sample]) -> list[int]:
    return [estimated_length(one, 5) for one in samples]


def test_an_item_is_as_long_as_its_longest_sample():
    same = [Sample(str(n), sample(n).messages, ("0.png",)) for n in (3, 90, 4)]
    (length,) = ConversationDataset(same, tiny.processor(), group=3).lengths()
    assert length == max(estimates(same))
