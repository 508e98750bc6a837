"""What `data:` of a stage says: one source, or several with weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from acformer.errors import UsageError, unknown_name

Data = str | Mapping[str, Any] | list[Any]
"""A path or name; a mapping with `path` and other keys of `Entry`; a list of these."""


@dataclass(frozen=True)
class Entry:
    """One source of samples.

    path: a file, a folder, a data set's name, a name on the Hugging Face Hub. weight: how often its records come in an
    epoch (0.5: every second one, the others in the next epoch; 2: each twice); of streams, whose length nobody knows,
    its share of the samples. image_root: where the images lie that records name; default beside the file. config,
    split: of a Hugging Face data set. streaming: of one, read it as it comes instead of storing it first.
    """

    path: str
    weight: float = 1.0
    image_root: str | None = None
    config: str | None = None
    split: str = "train"
    streaming: bool = False


def data_entries(data: Data, image_root: str | None = None, *, key: str = "data") -> list[Entry]:
    """The sources that `data` names; `image_root` is that of those which have none of their own.

    Raises:
        UsageError: a key that there is not, a value of the wrong type, a weight that is not a positive number, nothing
            at all, or streams mixed with others.
    """
    if isinstance(data, list):
        entries = [_entry(one, image_root, f"{key}[{number}]") for number, one in enumerate(data)]
    else:
        entries = [_entry(data, image_root, key)]
    if not entries:
        raise UsageError(f"{key} is empty: give a file, or a list of {{path, weight}}")
    if len({entry.streaming for entry in entries}) > 1:
        raise UsageError(f"{key}: streams and other sources cannot be mixed: give all of them streaming: true, or none")
    return entries


def data_title(data: Data) -> str:
    """How messages call it."""
    entries = data_entries(data)
    more = len(entries) - 1
    return entries[0].path + (f" and {more} more" if more else "")


def beside(entry: Entry) -> Path:
    """Where images are looked for without an `image_root`: in the file's folder, or in the folder that the data is."""
    path = Path(entry.path).expanduser()
    return path if path.is_dir() else path.parent if path.exists() else Path()


def _entry(value: Any, image_root: str | None, key: str) -> Entry:
    if isinstance(value, Mapping):
        if not isinstance(value.get("path"), str):
            raise UsageError(f"{key}.path must be a file, a folder or a name, got {value.get('path')!r}")
        known = {field.name: field for field in fields(Entry)}
        for name, given in value.items():
            if name not in known:
                raise unknown_name(f"key of {key}", str(name), known)
            _check(given, known[name].default, name, key)
        return Entry(**{"image_root": image_root, **value})
    if not isinstance(value, str) or not value:
        raise UsageError(f"{key} must be a file, a folder or a name, or {{path, weight}}, got {value!r}")
    return Entry(value, image_root=image_root)


def _check(given: Any, default: Any, name: str, key: str) -> None:
    if name == "weight":
        is_number = isinstance(given, int | float) and not isinstance(given, bool)
        if not is_number or not 0 < given < math.inf:
            raise UsageError(f"{key}.weight must be a positive number, got {given!r}")
    elif name == "streaming":
        if not isinstance(given, bool):
            raise UsageError(f"{key}.streaming must be true or false, got {given!r}")
    elif not (isinstance(given, str) or (given is None and default is None)):
        raise UsageError(f"{key}.{name} must be text, got {given!r}")
