"""What the page opens with: the models that were named, else what `make quickstart` trained last, else anchors."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from acformer.errors import UsageError
from acformer.fetch.embedded import resolve
from acformer.hf.build import square_image_processor
from acformer.hf.checkpoints import load_model, model_folder
from acformer.lab.demo.examples import pictures, questions, trained_on
from acformer.lab.demo.look import Eye
from acformer.lab.demo.pins import Pins
from acformer.lab.demo.respondent import Respondent
from acformer.lab.demo.visit import Guide
from acformer.vision.encoder import load_vision_encoder

RUNS = Path("runs/quickstart")
ENCODER, IMAGE_SIZE, NUM_ANCHORS = "embedded:dinov2-s14", 336, 64


@dataclass(frozen=True, eq=False)
class Opening:
    """A guide, and what the page shows before a visitor has done anything; `num_anchors` is where its slider stands."""

    guide: Guide
    pictures: dict[str, Image.Image]
    questions: tuple[str, ...]
    num_anchors: int


def opening(model: str | None, compare: str | None, dtype: torch.dtype | str, device: torch.device) -> Opening:
    """Load what was named; without a model the newest run in `runs/quickstart` or, failing that, the encoder alone.

    Raises:
        UsageError: a model to compare, and none to compare it with. CheckpointError: no such model, or neither a
            trained model nor the encoder (`acformer fetch dinov2-s14`).
    """
    trained = model or newest_run(RUNS)
    if trained is None and compare is not None:
        raise UsageError("--compare needs a model to compare with, and none was trained here: name it with --model")
    if trained is None:
        encoder = load_vision_encoder(ENCODER).to(device)
        eye = Eye.of_encoder(encoder, square_image_processor(resolve(ENCODER), IMAGE_SIZE))
        return Opening(Guide(eye=eye), pictures(), (), NUM_ANCHORS)
    names = [name for name in (trained, compare) if name is not None]
    respondents = [_respondent(name, dtype, device) for name in names]
    data = trained_on(model_folder(trained))
    first = respondents[0]
    start = Opening(
        Guide(respondents), pictures(data), questions(data), max(first.connector.num_tokens - first.num_others, 1)
    )
    _wake(start)
    return start


def newest_run(runs: Path) -> str | None:
    """The folder whose last stage was saved last: `runs` itself or one in it; None where no run has finished."""
    finished = {
        saved.stat().st_mtime: run
        for run in (runs, *runs.glob("*/"))
        if (saved := Path(model_folder(str(run))) / "config.json").is_file()
    }
    return str(finished[max(finished)]) if finished else None


def _respondent(name: str, dtype: torch.dtype | str, device: torch.device) -> Respondent:
    model, processor = load_model(name, dtype=dtype, device=device)
    return Respondent(f"{model.config.connector} ({name})", model, processor)


def _wake(start: Opening) -> None:
    """One word from every model, so that the first visitor's times are not those of waking up."""
    picture = next(iter(start.pictures.values()))
    for respondent in start.guide.respondents:
        look = respondent.eye(picture)
        respondent.answer(look, "?", respondent.connector.num_tokens, Pins(), max_new_tokens=1)
