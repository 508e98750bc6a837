"""What runs leave: one JSON file each, there whole or not at all, known by the fingerprint of what it was made from.

A record of the same fingerprint is never made again, whichever table made it; one of another fingerprint in the same
place is refused; an error is no record, and what it stands for is tried again.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from acformer.errors import DataError, UsageError
from acformer.files import write_text


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """A JSON file, in one step."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """What lies there, be it an `error`; nothing where there is nothing. `DataError` if it is no record."""
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): move it away, and it is made again") from error
    if not isinstance(record, dict):
        raise DataError(f"{path} is JSON, but no record: move it away, and it is made again")
    return record


def made_record(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What was measured; None where nothing was yet. `UsageError` if it was made by another plan."""
    record = read_record(path)
    if not record or "error" in record:
        return None
    if record.get("fingerprint") != fingerprint:
        raise UsageError(
            f"{path} was made by another plan (recipe, data or search differ): move it away, or choose another --out"
        )
    return record


def take_over(wanted: Mapping[Path, str], results: Path) -> None:
    """Copy what the tables under `results` have made to the paths (with their fingerprints) where nothing is yet."""
    missing = {path: mark for path, mark in wanted.items() if made_record(path, mark) is None}
    found = {}
    for path in sorted(results.glob("*/*/*.json")) if missing else ():
        with suppress(DataError):  # whatever else lies there is not ours to judge
            record = read_record(path)
            found[str(record.get("fingerprint"))] = record
    for path, mark in missing.items():
        if mark in found:
            write_record(path, found[mark])
