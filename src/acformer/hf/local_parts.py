"""Where a folder's other weights are, without a path of anybody's machine in the folder.

A name of a hub stands in it as it is; a folder of the same run by the way there (`../../pretrain/model`), which moves
with the run. Any other folder or file of this machine stands in it by its last name, as `local:NAME`, and
`places.json` beside it says where that lies: it belongs to the run, and whoever sends the folder does not send it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from acformer.errors import CheckpointError
from acformer.files import write_text
from acformer.hf.public_names import last_name, public_name

PLACES = "places.json"
"""Beside a folder: by what a part is there for (vision, text, model), its place on this machine."""
LOCAL = "local:"


def naming(folder: Path, name: str, within: Path) -> str:
    """How a file in `folder` names a part: `name` is a hub's or a library's name, or of something on this machine.

    within: what moves together, a run's folder.
    """
    path = Path(name)
    if (path.is_absolute() or path.is_dir()) and path.resolve().is_relative_to(within.resolve()):
        return Path(os.path.relpath(path, folder)).as_posix()
    if public_name(name) == name and not path.is_dir():
        return name
    return LOCAL + last_name(name)


def located(folder: Path, name: str, role: str) -> str:
    """A part as a file in `folder` names it: `../x` is meant from there, `local:x` is looked up beside the folder.

    Raises:
        CheckpointError: a part of another machine, of which nothing here says where it lies.
    """
    if name.startswith("."):
        return str((folder / name).resolve())
    if not name.startswith(LOCAL):
        return name
    places = folder.resolve().parent / PLACES
    try:
        found = json.loads(places.read_text(encoding="utf-8"))[role] if places.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        found = None
    if not isinstance(found, str):
        raise CheckpointError(
            f"{folder} holds a part of a model, and its {role} model is a folder of the machine where it was trained, "
            f"{name.removeprefix(LOCAL)!r}: give its place here as {role!r} in {places}, or have a whole model sent "
            "(acformer merge)"
        )
    return found


def write_places(folder: Path, places: Mapping[str, str]) -> None:
    """Beside the models and checkpoints in `folder`: where their parts lie that are of this machine alone."""
    if places:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PLACES, json.dumps(dict(places), indent=1) + "\n")
