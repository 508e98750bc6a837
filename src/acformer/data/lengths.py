"""Samples of like length in one batch, so that fewer visual tokens are fewer FLOPs and not padding.

Differs from transformers' `LengthGroupedSampler`: lengths are estimated from the text (nothing is tokenised, no image
opened); the order is a function of seed and epoch alone, so a resumed run goes on in it and all processes share it; the
batches of an epoch come in random order, not from long to short.
"""

import random
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import Sampler

from acformer.data.conversation import split_at_images
from acformer.data.samples import Sample

BYTES_PER_TOKEN = 4
TOKENS_PER_TURN = 4
"""What a template writes around a turn; together a rough guess, but a longer sample must only seem longer."""
STEPS = 50
"""Steps' worth of rows that are sorted together: more leave less padding, fewer leave more to chance."""


def estimated_length(sample: Sample, num_placeholders: int) -> int:
    """About how many tokens a sample will be, with `num_placeholders` image tokens an image."""
    text = sum(len(part.encode()) for message in sample.messages for part in split_at_images(message))
    return num_placeholders * len(sample.images) + text // BYTES_PER_TOKEN + TOKENS_PER_TURN * len(sample.messages)


def grouped_by_length(lengths: Sequence[int], rows: int, seed: str) -> list[int]:
    """Every index once, in random order but for this: each `rows` in a row are of like length, the longest first.

    All are shuffled, cut into pieces of `STEPS` x `rows` (fewer where that would leave less than four pieces), each
    piece is sorted and cut into `rows`, and these are shuffled. What is left over after the last `rows` comes last.
    """
    chance = random.Random(seed)
    order = chance.sample(range(len(lengths)), len(lengths))
    piece = rows * max(1, min(len(order) // (4 * rows), STEPS))
    pieces = [sorted(order[i : i + piece], key=lengths.__getitem__, reverse=True) for i in range(0, len(order), piece)]
    whole = [part[i : i + rows] for part in pieces for i in range(0, len(part), rows)]
    rest = whole.pop() if len(order) % rows else []  # the short one: in the middle it would shift all steps behind it
    chance.shuffle(whole)
    return [index for step in [*whole, rest] for index in step]


class LengthGroupedSampler(Sampler[int]):
    """`grouped_by_length`, anew in each epoch.

    Args:
        lengths: of the items.
        rows: items of one optimizer step, of all its batches in all processes.
        seed: of the run.
        epoch: tells which one begins, also after a resume (loaders wrap samplers, some so deep that their `set_epoch`
            does not arrive).
    """

    def __init__(self, lengths: Sequence[int], rows: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths = lengths
        self.rows = rows
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(grouped_by_length(self.lengths, self.rows, f"{self.seed} {self.epoch()}"))
