"""Files and folders that are whole or absent, locks between processes, sha256."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: no lock between processes, renames still keep files and folders whole
    fcntl = None  # type: ignore[assignment]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden sibling to write, which takes the place of `path` at the end: whole, or not at all."""
    part = partial_path(path)
    try:
        yield part
        flush_to_disk(part)
        part.replace(path)
    except OSError as error:
        if error.filename is None:  # as a disk without room says it
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file at once: a reader, and whoever comes after a crash, sees the old text or the new one.

    Its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty hidden sibling to fill, which takes the place of `folder` at the end: whole, or not at all."""
    part, replaced = partial_path(folder), folder.with_name(f".{folder.name}.replaced")
    for path in (part, replaced):  # of a process that was killed
        shutil.rmtree(path, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        for path in filter(Path.is_file, part.rglob("*")):
            flush_to_disk(path)
        if folder.exists():
            folder.rename(replaced)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def partial_path(path: Path) -> Path:
    """Where `whole_file` and `whole_folder` write before the rename."""
    return path.with_name(f".{path.name}.partial")


def flush_to_disk(path: Path) -> None:
    """What was written is on the disk afterwards (Windows wants the file open for writing)."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process or thread at a time; the system frees the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def only_process(path: Path) -> Iterator[None]:
    """`BlockingIOError` where another process is inside with the same lock file: nobody waits.

    The system frees the lock of a process that dies. The file is removed at the end, with its folder if that is empty.
    Where no lock can be had (a read-only disk, a file system without locks), there is none.
    """
    file = _lock_file(path)
    try:
        yield
    finally:
        if file is not None:
            if fcntl is None:
                file.close()  # Windows removes no file that is open
            path.unlink(missing_ok=True)
            file.close()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def _lock_file(path: Path) -> IO[str] | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError:
        return None
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: forked workers do not keep it
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(error.errno, "another process has locked it", str(path)) from error
        return None
    if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return file
    file.close()  # whoever held it has removed it in between
    return _lock_file(path)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
