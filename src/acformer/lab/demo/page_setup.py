"""What the page opens with: the models that were named, else the one of ours that was fetched, else what `make
quickstart` trained last, else anchors.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from acformer.commands.arguments import default_model
from acformer.errors import CheckpointError, UsageError
from acformer.fetch.embedded import resolve
from acformer.hf.build import square_image_processor
from acformer.hf.checkpoints import load_model, model_folder
from acformer.hf.trained import examples
from acformer.images import load_image
from acformer.lab.demo.demo_model import DemoModel
from acformer.lab.demo.encoded_image import ImageEncoder
from acformer.lab.demo.examples import images, questions, trained_on
from acformer.lab.demo.pins import Pins
from acformer.lab.demo.session import Controller
from acformer.vision.encoder import load_vision_encoder

RUNS = Path("runs/quickstart")
ENCODER, IMAGE_SIZE, NUM_ANCHORS = "embedded:dinov2-s14", 336, 64


@dataclass(frozen=True, eq=False)
class PageSetup:
    """A controller, and what the page shows at first; `num_anchors` is where its slider stands."""

    controller: Controller
    images: dict[str, Image.Image]
    questions: tuple[str, ...]
    num_anchors: int


def set_up_page(model: str | None, compare: str | None, dtype: torch.dtype | str, device: torch.device) -> PageSetup:
    """Load what was named; without a model ours, the newest run in `runs/quickstart`, or the encoder alone.

    Ours (`default_model`) is taken where it was fetched, and brings images and questions of its own.

    Raises:
        UsageError: a model to compare, and none to compare it with.
        CheckpointError: no such model, or neither a trained model nor the encoder (`acformer fetch dinov2-s14`).
    """
    trained = model or fetched_model() or newest_run(RUNS)
    if trained is None and compare is not None:
        raise UsageError(
            "--compare needs a model to compare with, and none was fetched or trained here: name it with --model"
        )
    if trained is None:
        encoder = load_vision_encoder(ENCODER).to(device)
        image_encoder = ImageEncoder.of_encoder(encoder, square_image_processor(resolve(ENCODER), IMAGE_SIZE))
        return PageSetup(Controller(image_encoder=image_encoder), images(), (), NUM_ANCHORS)
    models = [_load(name, dtype, device) for name in (trained, compare) if name is not None]
    folder, first = model_folder(trained), models[0]
    num_anchors = max(first.connector.num_tokens - first.num_others, 1)
    setup = PageSetup(Controller(models), *_to_begin_with(Path(folder)), num_anchors)
    for each in models:  # a token of each now, so that the first visitor's times are not those of warming up
        encoded = each.image_encoder(next(iter(setup.images.values())))
        each.answer(encoded, "?", each.connector.num_tokens, Pins(), max_new_tokens=1)
    return setup


def _to_begin_with(folder: Path) -> tuple[dict[str, Image.Image], tuple[str, ...]]:
    """Images, and questions about the first: a model's own, else those of the data that it was trained on."""
    own = examples(folder)
    if not own:
        data = trained_on(folder)
        return images(data), questions(data)
    paths = list(dict.fromkeys(one.image for one in own))[:3]
    shown = {f"Scene {number}": load_image(path) for number, path in enumerate(paths, 1)}
    return shown, tuple(one.question for one in own if one.image == paths[0])[:4]


def fetched_model() -> str | None:
    """The model that answers where none is named, if there is one and it is in the cache."""
    name = default_model()
    try:
        return name and resolve(name) and name
    except CheckpointError:
        return None


def newest_run(runs: Path) -> str | None:
    """The folder whose last stage was saved last: `runs` itself or one in it; None where no run has finished."""
    finished = {
        saved.stat().st_mtime: run
        for run in (runs, *runs.glob("*/"))
        if (saved := Path(model_folder(str(run))) / "config.json").is_file()
    }
    return str(finished[max(finished)]) if finished else None


def _load(name: str, dtype: torch.dtype | str, device: torch.device) -> DemoModel:
    model, processor = load_model(name, dtype=dtype, device=device)
    return DemoModel(f"{model.config.connector} ({name.removeprefix('embedded:')})", model, processor)
