"""What a visitor can begin with: images that lie in the cache already, and questions that a model was trained on."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageDraw

from acformer.data.datasets import named_dataset
from acformer.data.entries import data_title
from acformer.errors import CheckpointError, DataError
from acformer.fetch.embedded import embedded_path
from acformer.hf.trained import RECIPE
from acformer.images import load_image
from acformer.lab.scenes.difficulty import DIFFICULTIES
from acformer.lab.scenes.draw import draw_scene
from acformer.lab.scenes.layout import make_scene
from acformer.training.recipe import load_recipe

ANY_MODEL = ("What is in the image?", "Describe the image in one sentence.", "What colour stands out?")


def trained_on(model_folder: str | Path) -> str:
    """The data set of a run's last stage, by the recipe of the run or beside the model; empty where there is none."""
    folder = Path(model_folder).absolute()
    recipe = next((path / RECIPE for path in (folder, folder.parent.parent) if (path / RECIPE).is_file()), None)
    if recipe is None:
        return ""
    stage = load_recipe(str(recipe)).finetune
    return data_title(stage.data).partition(":")[0] if stage else ""


def questions(data: str) -> tuple[str, ...]:
    """Questions of the kind that a model trained on that data knows."""
    named = named_dataset(data)
    return (named[0].example_questions() if named else ()) or ANY_MODEL


def images(data: str = "") -> dict[str, Image.Image]:
    """Up to three, by name: a shape, a scene, a photograph; what the data has comes first, else the photograph."""
    kind = data.removesuffix("-small").removesuffix("-hard")
    first = {"easy-vqa": "A shape", "openmoji-scenes": "A scene"}.get(kind, "A photograph")
    found = {}
    for name in sorted(_MAKERS, key=lambda name: name != first):
        with suppress(CheckpointError, DataError):  # not fetched
            found[name] = _MAKERS[name]()
    return found


def _shape() -> Image.Image:
    """The first test image of easy-VQA or, where it is not fetched, one like it."""
    with suppress(DataError):
        return load_image(embedded_path("easy-vqa") / "images/test/0.png")
    image = Image.new("RGB", (64, 64), (232, 240, 247))
    ImageDraw.Draw(image).ellipse((18, 26, 42, 50), fill=(0, 128, 128))
    return image


def _scene() -> Image.Image:
    return draw_scene(make_scene(DIFFICULTIES["openmoji-scenes-small"], "test", 1))


def _photograph() -> Image.Image:
    return load_image(embedded_path("photographs") / "coffee.png")


_MAKERS: dict[str, Callable[[], Image.Image]] = {"A photograph": _photograph, "A scene": _scene, "A shape": _shape}
