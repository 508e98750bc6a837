"""The rows of a run on disk: `images.csv`, a row an image, and `settings.json`, what they were made with.

A row is written when its image is measured and is never made again: the same command goes on where it was stopped.
A row that was cut off is taken away; rows of other settings are refused. The machine and the versions (`made_on`) are
those of the first row.
"""

import csv
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from acformer.errors import DataError, ImageError, UsageError
from acformer.files import write_text

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
MADE_ON = "made_on"
TEXT_COLUMNS = ("image", "anchors")
ImageStats = dict[str, float | str]
log = logging.getLogger(__name__)


def find_images(folder: Path, limit: int | None = None) -> list[Path]:
    """Paths, from the folder, of the images in it and below it, sorted; `limit` of them evenly spaced, if given.

    Raises:
        DataError: no images there.
    """
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError(f"{folder}: no images ({', '.join(sorted(SUFFIXES))}) in this folder or below it")
    count = min(limit or len(found), len(found))
    return [found[place * len(found) // count] for place in range(count)]


def group_of(image: str) -> str:
    """What an image is resampled together with: its subfolder, or it alone.

    Crops of one photograph, in a folder of their own, tell less than as many photographs.
    """
    folder = Path(image).parent.as_posix()
    return image if folder == "." else folder


def make_rows(
    out: Path,
    settings: Mapping[str, Any],
    images: Sequence[Path],
    measure: Callable[[Path], ImageStats],
    *,
    progress: bool = True,
) -> tuple[dict[str, Any], dict[str, ImageStats]]:
    """The settings and the row of each image by its name, measured where there is none yet.

    A damaged image is left out with a warning.

    Raises:
        UsageError: `out` holds rows made with other settings.
        DataError: every image is damaged.
    """
    settings = _claim(out, settings)
    path = out / "images.csv"
    rows = dict(_read(path))
    missing = [image for image in images if image.as_posix() not in rows]
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for image in tqdm(missing, desc="measure", unit="img", disable=not (progress and missing)):
            try:
                measured = measure(image)
            except ImageError as error:
                log.warning("left out: %s", error)
                continue
            row = {"image": image.as_posix(), **{name: _four_digits(value) for name, value in measured.items()}}
            if not file.tell():
                writer.writerow(row)
            writer.writerow(row.values())
            file.flush()
            rows[image.as_posix()] = row
    known = {name: rows[name] for name in map(Path.as_posix, images) if name in rows}
    if not known:
        raise DataError(f"none of {len(images)} images can be read")
    return settings, known


def _claim(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that stand in `out`, written down if there are none."""
    path = out / "settings.json"
    if not path.exists():
        write_text(path, json.dumps(settings, indent=1) + "\n")
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(key for key in settings if key != MADE_ON and before.get(key) != settings[key])
    if changed:
        raise UsageError(f"{out} holds a run with other settings ({', '.join(changed)}): choose another --out")
    return before


def _read(path: Path) -> Iterator[tuple[str, ImageStats]]:
    """The whole rows of a file, from which one that was cut off is removed."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    for row in csv.DictReader(whole.splitlines()):
        yield row["image"], {name: value if name in TEXT_COLUMNS else float(value) for name, value in row.items()}


def _four_digits(value: float | str) -> float | str:
    return value if isinstance(value, str) else float(f"{value:.4g}")
