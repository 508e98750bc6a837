"""Names of models and data as they may be published: nobody's folders in them."""

import re
from pathlib import Path
from typing import Any

LIBRARIES = ("timm", "open_clip")
STAGES = ("finetune", "pretrain", "model")
"""Folders of a run, whose names do not say whose model lies in them."""


def is_local(name: str) -> bool:
    """Whether it is a path and no name: absolute, `~`, `.`, with more than one slash, or there on this machine."""
    text = name.replace("\\", "/")
    if text.startswith(("/", "~", ".")) or re.match("[A-Za-z]:/", text) or text.count("/") > 1:
        return True
    return "/" in text and Path(name).exists()


def public_name(name: str | None) -> str:
    """A model's name on a hub, of a library, or `embedded:NAME`; of a folder or file on this machine, nothing.

    Of `timm:NAME@FILE` and `timm:local-dir:FOLDER` what stands before the file and the folder.
    """
    name = name or ""
    library, _, rest = name.partition(":")
    if library in LIBRARIES:
        model, _, weights = rest.partition("@")
        model = "local-dir" if model.startswith("local-dir:") else model
        return f"{library}:{model}@{weights}" if weights and not is_local(weights) else f"{library}:{model}"
    return "" if is_local(name) else name


def last_name(path: str) -> str:
    """A path's last part that says something: `x` of `/runs/x/finetune/model`."""
    parts = [part for part in re.split(r"[\\/]", path) if part]
    return next((part for part in reversed(parts) if part not in STAGES), parts[-1] if parts else "")


def as_recorded(name: str) -> str:
    """A model or data as a record of scores names it: what lies under the working folder by the way there.

    Of any other path the last part; a name of a hub, of a data set or of a library as it is, without a file.
    """
    if name.partition(":")[0] in LIBRARIES:
        return public_name(name)
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    is_elsewhere = path.is_absolute() or ".." in path.parts or name.startswith("~") or re.match(r"[A-Za-z]:[\\/]", name)
    return last_name(name) if is_elsewhere else name


def without_paths(value: Any) -> Any:
    """Nested dicts and lists in which of every path its last part alone is left."""
    if isinstance(value, dict):
        return {key: without_paths(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(one) for one in value]
    if isinstance(value, str) and value.partition(":")[0] in LIBRARIES:
        return public_name(value)
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1] if isinstance(value, str) and is_local(value) else value
