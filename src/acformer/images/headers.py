"""What the first bytes of an image file say, read before any decoder is: its size, its scans, and how much to keep.

A decoder is given the parts of a file that its pixels need and nothing else: metadata is where PIL warns, and where a
small file can hold millions of parts that a loop in Python walks through. What the header announces is held against
limits here, so that no file costs more than its pixels and its bytes justify.
"""

import re
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from PIL import TiffTags

from acformer.errors import ImageError

MAX_PARTS = 100_000
"""Chunks of a PNG, segments of a JPEG, blocks of a GIF, tiles of a TIFF: 64 MiB in parts of 1 kB are 65,536."""
MAX_RLE_BYTES = 8 * 2**20
"""Of a run-length encoded BMP, which PIL decodes in Python at 2 to 4 MB a second."""
MAX_TILE = 4096 * 4096
"""Pixels of a TIFF's tile that need not be in proportion to the image."""


class Header(NamedTuple):
    """A file as its decoder gets it, and what to check first.

    data: the file without what its pixels do not need. exif: the EXIF block, where the decoder does not find it.
    size: (width, height), where the decoder would make room for them on opening. scans: how often the decoder goes
    over the whole image.
    """

    data: bytes
    exif: bytes = b""
    size: tuple[int, int] | None = None
    scans: int = 1


def _count(parts: int, kind: str) -> int:
    if parts >= MAX_PARTS:
        raise ImageError(f"{kind} of more than {MAX_PARTS:,} parts")
    return parts + 1


def _png(data: bytes) -> Header:
    """The chunks that hold pixels, transparency and EXIF: no animation, text or profile."""
    kept, at, parts = [data[:8]], 8, 0
    while at < len(data):
        parts = _count(parts, "PNG")
        end = at + 12 + int.from_bytes(data[at : at + 4])
        name = data[at + 4 : at + 8]
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf") or len(name) < 4:
            kept.append(data[at:end])
        at = end
    return Header(b"".join(kept))


# A marker of JPEG: neither an escaped 255, nor filling, nor a restart inside of a scan.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_ALONE, _END, _SCAN, _EXIF = (0x01, 0xD8), 0xD9, 0xDA, 0xE1
_TABLES = {*range(0xC0, 0xD0), 0xDB, 0xDD, 0xE0, 0xEE}  # frame, Huffman, quantisation, restarts, JFIF, Adobe


def _jpeg(data: bytes) -> Header:
    """The tables before the first scan and everything from there on, of which the scans are counted."""
    kept, exif, scans, at, parts, start = [data[:2]], b"", 0, 2, 0, len(data)
    while found := _MARKER.search(data, at):
        parts = _count(parts, "JPEG")
        marker, at = data[found.end() - 1], found.end()
        if marker == _END:
            break
        if marker in _ALONE:
            continue
        end = at + max(2, int.from_bytes(data[at : at + 2]))
        if marker == _SCAN:
            start, scans = min(start, found.start()), scans + 1
        elif marker == _EXIF and data.startswith(b"Exif\0\0", at + 2):
            exif = exif or data[at + 2 : end]
        elif marker in _TABLES and not scans:
            kept.append(data[found.start() : end])
        at = end
    return Header(b"".join([*kept, data[start:]]), exif, scans=scans)


_GIF_BLOCK = re.compile(rb"[!,;]")  # extension, frame, end; whatever lies between is passed over, as PIL does


def _gif(data: bytes) -> Header:
    """Screen, palette and the first frame with its transparency; PIL stretches the screen to hold the frame."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (6 << (flags & 7) if flags & 128 else 0)
    kept, parts = [data[:at]], 0
    while (found := _GIF_BLOCK.search(data, at)) and found[0] != b";":
        start = found.start()
        if found[0] == b",":
            x, y, frame_width, frame_height = struct.unpack_from("<4H", data, start + 1)
            size = max(width, x + frame_width), max(height, y + frame_height)
            return Header(b"".join([*kept, data[start:]]), size=size)
        at, parts = start + 2, _count(parts, "GIF")
        while data[at]:  # blocks of an extension, until an empty one
            at, parts = at + data[at] + 1, _count(parts, "GIF")
        if data[start + 1] == 0xF9:
            kept.append(data[start : at + 1])
    raise ImageError("truncated or damaged GIF")


def _webp(data: bytes) -> Header:
    kind, body = data[12:16], data[20:30]
    size = None
    if kind == b"VP8X":
        size = int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    elif kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        size = width & 0x3FFF, height & 0x3FFF
    return Header(data, size=size)


def _bmp(data: bytes) -> Header:
    header, compression = struct.unpack_from("<I", data, 14)[0], int.from_bytes(data[30:34], "little")
    if header >= 40 and compression in (1, 2) and len(data) > MAX_RLE_BYTES:
        raise ImageError(f"run-length encoded BMP of more than {MAX_RLE_BYTES:,} bytes")
    return Header(data)


# TIFF, and EXIF, which is one.


def _order(tiff: bytes) -> str:
    return "<" if tiff[:1] == b"I" else ">"


def _entries(tiff: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(tag, type, count, value or offset) of each entry in the first directory of a TIFF or EXIF block."""
    (at,) = struct.unpack_from(_order(tiff) + "I", tiff, 4)
    (count,) = struct.unpack_from(_order(tiff) + "H", tiff, at)
    for i in range(count):
        yield struct.unpack_from(_order(tiff) + "HHI4s", tiff, at + 2 + 12 * i)


def orientation(exif: bytes) -> int:
    """1 to 8 as EXIF has it; 1, upright, where there is none."""
    exif = exif.removeprefix(b"Exif\0\0")
    try:
        value = next(value for tag, kind, _, value in _entries(exif) if (tag, kind) == (274, 3))
        return int(struct.unpack(_order(exif) + "H", value[:2])[0])
    except (StopIteration, struct.error):
        return 1  # damaged EXIF is no reason to refuse whole pixels


# Layout, compression, colour map, samples, tiles, YCbCr; not the orientation, which is applied by the caller.
_TIFF_TAGS = {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325}
_TIFF_TAGS |= {332, 338, 339, 347, *range(512, 522), 529, 530, 531, 532}
_TIFF_TYPES = {1: "B", 2: "c", 3: "H", 4: "I", 5: "II", 6: "b", 7: "c", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d"}
_TIFF_TYPES |= {13: "I", 16: "Q"}
_BYTES = {1, 2, 7}
_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 322, 323
_STRIP_BYTES, _TILE_BYTES = 279, 325
_MEASURES = {_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _STRIP_BYTES, _TILE_BYTES}


def _tiff(data: bytes) -> Header:
    """The same file with one directory, holding only the tags that pixels need, each once and inside the file."""
    order, total = _order(data), 0
    kept: dict[int, bytes] = {}
    numbers: dict[int, tuple[int, ...]] = {}
    (start,) = struct.unpack_from(order + "I", data, 4)
    for tag, kind, count, value in _entries(data):
        if tag not in _TIFF_TAGS or tag in kept or kind not in _TIFF_TYPES:
            continue
        size = count * struct.calcsize("=" + _TIFF_TYPES[kind])
        total += size if size > 4 else 0
        at = struct.unpack(order + "I", value)[0] if size > 4 else 0
        if max(at + size, total) > len(data) or (kind != 7 and TiffTags.lookup(tag).length == 1 and count != 1):
            raise ImageError("truncated or damaged TIFF")
        if kind not in _BYTES and count > MAX_PARTS:
            raise ImageError(f"TIFF of more than {MAX_PARTS:,} parts")
        if tag in _MEASURES:
            numbers[tag] = struct.unpack_from(order + _TIFF_TYPES[kind] * count, data if at else value, at)
        kept[tag] = struct.pack(order + "HHI4s", tag, kind, count, value)
    _check_tiles(numbers, len(data))
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept.values()) + bytes(4)
    return Header(data[:start] + directory + data[start + len(directory) :], exif=data)


def _check_tiles(numbers: dict[int, tuple[int, ...]], size: int) -> None:
    """Tiles are not much larger than the image that they make up, and strips do not overlap by much."""
    first = {tag: values[0] for tag, values in numbers.items() if values}
    width, height, tile_width, tile_height = (first.get(tag, 0) for tag in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT))
    if tile_width * tile_height > max(MAX_TILE, 4 * width * height):
        raise ImageError(f"tiles of {tile_width} x {tile_height} for an image of {width} x {height}")
    if max(sum(numbers.get(tag, ())) for tag in (_STRIP_BYTES, _TILE_BYTES)) > 2 * size:
        raise ImageError("truncated or damaged TIFF")


HEADERS: dict[str, tuple[bytes, Callable[[bytes], Header]]] = {
    "PNG": (rb"\x89PNG\r\n\x1a\n", _png),
    "JPEG": (rb"\xff\xd8\xff", _jpeg),
    "WEBP": (rb"(?s)RIFF....WEBP", _webp),
    "GIF": (rb"GIF8[79]a", _gif),
    "BMP": (rb"BM", _bmp),
    "TIFF": (rb"II\*\0|MM\0\*", _tiff),
}
"""How each format's files begin, and who reads their header."""
