"""The rows of a run on disk: `images.csv`, a row a picture, and `settings.json`, what they were made with.

A row is written when its picture is measured and is never made again: the same command goes on where it was stopped.
A row that was cut off is taken away; rows of other settings are refused. The machine and the versions (`made_on`) are
those of the first row.
"""

import csv
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

from acformer.errors import DataError, ImageError, UsageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
MADE_ON = "made_on"
WORDS = ("image", "anchors")
DIGITS = 4
Row = dict[str, float | str]
log = logging.getLogger(__name__)


def find_pictures(folder: Path, limit: int | None = None) -> list[Path]:
    """Paths, from the folder, of the pictures in it and below it, sorted; `limit` of them evenly spaced, if given.

    Raises:
        DataError: no pictures there.
    """
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError(f"{folder}: no pictures ({', '.join(sorted(SUFFIXES))}) in this folder or below it")
    count = min(limit or len(found), len(found))
    return [found[place * len(found) // count] for place in range(count)]


def group(picture: str) -> str:
    """What a picture is drawn together with when its run is drawn again: its subfolder, or it alone.

    Crops of one photograph, in a folder of their own, tell less than as many photographs.
    """
    folder = Path(picture).parent.as_posix()
    return picture if folder == "." else folder


def make_rows(
    out: Path,
    settings: Mapping[str, Any],
    pictures: Sequence[Path],
    make: Callable[[Path], Row],
    *,
    progress: bool = True,
) -> tuple[dict[str, Any], dict[str, Row]]:
    """The settings and the row of each picture by its name, made where there is none yet.

    A damaged picture is told and left out.

    Raises:
        UsageError: `out` holds rows made with other settings.
        DataError: every picture is damaged.
    """
    settings = _claim(out, settings)
    path = out / "images.csv"
    rows = dict(_read(path))
    names = [picture.as_posix() for picture in pictures]
    missing = [picture for picture in pictures if picture.as_posix() not in rows]
    with path.open("a", encoding="utf-8") as file:
        for picture in tqdm(missing, desc="measure", unit="img", disable=not (progress and missing)):
            try:
                made = make(picture)
            except ImageError as error:
                log.warning("left out: %s", error)
                continue
            row = {"image": picture.as_posix(), **{name: _rounded(value) for name, value in made.items()}}
            if not file.tell():
                file.write(_line(row))
            file.write(_line(row.values()))
            file.flush()
            rows[picture.as_posix()] = row
    known = {name: rows[name] for name in names if name in rows}
    if not known:
        raise DataError(f"none of {len(names)} pictures can be read")
    return settings, known


def _claim(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that stand in `out`, written down if there are none."""
    path = out / "settings.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(key for key in settings if key != MADE_ON and before.get(key) != settings[key])
    if changed:
        raise UsageError(f"{out} holds a run with other settings ({', '.join(changed)}): choose another --out")
    return before


def _read(path: Path) -> Iterator[tuple[str, Row]]:
    """The whole rows of a file, from which one that was cut off is removed."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    for row in csv.DictReader(StringIO(whole)):
        yield row["image"], {name: value if name in WORDS else float(value) for name, value in row.items()}


def _rounded(value: float | str) -> float | str:
    return value if isinstance(value, str) else float(f"{value:.{DIGITS}g}")


def _line(cells: Iterable[float | str]) -> str:
    line = StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
