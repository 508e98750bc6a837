"""The one way a picture enters: `load_image` for training, evaluation, serving and the demo.

It differs from `PIL.Image.open(path).convert("RGB")` in what it promises: a fresh RGB image, upright, on
white, with every grey level kept, or one `ImageError` that names the file and the reason.

PIL reports odd metadata through `warnings`, whose filters belong to the whole process and cannot be changed
safely under threads. So nothing here changes them: PIL is kept from seeing what it warns about. Each file
goes straight to the one decoder that its first bytes name (`Image.open` warns about size and tries others),
and the metadata that pixels do not need is removed first.
"""

import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, TiffTags
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from acformer.errors import ImageError

ImageSource = str | os.PathLike[str] | bytes | BinaryIO


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may cost, checked while reading and from the header, before any pixel is decoded.

    max_pixels: 64 million, the largest camera sensors in common use (192 MB as RGB). PIL's own limits stay in
        force above it: it warns from 89 and refuses from 179 million.
    max_bytes: 64 MiB, some way above a 64-megapixel JPEG of top quality.
    max_aspect_ratio: longer side over shorter side. At 100 a picture padded to the 336-pixel square of CLIP
        still has 3 pixels across; beyond it nothing is left to see.
    """

    max_pixels: int = 64_000_000
    max_bytes: int = 64 * 2**20
    max_aspect_ratio: float = 100.0


DEFAULT_LIMITS = ImageLimits()


def load_image(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Read `source` completely and return a new image of mode RGB, size (width, height) as seen upright.

    `source` is a path, the file's bytes, or a binary file object (read from where it stands, not closed).
    PNG, JPEG, WEBP, GIF, BMP and TIFF are known by their first bytes, whatever the file is called. Of an
    animation or a multi-page file, the first picture. EXIF orientation is applied, transparency shows white,
    CMYK is converted, colour profiles are ignored. Grey of 16 bits is divided by 257; 32-bit integer grey is
    read as 0..65535 and float as 0..1, or, with a value outside, stretched from its own least to greatest.

    Nothing of the file's metadata stays on the image. Safe in threads and forked workers.

    Raises `ImageError`, "<reason>: <file>", for everything else: no such file, a URL, not one of the formats,
    over `limits`, truncated, damaged. The decoder's own exception is its `__cause__`.
    """
    try:
        return _decode(_read(source, limits.max_bytes), limits)
    except ImageError as error:
        raise ImageError(f"{error}: {_name(source)}") from error.__cause__


def _name(source: ImageSource) -> str:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None)
    if not isinstance(name, (str, os.PathLike)):
        return f"<{type(source).__name__}>"
    text = repr(os.fsdecode(name))[1:-1]  # one line, whatever characters the name holds
    return text if len(text) <= 200 else text[:197] + "..."


# Reading, never more than max_bytes + 1.


def _read(source: ImageSource, max_bytes: int) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source[: max_bytes + 1])
    elif isinstance(source, (str, os.PathLike)):
        data = _read_path(source, max_bytes + 1)
    elif callable(getattr(source, "read", None)):
        data = _read_file(source, max_bytes + 1)
    else:
        raise ImageError(f"expected a path, bytes or a binary file, got {type(source).__name__}")
    if len(data) > max_bytes:
        raise ImageError(f"larger than the limit of {max_bytes:,} bytes")
    if not data:
        raise ImageError("empty file")
    return data


def _read_path(path: str | os.PathLike[str], size: int) -> bytes:
    if isinstance(path, str) and re.match(r"[a-z][a-z0-9+.-]*://|data:", path, re.IGNORECASE):
        raise ImageError("remote URLs are off, download it first")
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as file:
                return file.read(size)
    except OSError as error:
        raise ImageError(f"cannot be read ({(error.strerror or 'input error').lower()})") from error
    except ValueError as error:
        raise ImageError("not a file name") from error
    raise ImageError("a directory or device, not a file")  # a pipe would block, a device never end


def _read_file(file: BinaryIO, size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0:
        try:
            part = file.read(size)
        except Exception as error:  # a stranger's object: closed, a broken connection, a decoder of its own
            raise ImageError("cannot be read") from error
        if not isinstance(part, bytes):
            raise ImageError("not open in binary mode, or not blocking")
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# From bytes to pixels.


class _Jpeg(JpegImageFile):
    """JPEG without PIL's EXIF reader, which runs on opening and warns about damaged entries."""

    def getexif(self) -> Image.Exif:
        """Empty; the orientation is read by `_orientation`."""
        return Image.Exif()


# How each format's files begin, and its one decoder.
_FORMATS: dict[str, tuple[bytes, Callable[[BytesIO], ImageFile.ImageFile]]] = {
    "PNG": (rb"\x89PNG\r\n\x1a\n", PngImageFile),
    "JPEG": (rb"\xff\xd8\xff", _Jpeg),
    "WEBP": (rb"(?s)RIFF....WEBP", WebPImageFile),
    "GIF": (rb"GIF8[79]a", GifImageFile),
    "BMP": (rb"BM", BmpImageFile),
    "TIFF": (rb"II\*\0|MM\0\*", TiffImageFile),
}
# EXIF orientations 2 to 8, and how each is undone; 1 and anything else is upright.
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_UPRIGHT = {code: Image.Transpose[turn] for code, turn in enumerate(_TURNS.split(), start=2)}


def _decode(data: bytes, limits: ImageLimits) -> Image.Image:
    kind = next((kind for kind, (start, _) in _FORMATS.items() if re.match(start, data)), None)
    if kind is None:
        raise ImageError("not a PNG, JPEG, WEBP, GIF, BMP or TIFF image")
    if ImageFile.LOAD_TRUNCATED_IMAGES:  # another library's doing, not ours to undo under its threads
        raise ImageError("set PIL.ImageFile.LOAD_TRUNCATED_IMAGES to False: it hides damage as grey, here in")
    try:
        image = _open(data, kind, limits)
        _check_size(image.size, limits)
        image.load()
        exif = data if kind == "TIFF" else image.info.get("exif", b"")
        upright = _UPRIGHT.get(_orientation(exif))
        rgb = _rgb(image) if upright is None else _rgb(image).transpose(upright)
        rgb.info.clear()  # its EXIF would turn the image a second time
        return rgb
    except ImageError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise ImageError("too large to decode") from error
    # PIL's decoders raise SyntaxError, RuntimeError, ValueError, struct.error, zlib.error, OverflowError and
    # more on damaged input: one per cent of mutated files. No list is complete, and each means the same.
    except Exception as error:
        raise ImageError(f"truncated, damaged or unsupported {kind}") from error


def _open(data: bytes, kind: str, limits: ImageLimits) -> ImageFile.ImageFile:
    """The decoder with its header read and no pixel decoded."""
    if kind == "GIF":
        _check_size(_gif_size(data), limits)
    slim = {"PNG": _slim_png, "TIFF": _slim_tiff}.get(kind, bytes)
    image = _FORMATS[kind][1](BytesIO(slim(data)))
    key = image.info.get("transparency")
    if kind == "PNG" and key and image.mode == "L" and data[24] < 8:
        image.info["transparency"] = key * (255 // (2 ** data[24] - 1))  # PIL scales samples to 8 bits,
    elif kind == "PNG" and key and image.mode == "RGB" and data[24] == 16:
        image.info["transparency"] = tuple(sample >> 8 for sample in key)  # but not the key to match them
    return image


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageError(f"{width} x {height} is over the limit of {limits.max_pixels:,} pixels")
    if max(size) > limits.max_aspect_ratio * min(size):
        raise ImageError(f"{width} x {height} is over the aspect ratio limit of {limits.max_aspect_ratio:g}")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _grey(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


@np.errstate(all="ignore")  # a signalling NaN makes the casts warn
def _grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
    finite = values[np.isfinite(values)]
    if finite.size and (finite.min() < low or finite.max() > high):
        low, high = float(finite.min()), float(finite.max())
    transparent = values == image.info.get("transparency", np.nan)
    values -= low
    values *= 255 / ((high - low) or 1.0)
    grey = np.nan_to_num(values.clip(0, 255)).round().astype(np.uint8)
    grey[transparent] = 255
    return Image.fromarray(grey)


# Metadata: what pixels need is kept, what PIL would warn about is not.


def _slim_png(data: bytes) -> bytes:
    """The chunks that hold pixels, transparency and EXIF: no animation, text or profile."""
    kept, at = [data[:8]], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        name = data[at + 4 : at + 8]
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf") or len(name) < 4:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _gif_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the screen, which PIL stretches to hold the first frame."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (6 << (flags & 7) if flags & 128 else 0)
    while data[at] != 0x2C:  # the frame
        at += 1
        if data[at - 1] == 0x21:  # an extension: its label, then blocks until an empty one
            at += 1
            while data[at]:
                at += data[at] + 1
    x, y, frame_width, frame_height = struct.unpack_from("<4H", data, at + 1)
    return max(width, x + frame_width), max(height, y + frame_height)


def _order(tiff: bytes) -> str:
    return "<" if tiff[:1] == b"I" else ">"


def _entries(tiff: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(tag, type, count, value or offset) of each entry in the first directory of a TIFF or EXIF block."""
    (at,) = struct.unpack_from(_order(tiff) + "I", tiff, 4)
    (count,) = struct.unpack_from(_order(tiff) + "H", tiff, at)
    for i in range(count):
        yield struct.unpack_from(_order(tiff) + "HHI4s", tiff, at + 2 + 12 * i)


def _orientation(exif: bytes) -> int:
    exif = exif.removeprefix(b"Exif\0\0")
    try:
        value = next(value for tag, kind, _, value in _entries(exif) if (tag, kind) == (274, 3))
        return int(struct.unpack(_order(exif) + "H", value[:2])[0])
    except (StopIteration, struct.error):
        return 1  # damaged EXIF is no reason to refuse whole pixels


# Layout, compression, colour map, samples, tiles, YCbCr; not the orientation, which is applied here.
_TIFF_TAGS = {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325}
_TIFF_TAGS |= {332, 338, 339, 347, *range(512, 522), 529, 530, 531, 532}
_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}


def _slim_tiff(data: bytes) -> bytes:
    """The same file with one directory, holding only the tags that pixels need, each inside the file."""
    order, kept, total = _order(data), [], 0
    (start,) = struct.unpack_from(order + "I", data, 4)
    for tag, kind, count, value in _entries(data):
        if tag not in _TIFF_TAGS:
            continue
        size = count * _TIFF_BYTES.get(kind, 0)
        total += size if size > 4 else 0
        end = struct.unpack(order + "I", value)[0] + size if size > 4 else 0
        if max(end, total) > len(data) or (kind != 7 and TiffTags.lookup(tag).length == 1 and count != 1):
            raise ImageError("truncated or damaged TIFF")
        kept.append(struct.pack(order + "HHI4s", tag, kind, count, value))
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:start] + directory + data[start + len(directory) :]
