"""Where the image of a question lies in a folder: by its name, whatever the folders around it are called."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from acformer.benchmarks.answers import Question, some
from acformer.benchmarks.records import Folder
from acformer.errors import DataError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tiff")
Source = Path | Callable[[], bytes]
"""A file, or what gives the bytes of an image in a table."""


def find_images(folder: Folder, questions: Sequence[Question]) -> list[Source | None]:
    """The image of each question, None for one without; `DataError` that names those that are not there."""
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for file in folder.files:
        if isinstance(file, Path) and file.suffix.lower() in ENDINGS:
            by_stem[file.stem].append(file)
    found: list[Source | None] = []
    missing: dict[str, None] = {}
    for question in questions:
        source = question.load or (_nearest(question.image, by_stem) if question.image else None)
        if source is None and question.image:
            missing[question.image] = None
        found.append(source)
    if missing:
        raise DataError(f"{folder.root}: {len(missing)} images are not there: {some(missing)}")
    return found


def _nearest(name: str, by_stem: dict[str, list[Path]]) -> Path | None:
    """The file of that name in folders of its folders' names, others between them allowed."""
    wanted = PurePosixPath(name)
    folders = wanted.parts[:-1]
    fitting = [path for path in by_stem.get(wanted.stem, ()) if _holds_in_order(path.parts[:-1], folders)]
    exact = [path for path in fitting if path.name == wanted.name]
    return next(iter(exact or fitting), None)


def _holds_in_order(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    rest = iter(parts)
    return all(any(part == one for part in rest) for one in wanted)
