"""Files and folders -> `Samples`: one reader a form, chosen by what the file holds and not by its name.

JSON (list, lines, one object, packed by gzip), parquet, what `save_to_disk` wrote, WebDataset's tar shards, and data
sets of the Hugging Face Hub by name.
"""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from acformer.data.entries import Entry, beside
from acformer.data.image_root import ImageRoot
from acformer.data.json_files import JsonFile
from acformer.data.mixture import Mixture
from acformer.data.records import Samples, SourceError
from acformer.data.samples import Sample
from acformer.data.shards import Shard, shard_files
from acformer.data.skip_log import FsPath, SkipLog
from acformer.data.tables import is_saved_dataset, open_table, parquet_files
from acformer.errors import DataError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILE_SUFFIXES = (".json", ".jsonl", ".gz", ".parquet", ".tar", ".zip", ".csv", ".txt", ".yaml")
OTHER_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".mp3", ".wav", ".flac", ".ogg", ".m4a")
CHECKED = 10_000
"""Records up to which a data set is looked through before training; of a larger one, `LOOKED_AT`."""
LOOKED_AT = 1000


def open_source(entry: Entry) -> Samples:
    """The samples of a file, a folder or a name of the Hub.

    Raises:
        UsageError: `acformer[data]` is missing.
        DataError: missing, of no known form, or broken as a whole.
    """
    path = Path(entry.path).expanduser()
    if path.is_dir():
        return _folder(entry, path)
    if not path.exists() and _is_hub_name(entry.path):
        return open_table(entry)
    form = _form(path)
    if form == "parquet":
        return open_table(entry)
    images_in = ImageRoot(entry.image_root or beside(entry))
    if form == "tar":
        return Shard(path, images_in)
    records = JsonFile(path)
    records.images_in = images_in
    return records


def read_samples(path: FsPath, *, image_root: FsPath | None = None, skipped: SkipLog) -> Iterator[Sample]:
    """The good records of a file or folder, one by one; the bad ones go to `skipped`.

    Pictures are looked for under `image_root` (default: the file's folder) and only opened later. Errors:
    `DataError` naming the file when it is missing, empty, broken as a whole or without one good record.
    """
    samples = open_source(Entry(str(path), image_root=None if image_root is None else str(image_root)))
    yield from good_samples(samples, str(path), skipped)


def good_samples(samples: Samples, title: str, skipped: SkipLog) -> Iterator[Sample]:
    """One after another; each is counted in `skipped` when it is reached. Errors: as `read_samples`."""
    reader = _Reader(samples, skipped)
    for index in range(len(samples)):
        skipped.offered += 1
        if (sample := reader.read(index)) is not None:
            yield sample
    reader.check_used(title)


def look_through(samples: Samples, title: str, skipped: SkipLog) -> None:
    """Skips the bad records of a small data set before training; of a large one, those among `LOOKED_AT` of them.

    Raises:
        DataError: none is usable, or more are bad than may be.
    """
    count = len(samples)
    wanted = min(count, 1) if samples.is_stream else count if count <= CHECKED else LOOKED_AT
    reader = _Reader(samples, skipped)
    for place in range(wanted):
        reader.read(place * count // wanted)
    reader.check_used(title, "" if wanted == count else f" among {wanted} that were looked at")
    skipped.check()


class _Reader:
    """Reads records of `samples`; bad ones go to `skipped`, and the first one's reason is kept."""

    def __init__(self, samples: Samples, skipped: SkipLog) -> None:
        self.samples, self.skipped = samples, skipped
        self.used, self.reason = 0, "it is empty"

    def read(self, index: int) -> Sample | None:
        """The sample, or None for a bad record; a source that breaks off is an error."""
        try:
            sample = self.samples.sample(index)
        except SourceError:
            raise
        except DataError as error:
            file, number = self.samples.where(index)
            if self.reason == "it is empty":
                self.reason = f"record {number}: {error}"
            self.skipped.skip(file, number, str(error))
            return None
        self.used += 1
        return sample

    def check_used(self, title: str, among: str = "") -> None:
        """`DataError` where none was good."""
        if not self.used:
            raise DataError(f"{title} holds no usable record{among}; {self.reason}")


def _folder(entry: Entry, path: Path) -> Samples:
    if is_saved_dataset(path) or parquet_files(path):
        return open_table(entry)
    if shards := shard_files(path):
        images_in = ImageRoot(entry.image_root or beside(entry))
        return Mixture([Shard(shard, images_in) for shard in shards])
    raise DataError(
        f"cannot read {path}: a folder without parquet files, tar shards or what save_to_disk writes; give a file"
    )


def _is_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and not name.lower().endswith(FILE_SUFFIXES)


def _form(path: Path) -> str:
    """parquet, tar or json; `DataError` for what is none of them, and says so."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if start.startswith(b"PAR1"):
        return "parquet"
    if start[257:262] == b"ustar" or path.suffix == ".tar":
        return "tar"
    if path.suffix.lower() in OTHER_SUFFIXES:
        raise DataError(f"{path} is video or sound, of which nothing is read")
    if path.name.lower().endswith((".tar.gz", ".tgz")):
        raise DataError(f"{path} is packed, and cannot be read at any place of it: gunzip it")
    if zipfile.is_zipfile(path):
        raise DataError(f"{path} is a zip: it can be the image_root, but records are a file of their own")
    return "json"
