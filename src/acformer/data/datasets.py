"""Data sets by name: what `data: NAME[:PART]` of a recipe and `acformer eval --data NAME[:PART]` mean.

A file of conversations needs no entry here. A package of your own offers a data set by an entry point in the group
`acformer.datasets`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import ClassVar

from acformer.data.entries import Data, data_entries
from acformer.data.mixture import Mixture
from acformer.data.records import SampleList, Samples
from acformer.data.samples import Sample
from acformer.data.skip_log import SkipLog
from acformer.data.sources import good_samples, open_source, read_samples
from acformer.data.streams import Stream
from acformer.errors import UsageError, unknown_name
from acformer.fetch.embedded import embedded_path
from acformer.registry import Registry


class Dataset(ABC):
    """A data set with named parts."""

    train_part: ClassVar[str] = "train"
    """The part that a bare name means in training."""
    test_part: ClassVar[str] = "test"
    """The part that a bare name means in evaluation."""

    @abstractmethod
    def samples(self, part: str, *, limit: int | None, skipped: SkipLog) -> list[Sample]:
        """The first `limit` samples of a part, counted in `skipped`; `UsageError` for a part that there is not."""

    def known_samples(self) -> Iterable[Sample]:
        """Questions with answers from which an answer without a look at the image is learnt: none of the test's."""
        return ()

    def example_questions(self) -> tuple[str, ...]:
        """A few questions of its kind, for a person who does not know what to ask."""
        return ()


@dataclass(frozen=True)
class FolderDataset(Dataset):
    """JSON lines in a folder that `acformer fetch` has made, one file a part.

    folder: its name for `acformer fetch`. parts: the files, without `.jsonl`. questions: `example_questions`.
    """

    folder: str
    parts: tuple[str, ...]
    questions: tuple[str, ...] = ()

    def samples(self, part: str, *, limit: int | None, skipped: SkipLog) -> list[Sample]:
        """See `Dataset`; `DataError` where it was not fetched."""
        if part not in self.parts:
            raise unknown_name(f"part of {self.folder}", part, self.parts)
        return list(islice(read_samples(self._file(part), skipped=skipped), limit))

    def known_samples(self) -> Iterable[Sample]:
        """All of the training part."""
        return self.samples(self.train_part, limit=None, skipped=SkipLog())

    def example_questions(self) -> tuple[str, ...]:
        """`questions`."""
        return self.questions

    def _file(self, part: str) -> Path:
        return embedded_path(self.folder) / f"{part}.jsonl"


DATASETS = Registry[Dataset](
    "data set",
    "acformer.datasets",
    {
        "easy-vqa": FolderDataset(
            "easy-vqa",
            ("train", "test", "captions", "train_dialogues"),
            (
                "what is the color of the shape?",
                "what shape is in the image?",
                "is there a red shape?",
                "does the image contain a circle?",
            ),
        )
    },
)


def named_dataset(name_or_path: str) -> tuple[Dataset, str] | None:
    """The data set that `NAME[:PART]` names, and the part, "" where it is not given; None for a path.

    Raises:
        UsageError: it is nearly the name of one, and no path.
    """
    name, _, part = name_or_path.partition(":")
    if name in DATASETS.names():
        return DATASETS[name], part
    if get_close_matches(name, DATASETS.names()) and not Path(name_or_path).expanduser().exists():
        raise unknown_name("data set", name, DATASETS.names())
    return None


def open_samples(
    data: Data,
    *,
    image_root: str | Path | None = None,
    skipped: SkipLog | None = None,
    limit: int | None = None,
    seed: int = 0,
    num_rows: int | None = None,
) -> Mixture:
    """The samples that `data:` of a stage means, made when they are asked for; all are counted in `skipped`.

    limit: of each source, the first so many records. seed, num_rows: of streams, their order and how far they are read.

    Raises:
        UsageError: `data` is not what `data_entries` takes, a part that there is not, `acformer[data]` is missing, a
            stream without `num_rows`.
        DataError: a source that cannot be opened.
    """
    skipped = skipped or SkipLog()
    entries = data_entries(data, None if image_root is None else str(image_root))
    if entries[0].streaming:
        if num_rows is None:
            raise UsageError("a stream has no length: give training.max_steps")
        parts: list[Samples] = [Stream(entries, num_rows=num_rows, seed=seed)]
        skipped.offered += num_rows
        return Mixture(parts)
    parts = []
    for entry in entries:
        named = named_dataset(entry.path)
        if named is not None:
            dataset, part = named
            parts.append(SampleList(dataset.samples(part or dataset.train_part, limit=limit, skipped=skipped)))
            continue
        parts.append(open_source(entry))
        skipped.offered += len(parts[-1]) if limit is None else min(len(parts[-1]), limit)
    return Mixture(parts, [entry.weight for entry in entries], limit)


def load_samples(
    data: Data | Path,
    *,
    image_root: str | Path | None = None,
    skipped: SkipLog | None = None,
    limit: int | None = None,
) -> list[Sample]:
    """The good samples of a file, or of `NAME[:PART]` of `DATASETS` (a bare name is its training part), all at once.

    Of several sources, all of each. Of more than `limit` the first; what follows is not looked at, nor counted. Errors:
    `DataError` as `read_samples`, and when too many records are bad (`SkipLog.check`); `UsageError` as `open_samples`.
    """
    skipped = skipped or SkipLog()
    data = str(data) if isinstance(data, Path) else data
    samples: list[Sample] = []
    for entry in data_entries(data, None if image_root is None else str(image_root)):
        left = None if limit is None else limit - len(samples)
        named = named_dataset(entry.path)
        if entry.streaming:
            samples += islice(good_samples(Stream([entry], num_rows=_rows(left), seed=0), entry.path, skipped), left)
        elif named is None:
            samples += islice(good_samples(open_source(entry), entry.path, skipped), left)
        else:
            dataset, part = named
            samples += dataset.samples(part or dataset.train_part, limit=left, skipped=skipped)
        if left is not None and len(samples) >= (limit or 0):
            break
    skipped.check()
    return samples


def _rows(limit: int | None) -> int:
    if limit is None:
        raise UsageError("a stream has no end: say how many samples of it are wanted")
    return limit
