"""Published files as they lie: folders, `.zip`, `.gz`; JSON, JSON lines, TSV, XLSX and parquet as records.

JSON lines are known by what they are, not by their name: POPE calls them `.json`.
"""

import csv
import gzip
import json
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cached_property, partial
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, TypeVar

from acformer.errors import DataError, UsageError

Record = dict[str, Any]
Q = TypeVar("Q")
File = Path | zipfile.Path
MAX_DEPTH = 6
"""Folders within folders that are looked into: image folders are often links, and links may go in circles."""


class Folder:
    """A folder (or a single file, or a `.zip`) in which a benchmark's files are looked for by their published names."""

    def __init__(self, root: Path, *, images: bool = False, only: str = "*"):
        """images: whether those that lie in tables will be asked for. only: the paths in it that count."""
        if not root.exists():
            raise DataError(f"{root}: there is no such file or folder")
        self.root, self.images, self.only = root, images, only

    @cached_property
    def files(self) -> list[File]:
        """All files in it, in order of their paths, those in `.zip` files included."""
        return [file for file in _walk(self.root) if self.only == "*" or self._counts(file)]

    def _counts(self, file: File) -> bool:
        return fnmatch(str(file).removeprefix(str(self.root)).lstrip(os.sep), self.only)

    @property
    def single(self) -> File | None:
        """The one file that it is."""
        return self.files[0] if not self.root.is_dir() and len(self.files) == 1 else None

    def find(self, *patterns: str) -> File | None:
        """The file with the first of these names (`*` stands for anything) that is there; `DataError` for two."""
        for pattern in patterns:
            found = [file for file in self.files if fnmatch(plain_name(file), pattern)]
            if len(found) > 1:
                names = " and ".join(str(file) for file in found[:2])
                raise DataError(f"{names} are both {pattern}: name the file that is meant")
            if found:
                return found[0]
        return None

    def parquet(self) -> "Table | None":
        """Its parquet files as one table, if it has any."""
        files = [file for file in self.files if file.name.endswith(".parquet")]
        return Table(files) if files else None

    def need(self, *patterns: str) -> File:
        """As `find`, or the single file whatever its name; `DataError` where there is none."""
        file = self.find(*patterns) or self.single
        if file is None:
            raise DataError(f"{self.root} has no {' or '.join(patterns)}")
        return file


def _walk(place: Path, depth: int = 0) -> Iterator[File]:
    if place.is_dir():
        with os.scandir(place) as entries:
            paths = sorted(entry.path for entry in entries if not entry.name.startswith("."))
        for path in paths if depth < MAX_DEPTH else ():
            yield from _walk(Path(path), depth + 1)
    elif place.suffix == ".zip":
        with readable(place):
            archive = zipfile.ZipFile(place)
        yield from (zipfile.Path(archive, name) for name in sorted(archive.namelist()) if not name.endswith("/"))
    else:
        yield place


def plain_name(file: File) -> str:
    """Its name without `.gz`."""
    return file.name.removesuffix(".gz")


def read_bytes(file: File) -> bytes:
    """What is in it, unpacked."""
    with readable(file):
        data = file.read_bytes()
        return gzip.decompress(data) if file.name.endswith(".gz") else data


def read_json(file: File, object_hook: Callable[[Record], Any] | None = None) -> Any:
    """The value of a JSON file, or the list of values of one with a value a line."""
    with readable(file):
        text = read_bytes(file).decode("utf-8-sig")
        try:
            return json.loads(text, object_hook=object_hook)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):
                raise
    return list(_json_lines(file, text))


def _json_lines(file: File, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: strings may hold U+2028
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}, line {number}: not JSON: {error}") from None


def read_records(file: File) -> list[Record]:
    """The rows of a table, or the objects of a JSON list or of JSON lines; `DataError` for anything else."""
    ending = Path(plain_name(file)).suffix.lower()
    if ending in (".tsv", ".csv"):
        return list(_delimited(file, "\t" if ending == ".tsv" else ","))
    if ending == ".xlsx":
        return list(_spreadsheet(file))
    records = read_json(file)
    if isinstance(records, dict):  # lines, but only one of them
        records = [records]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{file} holds no records: expected a list of objects, or an object a line")
    return records


def _delimited(file: File, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # MMBench's tables hold images
    with readable(file):
        yield from csv.DictReader(StringIO(read_bytes(file).decode("utf-8-sig"), newline=""), delimiter=delimiter)


def _spreadsheet(file: File) -> Iterator[Record]:
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise UsageError(f"{file}: reading .xlsx needs openpyxl: pip install 'acformer[benchmarks]'") from error
    with readable(file):
        rows = load_workbook(BytesIO(read_bytes(file)), read_only=True).worksheets[0].iter_rows(values_only=True)
        head = [str(name) for name in next(rows, ())]
        for row in rows:
            yield dict(zip(head, row, strict=False))


class Table:
    """Rows of a Hugging Face data set in parquet files; images stay bytes, and are read when they are asked for."""

    def __init__(self, files: Iterable[File]):
        paths = [str(file) for file in files]
        try:
            import datasets
        except ImportError as error:
            raise UsageError(
                f"{paths[0]}: reading .parquet needs datasets: pip install 'acformer[benchmarks]'"
            ) from error
        with readable(Path(paths[0])):
            self.rows = datasets.load_dataset("parquet", data_files=paths, split="train")
        self.images = [name for name, feature in self.rows.features.items() if isinstance(feature, datasets.Image)]
        for name in self.images:
            self.rows = self.rows.cast_column(name, datasets.Image(decode=False))

    def questions(self, make: Callable[[Record, Callable[[], bytes] | None], Q]) -> list[Q]:
        """What `make` makes of each row without its image, and of what gives the image's bytes."""
        records = self.rows.remove_columns(self.images)
        return [make(record, partial(self._bytes, place)) for place, record in enumerate(records)]

    def _bytes(self, place: int) -> bytes:
        image = self.rows[place][self.images[0]] if self.images else None
        if not image:
            return b""
        return image["bytes"] or Path(image["path"]).read_bytes()


@contextmanager
def readable(file: File) -> Iterator[None]:
    """What the libraries raise for a file that is not what its name says becomes a `DataError` that names it."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{file} cannot be read: {(error.strerror or str(error)).lower()}") from error
    except (EOFError, ValueError, KeyError, RecursionError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


@contextmanager
def expecting(file: File, what: str) -> Iterator[None]:
    """A record that lacks a field, or holds another kind of value in it, becomes a `DataError`: not `what`."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{file} is no {what}: a record of it has no {error}") from error
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is no {what}: {error}") from error
