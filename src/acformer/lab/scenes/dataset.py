"""Scenes as samples: `openmoji-scenes[-small|-hard]:PART`, with every image drawn when it is first wanted.

Parts: `train`, `validation`, `test`, `novel` (questions); over the scenes of `train` `captions` (stage 1), `dialogues`
(all questions of a scene in one conversation), `talks` (the caption on request, and the questions as a dialogue in a
shuffled order: two samples a scene) and `text` (the captions in place of the images).
Images lie in `<cache>/<difficulty>-<VERSION>/<split>/NNNNNN.png`; an image that is there is whole.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from acformer.data.datasets import Dataset
from acformer.data.samples import Sample
from acformer.data.skip_log import SkipLog
from acformer.errors import unknown_name
from acformer.fetch.embedded import cache_dir
from acformer.files import locked
from acformer.lab.scenes.captions import caption
from acformer.lab.scenes.difficulty import DIFFICULTIES, SPLITS, VERSION, Difficulty
from acformer.lab.scenes.draw import draw_scene
from acformer.lab.scenes.layout import Scene, make_scene
from acformer.lab.scenes.questions import ask

IMAGE = {"type": "image"}
REQUEST = "describe the picture."
PARTS = (*SPLITS, "captions", "dialogues", "talks", "text")
KNOWN_SCENES = 2000  # of the train split: enough for the frequencies of answers, and made in seconds


@dataclass(frozen=True)
class SceneDataset(Dataset):
    """`openmoji-scenes[-small|-hard]` as a data set of `acformer.data.datasets`; name: of its difficulty."""

    name: str

    def samples(self, part: str, *, limit: int | None, skipped: SkipLog) -> list[Sample]:
        """See `scene_samples`."""
        samples = scene_samples(self.name, part, limit)
        skipped.offered += len(samples)
        return samples

    def known_samples(self) -> Iterable[Sample]:
        """The questions about the first scenes of the training split; nothing is drawn."""
        return takewhile(lambda sample: sample.record < KNOWN_SCENES, undrawn_samples(self.name, "train"))

    def example_questions(self) -> tuple[str, ...]:
        """What scenes are asked."""
        return "how many objects are there?", "what is written?", "is there a hat?", "where is the shirt?"


SCENES = SceneDataset("openmoji-scenes")
SCENES_SMALL = SceneDataset("openmoji-scenes-small")
SCENES_HARD = SceneDataset("openmoji-scenes-hard")


def scene_samples(name: str, part: str, limit: int | None = None, *, progress: bool = True) -> list[Sample]:
    """The first `limit` samples of a part, their images drawn.

    Errors: `UsageError` for an unknown part; `DataError` without `acformer fetch openmoji photographs`.
    """
    chosen = list(islice(undrawn_samples(name, part), limit))
    numbers = sorted({sample.record for sample in chosen if sample.images})
    draw_missing(DIFFICULTIES[name], _split(name, part), numbers, progress=progress)
    return chosen


def undrawn_samples(name: str, part: str) -> Iterator[Sample]:
    """All samples of a part one by one, without their images; `record` is the scene's number.

    Errors: `UsageError` for an unknown part.
    """
    difficulty, split = DIFFICULTIES[name], _split(name, part)
    for number in range(difficulty.num_scenes(split)):
        yield from _samples(make_scene(difficulty, split, number), image_path(difficulty, split, number), part, number)


def draw_missing(difficulty: Difficulty, split: str, numbers: list[int], *, progress: bool = True) -> None:
    """Draw the images of these scenes that are not there yet; safe to interrupt and to run twice at once."""
    folder = image_path(difficulty, split, 0).parent
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        missing = [number for number in numbers if not image_path(difficulty, split, number).exists()]
        for number in tqdm(missing, desc=f"draw {difficulty.name} {split}", disable=not (progress and missing)):
            path = image_path(difficulty, split, number)
            partial = path.with_suffix(".partial")
            draw_scene(make_scene(difficulty, split, number)).save(partial, "PNG", compress_level=1)
            os.replace(partial, path)


def image_path(difficulty: Difficulty, split: str, number: int) -> Path:
    """Where the image of a scene lies once it is drawn."""
    return cache_dir() / f"{difficulty.name}-{VERSION}" / split / f"{number:06d}.png"


def _split(name: str, part: str) -> str:
    """The split whose scenes a part is about."""
    if part not in PARTS:
        raise unknown_name(f"part of {name}", part, PARTS)
    return part if part in SPLITS else "train"


def _samples(scene: Scene, path: Path, part: str, number: int) -> Iterator[Sample]:
    match part:
        case "captions":
            yield _conversation(scene, path, f"{part}-{number}", [("", caption(scene))], number)
        case "talks":
            yield _conversation(scene, path, f"{part}-{number}/0", [(REQUEST, caption(scene))], number)
            pairs = _pairs(scene)
            Random(f"{scene.key}/talks").shuffle(pairs)
            yield _conversation(scene, path, f"{part}-{number}/1", pairs, number)
        case "dialogues" | "text":
            shown = None if part == "text" else path
            yield _conversation(scene, shown, f"{part}-{number}", _pairs(scene), number)
        case _:
            yield from _questions(scene, path, part, number)


def _pairs(scene: Scene) -> list[tuple[str, str]]:
    return [(question.text, question.answer) for question in ask(scene, thorough=False)]


def _questions(scene: Scene, path: Path, part: str, number: int) -> Iterator[Sample]:
    """One sample a question; the askings of a circular question share their id up to the last `/`."""
    for place, question in enumerate(ask(scene, thorough=part != "train")):
        asked = place - question.variant if part != "train" else place
        key = f"{part}-{number}-{asked}/{question.variant}"
        yield _conversation(scene, path, key, [(question.text, question.answer)], number, question.kind)


def _conversation(
    scene: Scene, path: Path | None, key: str, pairs: list[tuple[str, str]], number: int, kind: str | None = None
) -> Sample:
    """A conversation; without an image its caption opens it."""
    messages: list[dict[str, Any]] = []
    for question, answer in pairs:
        messages += [
            {"role": "user", "content": [{"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
    opening = {"type": "text", "text": f"{caption(scene)} "} if path is None else IMAGE
    messages[0]["content"] = [opening, *(part for part in messages[0]["content"] if part["text"])]
    images, data = () if path is None else (path,), scene.difficulty.name
    return Sample(f"{data}:{key}", tuple(messages), images, pairs[-1][1], kind, data, number)
