"""Records in a JSON list, in JSON lines, or one object in a file; also packed by gzip.

Stricter than `json.load`: duplicate keys, NaN and lone surrogates are refused. Lines end at a newline only (not at
U+2028), a byte order mark is passed over, and one bad record does not hide those after it.
"""

import codecs
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from acformer.data.index_cache import indexed, unpacked
from acformer.data.json_scan import scan_lines, scan_list
from acformer.data.records import Records
from acformer.errors import DataError

LONGEST_OBJECT = 64 * 2**20
"""Bytes of a file that is tried as one record."""
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonFile(Records):
    """The records of a file, by number; `DataError` where it is missing, or broken as a whole."""

    def __init__(self, path: Path) -> None:
        self.file = str(path)
        try:
            self.path = unpacked(path) if _begins(path, 2) == b"\x1f\x8b" else path
            arrays, facts = self._index()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        self.spans, self.text, self.images = arrays["spans"], arrays["text"], arrays["images"]
        self.numbers = arrays.get("numbers")
        self.digest = facts["sha256"]
        self.decoder = StrictDecoder()
        if len(self) > 1 and self.numbers is not None and self._is_one_object():
            self._take_whole()

    def __len__(self) -> int:
        return len(self.spans)

    def record(self, index: int) -> Any:
        """See `Records`."""
        start, end = map(int, self.spans[index])
        content = self._read(start, end - start)
        try:
            text = content.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError:
            raise DataError("not UTF-8") from None
        return self.decoder.only_value(text, "a line")

    def where(self, index: int) -> tuple[str, int]:
        """The file, and the number of the element or line."""
        return self.file, index + 1 if self.numbers is None else int(self.numbers[index])

    def lengths(self, num_placeholders: int) -> np.ndarray:
        """See `Samples`: of bytes in the file."""
        return num_placeholders * self.images + self.text // 4

    def fingerprint(self) -> str:
        """The file's sha256."""
        return self.digest

    def _index(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        start = self._start_of_list()
        if start is None:
            return indexed(self.path, "lines", lambda: scan_lines(self.path))
        try:
            return indexed(self.path, "list", lambda: scan_list(self.path, start))
        except DataError as error:
            raise DataError(f"{self.file}:{error}") from error

    def _start_of_list(self) -> int | None:
        """Where the first element may begin."""
        start = _begins(self.path, 4096)
        text = start.removeprefix(codecs.BOM_UTF8).lstrip()
        return len(start) - len(text) + 1 if text.startswith(b"[") else None

    def _read(self, start: int, size: int) -> bytes:
        with self.path.open("rb") as file:  # a handle of its own: forked workers would share a place in it
            file.seek(start)
            return file.read(size)

    def _is_one_object(self) -> bool:
        """Whether the lines are those of one object, printed on several."""
        try:
            self.record(0)
        except DataError:
            return _begins(self.path, 4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{") and self._parses()
        return False

    def _parses(self) -> bool:
        if (size := self.path.stat().st_size) > LONGEST_OBJECT:
            return False
        try:
            text = self._read(0, size).decode("utf-8-sig")
            return self.decoder.first_value(text)[1] == len(text)
        except (UnicodeDecodeError, DataError):
            return False

    def _take_whole(self) -> None:
        size = self.path.stat().st_size
        self.spans, self.text, self.numbers = np.array([[0, size]]), np.array([size]), None
        self.images = np.array([int(self.images.sum())])


def _begins(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


class StrictDecoder(json.JSONDecoder):
    """Collects duplicate keys and NaN instead of raising, so that the end of a bad record is found."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        super().__init__(object_pairs_hook=self._object, parse_constant=self.faults.append)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return StrictDecoder, ()

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            keys = [key for key, _ in pairs]
            self.faults.append(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
        return record

    def only_value(self, text: str, where: str) -> Any:
        """The value that a text holds; `DataError` if it is faulty, or not the only one."""
        value, end = self.first_value(text)
        if isinstance(value, DataError):
            raise value
        if end != len(text):
            raise DataError(f"not JSON: {where} holds more than one value")
        return value

    def first_value(self, text: str) -> tuple[Any, int]:
        """The value at the start (a `DataError` in its place if faulty) and the position of what follows it."""
        self.faults.clear()
        try:
            value, end = self.raw_decode(text, _skip_space(text, 0))
        except RecursionError:
            raise DataError("not JSON that can be read: nested too deeply") from None
        except ValueError as error:
            raise DataError(f"not JSON: {error}") from None
        return DataError(f"not JSON: {self.faults[0]}") if self.faults else value, _skip_space(text, end)


def _skip_space(text: str, start: int) -> int:
    space = _SPACE.match(text, start)
    return space.end() if space else start
