"""Several sources as one, each with a weight: how often its records come in an epoch.

Weight 1 takes each record once, 2 twice. Of 0.25 a quarter comes, another quarter in the next epoch, until all were
there. Which ones, and in which order, is a function of the seed and the epoch alone.
"""

import hashlib
import json
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from acformer.data.lengths import grouped_by_length
from acformer.data.records import Samples
from acformer.data.samples import Sample


class Mixture(Samples):
    """Sources one after another.

    limit: of each, the first so many records. counts: how many there are of each. weights: see above.
    """

    def __init__(
        self, parts: Sequence[Samples], weights: Sequence[float] | None = None, limit: int | None = None
    ) -> None:
        self.parts = parts
        self.weights = [1.0] * len(parts) if weights is None else [*weights]
        self.counts = [len(part) if limit is None else min(len(part), limit) for part in parts]
        self.starts = [0, *np.cumsum(self.counts).tolist()]

    @property
    def is_stream(self) -> bool:  # type: ignore[override]
        """See `Samples`."""
        return any(part.is_stream for part in self.parts)

    @property
    def is_weighted(self) -> bool:
        """Whether an epoch is anything else than all records once."""
        return any(weight != 1 for weight in self.weights)

    def __len__(self) -> int:
        return self.starts[-1]

    def part_of(self, index: int) -> int:
        """Which source a number belongs to."""
        return bisect_right(self.starts, index) - 1

    def sample(self, index: int) -> Sample:
        """See `Samples`."""
        part, number = self._find(index)
        return part.sample(number)

    def where(self, index: int) -> tuple[str, int]:
        """See `Samples`."""
        part, number = self._find(index)
        return part.where(number)

    def lengths(self, num_placeholders: int) -> np.ndarray:
        """See `Samples`."""
        found = [part.lengths(num_placeholders)[:count] for part, count in zip(self.parts, self.counts, strict=True)]
        return np.concatenate(found)

    def fingerprint(self) -> str:
        """Of all sources, how many of their records are taken, and the weights."""
        if len(self.parts) == 1 and not self.is_weighted and self.counts[0] == len(self.parts[0]):
            return self.parts[0].fingerprint()
        parts = [[part.fingerprint() for part in self.parts], self.counts, self.weights]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _find(self, index: int) -> tuple[Samples, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self.part_of(index)
        return self.parts[number], index - self.starts[number]


def weighted_order(counts: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> list[int]:
    """The numbers of an epoch, source after source; each source's are counted on from those before it."""
    order: list[np.ndarray] = []
    start = 0
    for place, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        whole, rest = _times(count, weight)
        order += [np.arange(start, start + count)] * whole
        if rest:
            mixed = np.array(random.Random(f"{seed} {place}").sample(range(count), count))
            # A window of the mixed numbers that moves on by its width in each epoch: all come before any comes again.
            order.append(start + mixed[(epoch * rest + np.arange(rest)) % count])
        start += count
    return np.concatenate([np.zeros(0, np.int64), *order]).tolist()


def weighted_size(counts: Sequence[int], weights: Sequence[float]) -> int:
    """How many numbers `weighted_order` gives."""
    times = [_times(count, weight) for count, weight in zip(counts, weights, strict=True)]
    return sum(count * whole + rest for count, (whole, rest) in zip(counts, times, strict=True))


def _times(count: int, weight: float) -> tuple[int, int]:
    """How often all come, and how many once more."""
    whole = int(weight)
    return whole, round(count * (weight - whole))


class MixtureSampler(Sampler[int]):
    """`weighted_order` of an epoch, in random order, or in one of like lengths.

    Args:
        counts, weights: of the sources' items.
        seed: of the run. epoch: tells which one begins, also after a resume.
        lengths, rows: of all items, and items of a step; see `LengthGroupedSampler`.
    """

    def __init__(
        self,
        counts: Sequence[int],
        weights: Sequence[float],
        seed: int,
        epoch: Callable[[], int],
        lengths: Sequence[int] | None = None,
        rows: int = 1,
    ) -> None:
        self.counts, self.weights = counts, weights
        self.seed, self.epoch = seed, epoch
        self.lengths, self.rows = lengths, rows

    def __len__(self) -> int:
        return weighted_size(self.counts, self.weights)

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        order, chance = weighted_order(self.counts, self.weights, self.seed, epoch), f"{self.seed} {epoch}"
        if self.lengths is None:
            return iter(random.Random(chance).sample(order, len(order)))
        lengths = [self.lengths[index] for index in order]
        return iter([order[place] for place in grouped_by_length(lengths, self.rows, chance)])
