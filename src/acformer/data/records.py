"""What every form of data looks like to the rest: samples by number, made when they are asked for."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acformer.data.image_root import ImageRoot
from acformer.data.layouts import as_sample
from acformer.data.lengths import estimated_length
from acformer.data.samples import Sample
from acformer.errors import DataError


class WorkerError(DataError):
    """Keeps its plain message when it comes from a loader's worker.

    torch makes the error anew in the main process, out of the worker's whole traceback: what it ends in is kept.
    """

    def __init__(self, message: str) -> None:
        name = f"{type(self).__module__}.{type(self).__qualname__}: "
        super().__init__(message.rpartition(name)[2].rstrip())


class SourceError(WorkerError):
    """All of a source cannot be read on, not one of its records."""


class Samples(ABC):
    """Samples by number; a number may be that of a bad record. Iterating gives the good ones, in order."""

    is_stream = False
    """Whether they come one after another, so that another order than theirs cannot be had."""

    @abstractmethod
    def __len__(self) -> int:
        """Good and bad ones."""

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """The sample of that number; `DataError` with the reason where the record is bad."""

    @abstractmethod
    def where(self, index: int) -> tuple[str, int]:
        """File and number of the record, for whoever looks for it."""

    @abstractmethod
    def lengths(self, num_placeholders: int) -> np.ndarray:
        """(n,) about how many tokens each will be, with `num_placeholders` image tokens an image. Nothing is parsed."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Differs where the samples or their order do."""

    def __iter__(self) -> Iterator[Sample]:
        for index in range(len(self)):
            try:
                sample = self.sample(index)
            except SourceError:
                raise
            except DataError:
                continue
            yield sample


class Records(Samples):
    """A reader of one form: it gives records, this class makes samples of them.

    images: where the images lie that records name.
    """

    images_in: ImageRoot

    @abstractmethod
    def record(self, index: int) -> Any:
        """The record as it is written; `DataError` where it cannot be read."""

    def sample(self, index: int) -> Sample:
        """See `Samples`."""
        return as_sample(self.record(index), *self.where(index), self.images_in)


class SampleList(Samples):
    """Samples that are there."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> Sample:
        """See `Samples`."""
        return self.samples[index]

    def where(self, index: int) -> tuple[str, int]:
        """What the sample says."""
        return self.samples[index].file, self.samples[index].record

    def lengths(self, num_placeholders: int) -> np.ndarray:
        """See `estimated_length`."""
        return np.array([estimated_length(sample, num_placeholders) for sample in self.samples], np.int64)

    def fingerprint(self) -> str:
        """Of what is said and how the images are called; the data may have moved with its images."""
        paths = [path for sample in self.samples for path in sample.images if isinstance(path, Path)]
        root = os.path.commonpath(paths) if paths else ""
        digest = hashlib.sha256()
        for sample in self.samples:
            names = [os.path.relpath(path, root) if isinstance(path, Path) else str(path) for path in sample.images]
            digest.update(json.dumps([sample.id, sample.messages, names]).encode())
        return digest.hexdigest()


def as_samples(samples: Samples | Sequence[Sample]) -> Samples:
    """A list as `Samples`; these as they are."""
    return samples if isinstance(samples, Samples) else SampleList(samples)
