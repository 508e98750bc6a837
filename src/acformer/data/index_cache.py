"""What was found out about a large file by reading it once, kept in the cache folder as arrays that processes share.

A file is known by its size, its time of change and the sha256 of its first and last 64 KiB: one that was changed is
read anew, one that was moved is not. The arrays are mapped into memory, so loaders' workers and the processes of a run
have them once. Where the cache cannot be written they are kept in this process alone.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from acformer.errors import DataError
from acformer.fetch.embedded import cache_dir
from acformer.files import locked, whole_file, whole_folder

VERSION = 1
ENDS = 64 * 1024
SMALL = 2**20
"""Bytes of a file up to which nothing is kept: it is read again as quickly."""
PIECE = 2**20
MAX_GROWTH = 200
"""Times its packed size (at least `PIECE`) that a gzip file may unpack to."""
Arrays = dict[str, np.ndarray]


def file_key(path: Path) -> str:
    """By which a file is known."""
    status = path.stat()
    digest = hashlib.sha256(f"{VERSION} {status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(ENDS))
        file.seek(max(0, status.st_size - ENDS))
        digest.update(file.read(ENDS))
    return digest.hexdigest()[:24]


def indexed(path: Path, kind: str, build: Callable[[], tuple[Arrays, dict[str, Any]]]) -> tuple[Arrays, dict[str, Any]]:
    """The arrays and facts that `build` gives of a file, made once unless it is small."""
    if path.stat().st_size < SMALL:
        return build()
    folder = cache_dir() / "data" / f"{file_key(path)}-{kind}"
    try:
        with _alone(folder):
            if not (folder / "facts.json").exists():
                with whole_folder(folder) as part:
                    arrays, facts = build()
                    for name, array in arrays.items():
                        np.save(part / f"{name}.npy", array)
                    (part / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            arrays = {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}
            return arrays, json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    except OSError:  # a full disk, or one that cannot be written
        return build()


def unpacked(path: Path) -> Path:
    """A gzip file's content as a file of the cache; `DataError` where it is damaged, or there is no room."""
    import gzip
    import zlib

    plain = cache_dir() / "data" / f"{file_key(path)}-unpacked.json"
    try:
        with _alone(plain):
            if not plain.exists():
                with gzip.open(path) as packed, whole_file(plain) as part, part.open("wb") as file:
                    _copy(packed, file, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise DataError(f"cannot unpack {path} into {plain.parent}: {error.strerror}") from error
    os.utime(plain, ns=(path.stat().st_mtime_ns,) * 2)  # the index of what is unpacked is then known again, too
    return plain


def _copy(packed: Any, file: IO[bytes], path: Path) -> None:
    """Piece by piece; text packs to a tenth, and what becomes two hundred times as large would only fill the disk."""
    most = max(PIECE, path.stat().st_size) * MAX_GROWTH
    while piece := packed.read(PIECE):
        if file.tell() + len(piece) > most:
            raise DataError(f"{path} unpacks to more than {most:,} bytes: it is hardly text; unpack it yourself")
        file.write(piece)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Two runs that start at once do not write over each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        yield
