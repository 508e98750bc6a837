"""The one way an image enters: `load_image` for training, evaluation, serving and the demo.

It differs from `PIL.Image.open(path).convert("RGB")` in what it promises: a fresh RGB image, upright, on
white, with every grey level kept, or one `ImageError` that names the file and the reason; and a bound on time and
memory, whatever the file (`ImageLimits`).

PIL reports odd metadata through `warnings`, whose filters belong to the whole process and cannot be changed
safely under threads. So nothing here changes them: PIL is kept from seeing what it warns about. Each file
goes straight to the one decoder that its first bytes name (`Image.open` warns about size, and `exif_transpose` about
damaged entries), and what pixels do not need is removed first (`headers`).
"""

import base64
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from acformer.errors import ImageError
from acformer.images.headers import HEADERS, orientation
from acformer.images.stored import StoredImage

FileSource = str | os.PathLike[str] | bytes | BinaryIO | StoredImage
ImageSource = FileSource | Image.Image


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost, checked while reading and from the header, before any pixel is decoded.

    max_pixels: 64 million, the largest camera sensors in common use (256 MB as RGB in PIL). PIL's own limits stay in
        force above it: it warns from 89 and refuses from 179 million.
    max_bytes: 64 MiB, some way above a 64-megapixel JPEG of top quality.
    max_aspect_ratio: longer side over shorter side. At 100 an image padded to the 336-pixel square of CLIP
        still has 3 pixels across; beyond it nothing is left to see.
    max_scans: of a progressive JPEG, each of which goes over the whole image; encoders write about ten.

    Whatever the file, reading it holds at most 20 bytes for each of `max_pixels` and 4 times `max_bytes` (1.5 GB; an
    ordinary 12-megapixel photograph takes 100 MB), and takes at most 15 seconds of one core. To that end the limits of
    `acformer.images.headers` hold too: 100,000 chunks, segments, blocks or tiles, tiles in proportion to the image.
    """

    max_pixels: int = 64_000_000
    max_bytes: int = 64 * 2**20
    max_aspect_ratio: float = 100.0
    max_scans: int = 100


DEFAULT_LIMITS = ImageLimits()


def load_image(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Read `source` completely and return a new image of mode RGB, size (width, height) as seen upright.

    `source` is a path, the file's bytes, a `data:image/...;base64,` URL, a binary file object (read from where it
    stands, not closed), a member of an archive (`StoredImage`), or an image that PIL has opened or made: then the same
    pixels come out as of its file, and it stays as it is.
    PNG, JPEG, WEBP, GIF, BMP and TIFF are known by their first bytes, whatever the file is called. Of an
    animation or a multi-page file, the first frame. EXIF orientation is applied, transparency shows white,
    CMYK is converted, colour profiles are ignored. Grey of 16 bits is divided by 257; 32-bit integer grey is
    read as 0..65535 and float as 0..1, or, with a value outside, stretched from its own least to greatest.

    Nothing of the file's metadata stays on the image. Safe in threads and forked workers.

    Raises `ImageError`, "<reason>: <file>", for everything else: no such file, a URL, not one of the formats,
    over `limits`, truncated, damaged. The decoder's own exception is its `__cause__`.
    """
    with _naming(source):
        if isinstance(source, Image.Image):
            return _convert(source, limits)
        return _decode(_read(source, limits.max_bytes), limits)


def image_bytes(source: FileSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """The file as `load_image` reads it, undecoded; `ImageError` for none, or one over `limits.max_bytes`."""
    with _naming(source):
        return _read(source, limits.max_bytes)


@contextmanager
def _naming(source: ImageSource) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{error}: {_name(source)}") from error.__cause__


def _name(source: ImageSource) -> str:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    attribute = "filename" if isinstance(source, Image.Image) else "name"
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, attribute, None)
    name = str(source) if isinstance(source, StoredImage) else name
    if not isinstance(name, (str, os.PathLike)) or not name:
        return f"<{type(source).__name__}>"
    if isinstance(name, str) and _is_data_url(name):
        return f"<data: URL of {len(name)} characters>"
    text = repr(os.fsdecode(name))[1:-1]  # one line, whatever characters the name holds
    return text if len(text) <= 200 else text[:197] + "..."


# Reading, never more than max_bytes + 1.


def _read(source: FileSource, max_bytes: int) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source[: max_bytes + 1])
    elif isinstance(source, (str, os.PathLike)):
        data = _read_path(source, max_bytes + 1)
    elif isinstance(source, StoredImage):
        data = source.read(max_bytes + 1)
    elif callable(getattr(source, "read", None)):
        data = _read_file(source, max_bytes + 1)
    else:
        raise ImageError(f"expected a path, bytes, a binary file or a PIL image, got {type(source).__name__}")
    if len(data) > max_bytes:
        raise ImageError(f"larger than the limit of {max_bytes:,} bytes")
    if not data:
        raise ImageError("empty file")
    return data


def _read_path(path: str | os.PathLike[str], size: int) -> bytes:
    if isinstance(path, str) and _is_data_url(path):
        return _read_data_url(path, size)
    if isinstance(path, str) and re.match(r"[a-z][a-z0-9+.-]*://", path, re.IGNORECASE):
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


def data_url_bytes(url: str) -> bytes:
    """The file in a `data:image/...;base64,` URL; `ImageError` for another one. Its size is checked when it is read."""
    return _read_data_url(url, DEFAULT_LIMITS.max_bytes + 1)


def _is_data_url(text: str) -> bool:
    return text[:5].lower() == "data:"


def _read_data_url(url: str, size: int) -> bytes:
    """What it holds, `size` bytes at most; what its header calls the format is not believed."""
    header, comma, content = url.partition(",")
    if not comma or not re.fullmatch(r"data:image/[a-z0-9.+-]+;base64", header, re.IGNORECASE):
        raise ImageError("not a data:image/...;base64, URL")
    try:
        return base64.b64decode(content[: -(-size // 3) * 4], validate=True)[:size]  # 4 characters for 3 bytes
    except ValueError as error:
        raise ImageError("not base64") from error


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


_DECODERS: dict[str, Callable[[BytesIO], ImageFile.ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}
# EXIF orientations 2 to 8, and how each is undone; 1 and anything else is upright.
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_UPRIGHT = {code: Image.Transpose[turn] for code, turn in enumerate(_TURNS.split(), start=2)}
_BAND = 2**20  # pixels that are converted at once where that takes more memory than the result


def _decode(data: bytes, limits: ImageLimits) -> Image.Image:
    kind = next((kind for kind, (start, _) in HEADERS.items() if re.match(start, data)), None)
    if kind is None:
        raise ImageError("not a PNG, JPEG, WEBP, GIF, BMP or TIFF image")
    _refuse_truncated_images()
    with _decoding(kind):
        header = HEADERS[kind][1](data)
        if header.size is not None:
            _check_size(header.size, limits)
        if header.scans > limits.max_scans:
            raise ImageError(f"{header.scans} scans are over the limit of {limits.max_scans}")
        image = _DECODERS[kind](BytesIO(header.data))
        _check_size(image.size, limits)
        key = _colour_key(image)
        image.load()
        exif = header.exif or image.info.get("exif", b"")
        rgb = _rgb(image, key)
        del image  # its memory goes before the turned copy is made
        return _turned(rgb, exif)


def _convert(image: Image.Image, limits: ImageLimits) -> Image.Image:
    """As `_decode`, of what PIL has opened, or made."""
    if isinstance(image, ImageFile.ImageFile):
        _refuse_truncated_images()
    with _decoding(image.format or image.mode):
        _check_size(image.size, limits)
        key = _colour_key(image)
        image.load()
        return _turned(_rgb(image, key), image.info.get("exif", b""))


def _refuse_truncated_images() -> None:
    if ImageFile.LOAD_TRUNCATED_IMAGES:  # another library's doing, not ours to undo under its threads
        raise ImageError(
            "set PIL.ImageFile.LOAD_TRUNCATED_IMAGES to False: with it PIL fills what a damaged file lacks with grey "
            "instead of an error, here in"
        )


@contextmanager
def _decoding(what: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise ImageError("too large to decode") from error
    # PIL's decoders raise SyntaxError, RuntimeError, ValueError, struct.error, zlib.error, OverflowError and
    # more on damaged input: one per cent of mutated files. No list is complete, and each means the same.
    except Exception as error:
        raise ImageError(f"truncated, damaged or unsupported {what}") from error


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if not width * height:
        raise ImageError("an image without pixels")
    if width * height > limits.max_pixels:
        raise ImageError(f"{width} x {height} is over the limit of {limits.max_pixels:,} pixels")
    if max(size) > limits.max_aspect_ratio * min(size):
        raise ImageError(f"{width} x {height} is over the aspect ratio limit of {limits.max_aspect_ratio:g}")


def _turned(rgb: Image.Image, exif: bytes) -> Image.Image:
    turn = _UPRIGHT.get(orientation(exif))
    return rgb if turn is None else rgb.transpose(turn)


def _colour_key(image: Image.Image) -> Any:
    """The sample or palette entry that is transparent, as the decoded image has it."""
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    raw = tiles[0].args if image.format == "PNG" and tiles else None  # before decoding, PIL knows the file's depth
    if raw in ("L;2", "L;4") and isinstance(key, int):
        return key * (85 if raw == "L;2" else 17)  # PIL scales samples to 8 bits,
    if raw == "RGB;16B" and isinstance(key, tuple):
        return tuple(sample >> 8 for sample in key)  # but not the key to match them
    return key


def _rgb(image: Image.Image, key: Any) -> Image.Image:
    """A new image; what needs more than its 4 bytes a pixel on the way is done a band of rows at a time."""
    if image.mode.startswith("I") or image.mode == "F":
        convert = _grey_converter(image, key)
    elif image.has_transparency_data:
        convert = partial(_on_white, key=key)
    else:
        rgb = image.convert("RGB")
        rgb.info.clear()  # its EXIF would turn the image a second time
        return rgb
    rgb = Image.new("RGB", image.size)
    for top, band in _bands(image):
        rgb.paste(convert(band), (0, top))
    return rgb


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(first row, rows) from top to bottom."""
    width, height = image.size
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _on_white(band: Image.Image, key: Any) -> Image.Image:
    if key is not None:
        band.info["transparency"] = key
    rgba = band.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _grey_converter(image: Image.Image, key: Any) -> Callable[[Image.Image], Image.Image]:
    """From a band of deep grey to RGB: by a table of the 65,536 values, or by the range of the whole image."""
    if image.mode.startswith("I;16"):
        table = (np.arange(65536) / 257).round().astype(np.uint8)
        if isinstance(key, int):
            table[key & 65535] = 255
        return lambda band: Image.fromarray(table[np.asarray(band)])
    low, high = _range(image)
    return lambda band: _stretched(band, low, high, key)


@np.errstate(all="ignore")  # a signalling NaN makes the casts warn
def _range(image: Image.Image) -> tuple[float, float]:
    """What is black and what is white: 0 and 65535, or 0 and 1 of float, or the extremes where one lies outside."""
    low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
    least, greatest = np.inf, -np.inf
    for _, band in _bands(image):
        values = np.asarray(band)
        finite = values[np.isfinite(values)]
        if finite.size:
            least, greatest = min(least, float(finite.min())), max(greatest, float(finite.max()))
    return (least, greatest) if least < low or greatest > high else (low, high)


@np.errstate(all="ignore")
def _stretched(band: Image.Image, low: float, high: float, key: Any) -> Image.Image:
    values = np.asarray(band).astype(np.float64)
    transparent = values == (np.nan if key is None else key)
    values -= low
    values *= 255 / ((high - low) or 1.0)
    grey = np.nan_to_num(values.clip(0, 255)).round().astype(np.uint8)
    grey[transparent] = 255
    return Image.fromarray(grey)
