"""Parquet files, folders of `save_to_disk`, data sets of the Hugging Face Hub: Arrow tables, mapped into memory.

`datasets` does the work (the extra `acformer[data]`): it stores what it reads as Arrow files in its own cache, which
processes share. Images stay undecoded: they go through `load_image` as all others do.
"""

import hashlib
import json
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from acformer.data.entries import Entry, beside
from acformer.data.image_root import ImageRoot
from acformer.data.layouts import COLUMNS, LAYOUTS
from acformer.data.records import Records
from acformer.errors import DataError, UsageError, one_line, translated

logger = logging.getLogger("acformer")
TEXTS = (*LAYOUTS, "system", "system_prompt")
COMPARED = 256
"""Rows that are looked at to tell a table from another one."""


def hf_datasets(path: str) -> Any:
    """The library, silent; `UsageError` naming the extra where it is missing."""
    try:
        import datasets
    except ImportError as error:
        here = Path(path).expanduser().exists()
        what = "a table (parquet or Arrow)," if here else "no file here, so a data set of the Hub,"
        raise UsageError(f"{path} is {what} which needs Hugging Face datasets: pip install 'acformer[data]'") from error
    return datasets


class Table(Records):
    """The rows of a data set.

    broken: files that could not be read, with the reason; each counts as one bad record, behind the others.
    """

    def __init__(self, entry: Entry, rows: Any, broken: list[tuple[str, str]] | None = None) -> None:
        self.file = entry.path
        self.rows = chosen_columns(rows, entry.path).with_format("arrow")
        self.broken = broken or []
        self.images_in = ImageRoot(entry.image_root or beside(entry))

    def __len__(self) -> int:
        return len(self.rows) + len(self.broken)

    def record(self, index: int) -> Any:
        """See `Records`."""
        if index >= len(self.rows):
            raise DataError(self.broken[index - len(self.rows)][1])
        return as_record(self.rows[index : index + 1].to_pylist()[0])

    def where(self, index: int) -> tuple[str, int]:
        """The data set and the row, from 1; of a broken file, its name."""
        if index >= len(self.rows):
            return self.broken[index - len(self.rows)][0], 0
        return self.file, index + 1

    def lengths(self, num_placeholders: int) -> np.ndarray:
        """See `Samples`: of bytes in the columns of text."""
        found: list[np.ndarray] = []
        names = [name for name in self.rows.column_names if name in (*TEXTS, "image", "images")]
        for batch in self.rows.select_columns(names).iter(batch_size=4096):
            nothing = np.zeros(len(batch), np.int64)
            text = sum((_text_bytes(batch[name].combine_chunks()) for name in names if name in TEXTS), nothing)
            images = sum((_count(batch[name].combine_chunks()) for name in names if name not in TEXTS), nothing)
            found.append(num_placeholders * images + text // 4)
        return np.concatenate([*found, np.zeros(len(self.broken), np.int64)])

    def fingerprint(self) -> str:
        """Of the number of rows, the columns, and `COMPARED` rows evenly spread."""
        digest = hashlib.sha256(f"{len(self.rows)} {self.rows.features} {len(self.broken)}".encode())
        for index in np.linspace(0, len(self.rows) - 1, min(COMPARED, len(self.rows)), dtype=int):
            row = self.rows[int(index) : int(index) + 1].to_pylist()[0]
            digest.update(json.dumps(row, default=lambda one: hashlib.sha256(bytes(one)).hexdigest()).encode())
        return digest.hexdigest()


def open_table(entry: Entry) -> Table:
    """Parquet files, what `save_to_disk` has written, or a data set of the Hub.

    Raises:
        UsageError: `acformer[data]` is missing.
        DataError: nothing by that name, no such split, files or columns that cannot be used.
    """
    path, library = Path(entry.path).expanduser(), hf_datasets(entry.path)
    if not path.exists():
        with _reading(entry):
            return Table(entry, library.load_dataset(entry.path, entry.config, split=entry.split))
    if path.is_dir() and not parquet_files(path):
        with _reading(entry):
            saved = library.load_from_disk(str(path))
        return Table(entry, _split_of(saved, entry))
    files, broken = _whole_files(parquet_files(path))
    if not files:
        raise DataError(f"cannot read {broken[0][0]}: {broken[0][1]}")
    with _reading(entry):
        rows = library.load_dataset("parquet", data_files={"train": files}, split="train")
    return Table(entry, rows, broken)


def open_stream(entry: Entry) -> Any:
    """An `IterableDataset` of undecoded rows; errors as `open_table`."""
    path = Path(entry.path).expanduser()
    if path.is_file() and not _begins_as_parquet(path):
        raise UsageError(f"{path} is read where it lies, a record at a time: leave streaming out")
    library = hf_datasets(entry.path)
    with _reading(entry):
        if path.exists() and not parquet_files(path):
            rows = _split_of(library.load_from_disk(str(path)), entry).to_iterable_dataset()
        elif path.exists():
            files = {"train": [str(file) for file in parquet_files(path)]}
            rows = library.load_dataset("parquet", data_files=files, split="train", streaming=True)
        else:
            rows = library.load_dataset(entry.path, entry.config, split=entry.split, streaming=True)
    if rows.column_names is not None:
        rows = chosen_columns(rows, entry.path)
    return rows if rows.features is None else rows.decode(False)


def _begins_as_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def parquet_files(path: Path) -> list[Path]:
    """The file itself, or all below a folder, in order of their names."""
    return [path] if path.is_file() else sorted(path.rglob("*.parquet"))


def is_saved_dataset(path: Path) -> bool:
    """Whether `save_to_disk` has written the folder."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def chosen_columns(rows: Any, path: str) -> Any:
    """The columns that we read; `DataError` with those that there are where what is needed is not among them."""
    there = list(rows.column_names)
    for name, feature in (rows.features or {}).items():
        if type(feature).__name__ in ("Video", "Audio"):
            raise DataError(
                f"{path} has a column {name} of {type(feature).__name__.lower()}, which is neither text nor images"
            )
    if not set(there) & set(LAYOUTS):
        raise DataError(f"{path} has no column {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}; it has {', '.join(there)}")
    return rows.select_columns([name for name in there if name in COLUMNS])


def _split_of(saved: Any, entry: Entry) -> Any:
    if not isinstance(saved, dict):
        return saved
    if entry.split not in saved:
        raise DataError(f"{entry.path} has no split {entry.split!r}; it has {', '.join(saved)}")
    return saved[entry.split]


def _reading(entry: Entry) -> AbstractContextManager[None]:
    """`datasets` and those that it calls raise whatever they like."""
    is_here = Path(entry.path).expanduser().exists()
    hint = "" if is_here else "; there is no such file here, nor can it be had of the Hub"
    return translated(f"cannot read {entry.path}{hint}", DataError)


def _whole_files(files: list[Path]) -> tuple[list[str], list[tuple[str, str]]]:
    """Those whose footer can be read, and the others with the reason."""
    import pyarrow
    import pyarrow.parquet

    whole, broken = [], []
    for file in files:
        try:
            pyarrow.parquet.read_metadata(file)
        except (OSError, pyarrow.ArrowException) as error:
            broken.append((str(file), f"not a parquet file that can be read: {one_line(error, 120)}"))
        else:
            whole.append(str(file))
    return whole, broken


def as_record(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its turns as lists of objects, also where an older `datasets` stores them as an object of lists."""
    return {
        key: _transposed(value) if key in LAYOUTS and isinstance(value, dict) else value for key, value in row.items()
    }


def _transposed(columns: dict[str, Any]) -> list[dict[str, Any]]:
    lists = {key: value for key, value in columns.items() if isinstance(value, list)}
    return [dict(zip(lists, values, strict=False)) for values in zip(*lists.values(), strict=False)]


def _text_bytes(array: Any) -> np.ndarray:
    """Bytes in all strings of each row of an Arrow array."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if pa.types.is_struct(kind):
        return sum((_text_bytes(part) for part in array.flatten()), np.zeros(len(array), np.int64))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        sums = np.concatenate([[0], np.cumsum(_text_bytes(array.flatten()))])  # (items of all rows + 1,)
        ends = np.cumsum(_count(array))  # (rows,) items up to and with each
        return sums[ends] - sums[np.concatenate([[0], ends[:-1]])]
    return np.zeros(len(array), np.int64)


def _count(array: Any) -> np.ndarray:
    """How many there are in each row: of a list its length, else 1, or 0 for nothing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return pc.is_valid(array).to_numpy(zero_copy_only=False).astype(np.int64)
