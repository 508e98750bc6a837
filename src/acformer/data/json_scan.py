"""Where the records of a JSON file stand, found without parsing it: a gigabyte in seconds.

Only the bytes that can end a record are looked at, with numpy, a few megabytes at a time: quotes, brackets and commas
of a list, newlines of JSON lines. What a record says is parsed (strictly) when it is needed.

Of each record: first byte, one behind the last, about how many bytes of text it has, about how many images.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from acformer.data.index_cache import Arrays
from acformer.errors import DataError

CHUNK = 4 * 2**20
QUOTE, OPEN, CLOSE, COMMA = 1, 2, 3, 4
_KINDS = {b'"': QUOTE, b"{": OPEN, b"[": OPEN, b"}": CLOSE, b"]": CLOSE, b",": COMMA}
_TABLE = bytearray(256)
for _byte, _kind in _KINDS.items():
    _TABLE[_byte[0]] = _kind
TAGS = (b"<image>", b'"image"')
"""A LLaVA text has the first, the parts of chat messages the second; a record has as many images as of the commoner."""


def scan_list(path: Path, start: int) -> tuple[Arrays, dict[str, Any]]:
    """The elements of a list whose first byte behind the bracket is `start`.

    Raises:
        DataError: the list is broken off or followed by more; ": " and the number of the record in front.
    """
    scanner, digest = _ListScanner(start), hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(start))
        for base, chunk in _chunks(file, start):
            digest.update(chunk)
            scanner.feed(base, chunk)
    return scanner.finish(path), {"sha256": digest.hexdigest()}


def scan_lines(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """The lines that are not blank; `numbers` are those of the lines, from 1."""
    digest, ends, tags = hashlib.sha256(), [np.zeros(0, np.int64)], _Tags()
    size = path.stat().st_size
    with path.open("rb") as file:
        for base, chunk in _chunks(file, 0):
            digest.update(chunk)
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + base)
            tags.feed(base, chunk)
        breaks = np.concatenate([*ends, [size]])
        spans = np.stack([np.concatenate([[0], breaks[:-1] + 1]), breaks], axis=1)  # (lines, 2)
        full = _not_blank(file, spans)
    spans = spans[full]
    images = tags.between(np.concatenate([spans[:, 0], [size]]))
    arrays = {"spans": spans, "text": spans[:, 1] - spans[:, 0], "images": images, "numbers": np.flatnonzero(full) + 1}
    return arrays, {"sha256": digest.hexdigest()}


def _not_blank(file: BinaryIO, spans: np.ndarray) -> np.ndarray:
    """Which lines hold anything; only short or odd ones are read."""
    full = spans[:, 1] > spans[:, 0]
    for line in np.flatnonzero(full):
        if spans[line, 1] - spans[line, 0] > 64:
            continue
        file.seek(int(spans[line, 0]))
        full[line] = bool(file.read(int(spans[line, 1] - spans[line, 0])).strip())
    return full


def _chunks(file: BinaryIO, start: int) -> Iterator[tuple[int, bytes]]:
    """(place, bytes) of pieces, none of which ends in a backslash: what it does to the next byte is then in sight."""
    file.seek(start)
    while chunk := file.read(CHUNK):
        while chunk.endswith(b"\\") and (more := file.read(2**16)):
            chunk += more
        yield start, chunk
        start += len(chunk)


class _Tags:
    """Where the tags of images stand."""

    def __init__(self) -> None:
        self.places: list[list[int]] = [[] for _ in TAGS]

    def feed(self, base: int, chunk: bytes) -> None:
        """The next piece of the file, which begins at `base`."""
        for places, tag in zip(self.places, TAGS, strict=True):
            at = chunk.find(tag)
            while at >= 0:
                places.append(base + at)
                at = chunk.find(tag, at + 1)

    def between(self, edges: np.ndarray) -> np.ndarray:
        """(n + 1,) places in order -> (n,) images between each and the next."""
        counts = [np.diff(np.searchsorted(np.array(places, np.int64), edges)) for places in self.places]
        return np.maximum(*counts)


class _ListScanner:
    """Commas between the elements of a list, and the bytes in strings before each."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.depth = 1
        self.opened: int | None = None  # the quote of the string in which the last piece ended
        self.said = 0  # bytes in strings so far
        self.end: int | None = None  # of the list
        self.after: int | None = None  # a first byte behind it that is not space
        self.edges: list[np.ndarray] = []
        self.bytes_before: list[np.ndarray] = []
        self.tags = _Tags()

    def feed(self, base: int, chunk: bytes) -> None:
        """The next piece of the file, which begins at `base`."""
        if self.end is not None:
            self._look_behind(base, chunk)
            return
        self.tags.feed(base, chunk)
        kinds = np.frombuffer(chunk.translate(bytes(_TABLE)), np.uint8)  # (bytes,)
        places = np.flatnonzero(kinds)
        kinds = kinds[places]  # (places,): quotes, brackets, commas alone
        kept = ~_escaped(chunk, places, kinds)
        places, kinds = places[kept], kinds[kept]
        is_quote = kinds == QUOTE
        # Behind an even number of quotes, that of the piece before counted in, a place is outside of strings.
        outside = (np.cumsum(is_quote) + (self.opened is not None)) % 2 == 0
        closes, said = self._strings(places[is_quote] + base)
        places, kinds = places[~is_quote & outside], kinds[~is_quote & outside]
        depth = self.depth + np.cumsum(np.where(kinds == OPEN, 1, np.where(kinds == CLOSE, -1, 0)))
        if (over := np.flatnonzero(depth == 0)).size:
            last = int(over[0])
            self.end = base + int(places[last])
            self._look_behind(base + int(places[last]) + 1, chunk[places[last] + 1 :])
            places, kinds, depth = places[:last], kinds[:last], depth[:last]
        self.depth = 0 if self.end is not None else int(depth[-1]) if depth.size else self.depth
        edges = places[(kinds == COMMA) & (depth == 1)] + base
        if self.end is not None:
            edges = np.append(edges, self.end)
        self.edges.append(edges)
        before = np.concatenate([[self.said], self.said + np.cumsum(said)])  # (strings + 1,) bytes before each
        self.bytes_before.append(before[np.searchsorted(closes, edges)])
        self.said = int(before[-1])

    def _strings(self, quotes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where strings end, and how long they are."""
        if self.opened is not None:
            quotes = np.concatenate([[self.opened], quotes])
        self.opened = int(quotes[-1]) if len(quotes) % 2 else None
        quotes = quotes[: len(quotes) // 2 * 2].reshape(-1, 2)  # (quotes,) -> (strings, 2): where each begins and ends
        return quotes[:, 1], quotes[:, 1] - quotes[:, 0] - 1

    def _look_behind(self, base: int, chunk: bytes) -> None:
        if self.after is None and (rest := chunk.lstrip(b" \t\r\n")):
            self.after = base + len(chunk) - len(rest)

    def finish(self, path: Path) -> Arrays:
        """The records, once all was fed; `DataError` for a list that is broken off or followed by more."""
        edges = np.concatenate(self.edges) if self.edges else np.zeros(0, np.int64)
        is_open = self.end is None or (len(edges) > 0 and _is_blank(path, edges, self.start))
        if is_open and self.end is not None and len(edges) == 1:
            edges, is_open = edges[:0], False  # nothing between the brackets
        if is_open or self.after is not None:
            record = len(edges) + (self.end is None)
            at = path.stat().st_size if self.end is None else self.after or self.end
            raise DataError(f"{record}: not JSON: the list is broken off or followed by more at byte {at}")
        before = np.concatenate(self.bytes_before)[: len(edges)]
        starts = np.concatenate([[self.start], edges[:-1] + 1])[: len(edges)]  # (records,), as `edges`
        images = self.tags.between(np.concatenate([starts, [self.end]]))
        return {"spans": np.stack([starts, edges], axis=1), "text": np.diff(before, prepend=0), "images": images}


def _is_blank(path: Path, edges: np.ndarray, start: int) -> bool:
    """Whether nothing stands before the list's end, or behind its last comma."""
    first = int(edges[-2]) + 1 if len(edges) > 1 else start
    with path.open("rb") as file:
        file.seek(first)
        return not file.read(int(edges[-1]) - first).strip()


def _escaped(chunk: bytes, places: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Which of the places are quotes behind an odd number of backslashes."""
    text = np.frombuffer(chunk, np.uint8)
    escaped = np.zeros(len(places), bool)
    rest = np.flatnonzero((kinds == QUOTE) & (places > 0))
    rest, distance = rest[text[places[rest] - 1] == ord("\\")], 1
    while rest.size:
        escaped[rest] ^= True
        distance += 1
        rest = rest[places[rest] >= distance]
        rest = rest[text[places[rest] - distance] == ord("\\")]
    return escaped
