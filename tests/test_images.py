"""`load_image`: one test a promise, by pixel value, and a mutation fuzz: an RGB image or `ImageError`."""

import base64
import os
import random
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, StringIO

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from acformer.errors import ImageError
from acformer.images import ImageLimits, load_image

WHITE, RED, GREEN = (255, 255, 255), (255, 0, 0), (0, 128, 0)
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]


def encode(image, fmt, **options):
    image.save(buffer := BytesIO(), fmt, **options)
    return buffer.getvalue()


def picture(size=(24, 16), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def png(width, height, depth, colour, rows, *chunks):
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    pack = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(pack)


def row(data):
    image = load_image(data)
    return [image.getpixel((x, 0)) for x in range(image.width)]


def near(data, colour, tolerance):
    return np.abs(np.subtract(row(data)[8], colour)).max() <= tolerance


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_by_path_bytes_and_file(fmt, tmp_path):
    original = picture()
    data = encode(original, fmt, **({"lossless": True} if fmt == "WEBP" else {}))
    path = tmp_path / "named.wrong"
    path.write_bytes(data)
    with path.open("rb") as file:
        images = [load_image(s) for s in (path, str(path), data, bytearray(data), BytesIO(data), file)]
        assert not file.closed
    assert all(type(i) is Image.Image and i.mode == "RGB" and not i.info for i in images)
    assert len({i.tobytes() for i in images}) == 1
    if fmt in ("PNG", "WEBP", "BMP", "TIFF"):
        assert images[0].tobytes() == original.tobytes()


def test_each_call_returns_its_own_image():
    data = encode(picture(), "PNG")
    load_image(data).putpixel((0, 0), RED)
    assert load_image(data).tobytes() == picture().tobytes()


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_tiff_compression(compression, mode):
    assert near(encode(Image.new("RGB", (16, 16), GREEN).convert(mode), "TIFF", compression=compression), GREEN, 2)


def test_cmyk_jpeg():
    assert near(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), RED, 3)


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "TIFF", "PNG", "MPO"])
def test_first_frame(fmt):
    first, *others = (Image.new("RGB", (16, 16), c) for c in ("red", "blue", "black"))
    assert near(encode(first, fmt, save_all=True, append_images=others, quality=100), RED, 2)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_as_pil_applies_it(fmt, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    data = encode(picture(), fmt, exif=exif)
    with Image.open(BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    image = load_image(data)
    assert image.tobytes() == expected.tobytes()
    assert image.size == ((16, 24) if orientation >= 5 else (24, 16))
    assert ImageOps.exif_transpose(image).size == image.size, "nothing is left to turn it twice"


@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_on_white(fmt, mode):
    values = [(40, 0), (40, 255), (0, 128)]
    image = Image.new(mode, (3, 1))
    image.putdata([(v,) * (len(mode) - 1) + (a,) for v, a in values])
    exact = {"lossless": True, "exact": True} if fmt == "WEBP" else {}
    assert row(encode(image, fmt, **exact)) == [WHITE, (40,) * 3, (127,) * 3]


@pytest.mark.parametrize(("fmt", "transparency"), [("PNG", 0), ("PNG", b"\0\xff"), ("GIF", 0)])
def test_palette_transparency_on_white(fmt, transparency):
    image = Image.frombytes("P", (2, 1), b"\0\1")
    image.putpalette([*RED, *GREEN])
    assert row(encode(image, fmt, transparency=transparency)) == [WHITE, GREEN]


def test_palette_with_alpha_on_white():
    image = Image.frombytes("RGBA", (2, 1), bytes([*RED, 0, *GREEN, 255]))
    assert row(encode(image.convert("PA"), "TIFF")) == [WHITE, GREEN]


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_key_on_white(depth):
    size = -(-depth // 4)  # bytes of two samples, 0 and 1
    rows = b"\0" + (1 << 8 * size - 2 * depth).to_bytes(size)
    key = (b"tRNS", struct.pack(">H", 1))
    assert row(png(2, 1, depth, 0, rows, key)) == [(0, 0, 0), WHITE]


@pytest.mark.parametrize("depth", [8, 16])
def test_colour_key_on_white(depth):
    samples = [18, 86, 154, 128, 0, 0]
    rows = b"\0" + (bytes(samples) if depth == 8 else struct.pack(">6H", *(s * 256 + 7 for s in samples)))
    key = struct.pack(">3H", *(s if depth == 8 else s * 256 + 7 for s in samples[:3]))
    assert row(png(2, 1, depth, 2, rows, (b"tRNS", key))) == [WHITE, (128, 0, 0)]


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_16_bit_grey(fmt):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert row(encode(Image.fromarray(values), fmt)) == [(v,) * 3 for v in (0, 1, 128, 255)]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (np.int32, [0, 32896, 65535], [0, 128, 255]),
        (np.int32, [-51, 0, 204], [0, 51, 255]),
        (np.int32, [-(2**31), 0, 2**31 - 1], [0, 128, 255]),
        (np.float32, [0.0, 0.5, 0.2], [0, 128, 51]),
        (np.float32, [-2.0, 1.0, 2.0], [0, 191, 255]),
        (np.float32, [7.0, 7.0], [0, 0]),
        (np.float32, [-3e38, 0, 3e38], [0, 128, 255]),
        (np.float32, [np.nan, np.inf, -np.inf], [0, 255, 0]),
    ],
)
def test_32_bit_grey(kind, values, expected):
    assert row(encode(Image.fromarray(np.array([values], kind)), "TIFF")) == [(v,) * 3 for v in expected]


@pytest.mark.parametrize("url", ["http://h/a.png", "HTTPS://h/a", "file:///a", "s3://b/a", "gopher://h/a"])
def test_urls_are_off(url):
    with pytest.raises(ImageError, match="remote URLs are off, download it first: "):
        load_image(url)


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def test_a_data_url_is_its_file():
    clear = encode(Image.new("RGBA", (3, 2), (255, 0, 0, 0)), "PNG")
    for url in (data_url(clear), data_url(clear, "JPEG"), data_url(clear).replace("data:image", "DATA:Image")):
        assert load_image(url).tobytes() == load_image(clear).tobytes()


OTHERS = ["data:image/png", "data:text/plain;base64", "data:", "data:image/png;charset=x;base64"]


@pytest.mark.parametrize("head", OTHERS)
def test_other_data_urls_are_refused(head):
    content = base64.b64encode(encode(Image.new("RGB", (3, 2)), "PNG")).decode()
    with pytest.raises(ImageError, match=r"not a data:image/\.\.\.;base64, URL: <data: URL of \d+ characters>"):
        load_image(f"{head},{content}")
    with pytest.raises(ImageError, match="not a data"):
        load_image(head)


def test_data_urls_have_the_limits_of_files():
    png = encode(Image.new("RGB", (3, 2)), "PNG")
    for size in range(len(png) - 3, len(png)):
        with pytest.raises(ImageError, match=f"larger than the limit of {size} bytes"):
            load_image(data_url(png), limits=ImageLimits(max_bytes=size))
    assert load_image(data_url(png), limits=ImageLimits(max_bytes=len(png))).size == (3, 2)
    with pytest.raises(ImageError, match="pixels: <data: URL"):
        load_image(data_url(encode(Image.new("RGB", (40, 30)), "PNG")), limits=ImageLimits(max_pixels=1000))
    for content in ("%%%%", "abc", "iVBORw0KGgo", "a b=", "\u00e4aaa"):
        with pytest.raises(ImageError, match="not base64"):
            load_image(f"data:image/png;base64,{content}")
    with pytest.raises(ImageError, match="empty"):
        load_image("data:image/png;base64,")


def test_not_a_readable_file(tmp_path):
    (empty := tmp_path / "empty.png").touch()
    os.mkfifo(pipe := tmp_path / "pipe.png")
    (closed := BytesIO(b"x")).close()
    for message, source in [
        (r"cannot be read \(no such file or directory\): .*none\.png", tmp_path / "none.png"),
        (r"a directory or device, not a file", tmp_path),
        (r"a directory or device.*pipe\.png", pipe),
        (r"empty file: .*empty\.png", empty),
        (r"empty file: <0 bytes>", b""),
        (r"not a file name", "a\0b"),
        (r"cannot be read: <BytesIO>", closed),
        (r"not open in binary mode", StringIO("text")),
        (r"expected a path, bytes, a binary file or a PIL image, got int", 0),
    ]:
        with pytest.raises(ImageError, match=message):
            load_image(source)


def test_the_message_is_one_short_line():
    with pytest.raises(ImageError) as caught:
        load_image("two\nlines\ud800" + "x" * 9999)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).encode()) < 300


@pytest.mark.parametrize("data", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"P6 1 1 255 abc"])
def test_other_formats_reach_no_decoder(data, tmp_path):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ImageError, match=r"not a PNG, JPEG, WEBP, GIF, BMP or TIFF image: .*a\.jpg"):
        load_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("fmt", FORMATS)
def test_truncated_is_an_error(fmt):
    data = encode(picture((64, 64)), fmt)
    for part in (0.1, 0.5, 0.9):
        with pytest.raises(ImageError, match=f"truncated.* {fmt}: <") as caught:
            load_image(data[: int(len(data) * part)])
        assert "Error" not in str(caught.value)


def test_a_decoder_that_hides_damage_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES"):
        load_image(encode(picture(), "PNG"))


def test_limits_hold_before_decoding(monkeypatch):
    bomb = png(13000, 13000, 8, 2, b"")
    gif = bytearray(encode(Image.new("P", (4, 4)), "GIF"))
    at = gif.index(b",", 13 + 3)
    gif[at + 5 : at + 9] = b"\x00\x2f\x00\x2f"  # a frame of 12032 x 12032 in a screen of 4 x 4
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for data, limits, message in [
        (bomb, ImageLimits(), "13000 x 13000 is over the limit of 64,000,000 pixels"),
        (bytes(gif), ImageLimits(), "12032 x 12032 is over the limit"),
        (png(30, 20, 8, 2, b""), ImageLimits(max_pixels=599), "30 x 20 is over the limit of 599 pixels"),
        (png(201, 2, 8, 0, b""), ImageLimits(), "201 x 2 is over the aspect ratio limit of 100"),
        (encode(picture(), "PNG"), ImageLimits(max_bytes=99), "larger than the limit of 99 bytes"),
    ]:
        with pytest.raises(ImageError, match=message):
            load_image(data, limits=limits)


def test_bytes_are_bounded_while_reading():
    class Endless:
        given = 0

        def read(self, size):
            self.given += min(size, 1000)
            return b"x" * min(size, 1000)

    with pytest.raises(ImageError, match="larger than the limit of 12,345 bytes: <Endless>"):
        load_image(source := Endless(), limits=ImageLimits(max_bytes=12_345))
    assert source.given == 12_346
    data = encode(picture(), "PNG")
    assert load_image(data, limits=ImageLimits(max_bytes=len(data))).size == (24, 16)


def noisy():
    """Files with sound pixels about whose metadata or size PIL warns."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0e\x01\x02\0\xff\0\0\0\xff\xff\0\0"  # text outside the block
    tiff = bytearray(encode(picture(), "TIFF", description="x" * 50))
    at = tiff.index(struct.pack("<HHI", 270, 2, 51))
    tiff[at + 4 : at + 8] = b"\xff\xff\xff\x7f"
    apng = png(1, 1, 8, 0, b"\0\0", (b"acTL", bytes(8)))
    return {"JPEG": encode(picture(), "JPEG", exif=exif), "TIFF": bytes(tiff), "PNG": apng}


@pytest.mark.parametrize("fmt", ["JPEG", "TIFF", "PNG"])
def test_odd_metadata_neither_warns_nor_costs_the_image(fmt):
    data = noisy()[fmt]
    with warnings.catch_warnings(record=True) as plain:
        warnings.simplefilter("always")
        with Image.open(BytesIO(data)) as opened:
            opened.load()
    assert plain, "PIL warns about this file"
    assert load_image(data).mode == "RGB"  # where a warning is an error


def test_threads():
    before, sources = list(warnings.filters), [*noisy().values(), encode(picture(), "WEBP")]
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(load_image, sources * 50))
    assert {image.mode for image in images} == {"RGB"}
    assert warnings.filters == before


def opened_files():
    """Files of which PIL gives other pixels than `load_image`, in one way or another."""
    exif = Image.Exif()
    exif[274] = 6
    image, clear = picture(), picture().convert("RGBA")
    clear.putalpha(100)
    deep = np.arange(24, dtype=np.uint16)[None] * 2700
    yield from ((f"{f} turned", encode(image, f, exif=exif)) for f in ("JPEG", "PNG", "WEBP", "TIFF"))
    yield from ((f"16-bit {f}", encode(Image.fromarray(deep), f)) for f in ("PNG", "TIFF"))
    yield from ((f"{k.__name__} TIFF", encode(Image.fromarray(deep.astype(k)), "TIFF")) for k in (np.int32, np.float32))
    yield from ((f"clear {f}", encode(clear, f)) for f in ("PNG", "WEBP", "TIFF"))
    yield from ((f"palette {f}", encode(image.convert("P"), f, transparency=3)) for f in ("PNG", "GIF"))
    yield from ((f"CMYK {f}", encode(image.convert("CMYK"), f)) for f in ("JPEG", "TIFF"))
    yield from ((f"{m} PNG", encode(image.convert(m), "PNG")) for m in ("1", "L", "LA", "P"))
    yield "1-bit BMP", encode(image.convert("1"), "BMP")
    yield "MPO", encode(image, "MPO", save_all=True, append_images=[picture(seed=1)])
    yield "GIF of two frames", encode(image, "GIF", save_all=True, append_images=[picture(seed=1)])


@pytest.mark.parametrize(("name", "data"), [*opened_files()], ids=lambda value: value if isinstance(value, str) else "")
def test_an_image_that_pil_has_opened_gives_the_pixels_of_its_file(name, data):
    expected = load_image(data)
    opened = Image.open(BytesIO(data))
    before = dict(opened.info)
    assert load_image(opened).tobytes() == expected.tobytes()
    assert opened.info.items() >= before.items(), "it stays as it is"
    again = load_image(opened)  # now decoded
    assert (again.tobytes(), again.size, again.mode, again.info) == (expected.tobytes(), expected.size, "RGB", {})
    assert load_image(opened.copy()).tobytes() == expected.tobytes()
    assert load_image(expected).tobytes() == expected.tobytes()
    assert load_image(expected) is not expected


@pytest.mark.parametrize(
    ("depth", "colour", "rows", "key"),
    [(2, 0, b"\0\x60", b"\0\1"), (4, 0, b"\0\x12", b"\0\1"), (16, 2, bytes(range(13)), bytes(range(1, 7)))],
)
def test_the_colour_key_of_a_png_that_pil_has_opened(depth, colour, rows, key):
    data = png(2, 1, depth, colour, rows, (b"tRNS", key))
    assert WHITE in row(data)
    assert load_image(Image.open(BytesIO(data))).tobytes() == load_image(data).tobytes()


def test_an_opened_image_that_cannot_be_used(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(encode(picture((64, 64)), "PNG")[:-500])
    with pytest.raises(ImageError, match=r"truncated.* PNG: .*cut\.png"), Image.open(path) as opened:
        load_image(opened)
    with pytest.raises(ImageError, match="30 x 20 is over the limit of 599 pixels: <Image>"):
        load_image(picture((30, 20)), limits=ImageLimits(max_pixels=599))
    with pytest.raises(ImageError, match="without pixels"):
        load_image(Image.new("RGB", (0, 3)))


def progressive(size, scans):
    """A progressive JPEG whose last scan is there so many times."""
    data = encode(Image.new("L", size, 128), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * scans + data[-2:]


def tiff(*entries, data=b""):
    """One directory of (tag, kind, count, value), then data."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + packed + bytes(4) + data


def tiled(tile, size=(16, 16)):
    strip = zlib.compress(bytes(1000))
    at = 8 + 2 + 12 * 11 + 4
    layout = [(256, 4, 1, size[0]), (257, 4, 1, size[1]), (322, 4, 1, tile[0]), (323, 4, 1, tile[1])]
    pixels = [(258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1), (284, 3, 1, 1)]
    return tiff(*layout, *pixels, (324, 4, 1, at), (325, 4, 1, len(strip)), data=strip)


def overlapping(strips=2000, size=2_000_000):
    """Strips of one row that all begin at one place and claim the whole file."""
    at = 8 + 2 + 12 * 9 + 4
    pixels = [(256, 4, 1, 100), (257, 4, 1, strips), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    table = struct.pack(f"<{2 * strips}I", *[at + 8 * strips] * strips, *[size] * strips)
    arrays = [(273, 4, strips, at), (278, 4, 1, 1), (279, 4, strips, at + 4 * strips)]
    return tiff(*pixels, *arrays, data=table + zlib.compress(bytes(100)) + bytes(size))


def within(data, at, part, count):
    return data[:at] + part * count + data[at:]


def rle_bmp(body):
    head = struct.pack("<IiiHHIIiiII", 40, 100, 100, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + head + bytes(1024) + body


def webp_header(width, height):
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas


BIG = 2**20
COSTLY = {
    "scans": (lambda: progressive((2000, 2000), 1600), "scans are over the limit of 100"),
    "90 scans": (lambda: progressive((2000, 2000), 85), None),
    "segments": (lambda: within(encode(picture(), "JPEG"), 2, b"\xff\xfe\0\2", 8 * BIG), "JPEG of more than"),
    "filling": (lambda: within(encode(picture(), "JPEG"), 2, b"\xff", 32 * BIG), None),
    "chunks": (lambda: within(png(1, 1, 8, 0, b"\0\0"), 33, bytes(4) + b"IDAT5\xafe\x1e", 5 * BIG), "PNG of more than"),
    "16 bits": (lambda: png(5000, 5000, 16, 0, bytes(5000 * 10001)), None),
    "tile": (lambda: tiled((30000, 30000)), "tiles of 30000 x 30000 for an image of 16 x 16"),
    "small tile": (lambda: tiled((4096, 4096)), "truncated, damaged"),
    "strips": (overlapping, "truncated or damaged TIFF"),
    "samples": (lambda: tiff((258, 3, 8 * BIG, 26), data=bytes(16 * BIG)), "TIFF of more than"),
    "blocks": (lambda: within(encode(picture(), "GIF"), 781, b"!\xfe\0", 10 * BIG), "GIF of more than"),
    "junk": (lambda: within(encode(picture(), "GIF"), 781, b"x", 32 * BIG), None),
    "comment": (lambda: within(encode(picture(), "GIF"), 781, b"!\xfe" + (b"\1x" * 20000) + b"\0", 1), None),
    "runs": (lambda: rle_bmp(bytes(16 * BIG)), "run-length encoded BMP of more than"),
    "canvas": (lambda: webp_header(16383, 16383), "16383 x 16383 is over the limit"),
}
MEASURE = """
import resource, sys, time
from acformer.images import load_image
from acformer.errors import ImageError
load_image(sys.argv[1])
for path in sys.argv[2:]:
    open("/proc/self/clear_refs", "w").write("5")
    peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
    before, start = peak(), time.process_time()
    try:
        width, height = load_image(path).size
        said = f"{width * height}"
    except ImageError as error:
        said = str(error)
    print(time.process_time() - start, peak() - before, said)
"""


def costs(folder, files):
    """Seconds, bytes and outcome of each file, in a process of its own."""
    paths = [folder / str(number) for number in range(len(files) + 1)]
    for path, data in zip(paths, [encode(picture(), "PNG"), *files], strict=True):
        path.write_bytes(data)
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    fields = [line.split(maxsplit=2) for line in lines]
    return [(float(seconds), int(size), said) for seconds, size, said in fields]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="memory is measured through /proc")
@pytest.mark.slow
def test_no_file_costs_more_than_its_pixels_and_bytes_justify(tmp_path):
    files = [make() for make, _ in COSTLY.values()]
    for (name, (_, reason)), data, (seconds, size, said) in zip(
        COSTLY.items(), files, costs(tmp_path, files), strict=True
    ):
        assert said.isdigit() if reason is None else reason in said, (name, said)
        pixels = int(said) if reason is None else 4096 * 4096 if name == "small tile" else 0
        assert size < 20 * pixels + 4 * len(data) + 30e6, (name, size)
        assert seconds < 5, name


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="memory is measured through /proc")
def test_the_stated_bound_of_the_largest_images(tmp_path):
    side, exif = 8000, Image.Exif()
    exif[274] = 6
    rgba = Image.new("RGBA", (side, side), (1, 2, 3, 4))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    scans = encode(noise, "JPEG", progressive=True, quality=60, exif=exif)
    at = scans.rindex(b"\xff\xda")
    files = [
        encode(rgba, "WEBP", save_all=True, append_images=[picture((side, side))], lossless=True, method=0, exif=exif),
        encode(noise.convert("CMYK"), "JPEG", progressive=True, quality=50, subsampling=0, exif=exif),
        scans[:-2] + scans[at : at + 30] * 85 + scans[-2:],
        encode(rgba, "PNG", compress_level=1, exif=exif),
        png(side, side, 16, 6, bytes(side * (side * 8 + 1))),
        encode(Image.new("F", (side, side), 0.5), "TIFF", compression="tiff_adobe_deflate"),
        rle_bmp(b"\1\0" * (4 * BIG - 2000)),
    ]
    limits = ImageLimits()
    for number, (seconds, size, _) in enumerate(costs(tmp_path, files)):
        assert size < 20 * limits.max_pixels + 4 * limits.max_bytes, number
        assert seconds < 15, number


def seeds():
    exif = Image.Exif()
    exif[274], exif[270] = 6, "a description"
    image, alpha = picture(), picture().convert("RGBA")
    alpha.putalpha(100)
    deep = Image.fromarray(np.arange(256, dtype=np.uint16)[None] * 200)
    yield from (encode(image, f) for f in FORMATS)
    yield from (encode(image, f, exif=exif) for f in ("JPEG", "PNG", "WEBP", "TIFF"))
    yield from (encode(alpha, f) for f in ("PNG", "WEBP", "TIFF", "BMP"))
    yield from (encode(image.convert("P"), f, transparency=3) for f in ("PNG", "GIF"))
    yield from (encode(image.convert(m), "TIFF", compression="tiff_lzw") for m in ("L", "P", "CMYK", "F"))
    yield from (encode(image, "TIFF", compression=c) for c in ("jpeg", "tiff_adobe_deflate", "packbits"))
    yield from (encode(deep, f) for f in ("PNG", "TIFF"))
    yield encode(image, "GIF", save_all=True, append_images=[picture(seed=1)])
    yield encode(image, "JPEG", progressive=True)
    yield from noisy().values()


def fix_crcs(data):
    """A PNG whose chunk checks fit again, so that mutations reach past them."""
    at = 8
    while 8 <= at < len(data) - 12:
        end = at + 8 + int.from_bytes(data[at : at + 4])
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4


def mutate(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(min(len(data), rng.choice([40, 200, 10**9])) or 1)
        size = rng.choice([1, 2, 50, len(data)])
        removed = rng.choice([1, 1, 1, 0, size])
        data[at : at + removed] = rng.choice([rng.randbytes(removed), rng.choice([b"\0", b"\x7f", b"\xff"]), b""])
    if data.startswith(b"\x89PNG") and rng.random() < 0.7:
        fix_crcs(data)
    return bytes(data)


def fuzz(count, seed):
    sources, rng, images = list(seeds()), random.Random(seed), 0
    state = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        for i in range(count):
            try:
                image = load_image(mutate(sources[i % len(sources)], rng), limits=ImageLimits(max_pixels=10**6))
            except ImageError:
                continue
            assert (type(image), image.mode) == (Image.Image, "RGB")
            images += 1
    assert [str(warning.message) for warning in leaked] == []
    assert state == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    assert 0.05 < images / count < 0.95, "both outcomes are exercised"


def test_600_mutations():
    fuzz(600, seed=0)


@pytest.mark.slow
def test_60_000_mutations():
    fuzz(60_000, seed=1)
