"""Scene -> image: Pillow draws OpenMoji's colour font over a colour field, a texture or a crop of a photograph."""

from functools import cache, lru_cache
from pathlib import Path
from random import Random

import matplotlib
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from acformer.fetch.embedded import embedded_path
from acformer.images import load_image
from acformer.lab.scenes.difficulty import nouns_by_name
from acformer.lab.scenes.layout import SIDE, Scene, Thing

EM = 200  # pixels at which a glyph is drawn before it is scaled to its size
FONTS = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "DejaVuSans", "STIXGeneralBol", "cmss10")


def draw_scene(scene: Scene) -> Image.Image:
    """(336, 336) RGB; needs `acformer fetch openmoji photographs`."""
    random = Random(f"{scene.key}/picture")
    canvas = background(random, busy=scene.difficulty.busy)
    for thing in scene.objects:
        glyph = _glyph(nouns_by_name()[thing.text].char)
        side = round(thing.width)
        image = glyph.resize((side, side), Image.Resampling.LANCZOS)
        canvas.paste(image, (round(thing.x - side / 2), round(thing.y - side / 2)), image)
    for thing in scene.words:
        _print(canvas, thing, random)
    return canvas


def background(random: Random, *, busy: bool = False) -> Image.Image:
    """A field of one colour, a gradient, a texture, or (one in three) a crop of a photograph.

    `busy`: two in three are crops of photographs, closer to what they were; the others are textures.
    """
    if busy:
        return random.choice(
            [_noise, _stripes, _busy_photograph, _busy_photograph, _busy_photograph, _busy_photograph]
        )(random)
    return random.choice([_field, _gradient, _noise, _stripes, _photograph, _photograph])(random)


def _colour(random: Random) -> tuple[int, int, int]:
    return random.randint(90, 255), random.randint(90, 255), random.randint(90, 255)


def _field(random: Random) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), _colour(random))


def _gradient(random: Random) -> Image.Image:
    ramp = Image.linear_gradient("L").rotate(random.choice((0, 90, 180, 270))).resize((SIDE, SIDE))
    return Image.composite(_field(random), _field(random), ramp)


def _noise(random: Random) -> Image.Image:
    cells = random.choice((12, 28, 84))
    grain = Image.frombytes("L", (cells, cells), random.randbytes(cells * cells))
    grain = grain.resize((SIDE, SIDE), Image.Resampling.BICUBIC).point(lambda value: 70 + value * 0.45)
    return Image.composite(_field(random), _field(random), grain)


def _stripes(random: Random) -> Image.Image:
    image, width = _field(random), random.randint(10, 40)
    draw, second = ImageDraw.Draw(image), _colour(random)
    for start in range(0, SIDE, 2 * width):
        draw.rectangle((start, 0, start + width, SIDE), fill=second)
    return image.rotate(random.choice((0, 90))).filter(ImageFilter.GaussianBlur(random.uniform(0, 3)))


def _busy_photograph(random: Random) -> Image.Image:
    return _photograph(random, (0.05, 0.35))


def _photograph(random: Random, lightened: tuple[float, float] = (0.25, 0.55)) -> Image.Image:
    """A crop of a texture or a photograph, lightened so that what stands on it can be seen."""
    photo = random.choice(_photographs())
    side = random.randint(min(photo.size) // 3, min(photo.size))
    left, top = random.randint(0, photo.width - side), random.randint(0, photo.height - side)
    crop = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return Image.blend(crop, Image.new("RGB", crop.size, (225, 225, 225)), random.uniform(*lightened))


def _print(canvas: Image.Image, thing: Thing, random: Random) -> None:
    """A word in its rectangle, dark with a light rim or the other way round."""
    name, size = random.choice(FONTS), round(thing.height * 0.86)
    dark, light = tuple(random.randint(0, 80) for _ in range(3)), (255, 255, 255)
    ink, rim = (dark, light) if random.random() < 0.7 else (light, dark)
    font = _font(name, size)
    while font.getlength(thing.text) > thing.width and size > 8:
        size -= 1
        font = _font(name, size)
    ImageDraw.Draw(canvas).text(
        (thing.x, thing.y), thing.text, ink, font, anchor="mm", stroke_width=max(1, size // 14), stroke_fill=rim
    )


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=512)
def _glyph(char: str) -> Image.Image:
    """The emoji without its margins, centred in a transparent square."""
    font = ImageFont.truetype(str(embedded_path("openmoji") / "glyf_colr0.ttf"), EM)
    sheet = Image.new("RGBA", (2 * EM, 2 * EM))
    ImageDraw.Draw(sheet).text((EM, EM), char, font=font, embedded_color=True, anchor="mm")
    glyph = sheet.crop(sheet.getbbox())
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square


@cache
def _photographs() -> tuple[Image.Image, ...]:
    folder = embedded_path("photographs")
    return tuple(load_image(path) for path in sorted(folder.glob("*.png")))
