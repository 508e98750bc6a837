"""Data sets read as they come, whose length nobody knows: the order is a function of the seed, the place a number.

A stream begins anew when it ends, in another order. To go on at a place, it is read up to there again without being
encoded or decoded, so that a resumed run has the very samples that it would have had. Each process and each loader's
worker reads all of it and encodes its share.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from acformer.data.entries import Entry, beside
from acformer.data.image_root import ImageRoot
from acformer.data.layouts import as_sample
from acformer.data.records import Samples, SourceError
from acformer.data.samples import Sample
from acformer.data.tables import as_record, open_stream
from acformer.errors import AcFormerError, UsageError, one_line

BUFFER = 1000
"""Rows among which the next one is drawn."""


class Stream(Samples):
    """The first `num_rows` rows of one or several streams, each row from one of them by its weight."""

    is_stream = True

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        num_rows: int,
        seed: int,
        open_rows: Callable[[Entry], Any] = open_stream,
    ) -> None:
        self.entries = entries
        self.num_rows = num_rows
        self.seed = seed
        self.sources = [open_rows(entry) for entry in entries]
        self.roots = [ImageRoot(entry.image_root or beside(entry)) for entry in entries]
        self._rows: Iterator[tuple[int, Any]] | None = None
        self._next = 0
        self._process = 0  # in which the rows were opened: a forked worker opens its own

    def __len__(self) -> int:
        return self.num_rows

    def sample(self, index: int) -> Sample:
        """See `Samples`; quick where numbers only grow.

        Raises:
            SourceError: the stream broke off.
        """
        if self._rows is None or index < self._next or self._process != os.getpid():
            self._rows, self._next, self._process = self._endless(), 0, os.getpid()
        try:
            for _ in range(index - self._next):
                next(self._rows)
            source, row = next(self._rows)
        except AcFormerError:
            raise
        except Exception as error:  # of the network, of a file, of a decoder
            raise SourceError(f"{self.where(index)[0]} broke off at row {index + 1}: {one_line(error)}") from error
        self._next = index + 1
        return as_sample(as_record(row), self.entries[source].path, index + 1, self.roots[source])

    def where(self, index: int) -> tuple[str, int]:
        """All streams, and the place among what was drawn from them."""
        return " + ".join(entry.path for entry in self.entries), index + 1

    def lengths(self, num_placeholders: int) -> np.ndarray:
        """`UsageError`: nobody knows them."""
        raise UsageError("a stream has no lengths to group by: leave train_sampling_strategy out, or streaming")

    def fingerprint(self) -> str:
        """Of what was asked for; what comes is not compared."""
        asked = [[asdict(entry) for entry in self.entries], self.seed]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_rows": None, "_next": 0}

    def _endless(self) -> Iterator[tuple[int, Any]]:
        chance = random.Random(f"{self.seed}")
        weights = [entry.weight for entry in self.entries]
        rows = [self._again_and_again(number) for number in range(len(self.entries))]
        while True:
            (number,) = chance.choices(range(len(rows)), weights)
            yield number, next(rows[number])

    def _again_and_again(self, number: int) -> Iterator[Any]:
        shuffled = self.sources[number].shuffle(seed=self.seed, buffer_size=BUFFER)
        epoch = 0
        while True:
            shuffled.set_epoch(epoch)
            is_empty = True
            for batch in shuffled.iter(batch_size=1):  # iterating plainly would split the rows among workers
                is_empty = False
                yield {name: values[0] for name, values in batch.items()}
            if is_empty:
                raise SourceError(f"{self.entries[number].path} holds no rows")
            epoch += 1
