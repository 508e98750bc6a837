"""Names of models and data as they may be published: nobody's folders in them."""

import re
from pathlib import Path
from typing import Any

LIBRARIES = ("timm", "open_clip")


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


def without_paths(value: Any) -> Any:
    """Nested dicts and lists in which of every path its last part alone is left."""
    if isinstance(value, dict):
        return {key: without_paths(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(one) for one in value]
    if isinstance(value, str) and value.partition(":")[0] in LIBRARIES:
        return public_name(value)
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1] if isinstance(value, str) and is_local(value) else value
