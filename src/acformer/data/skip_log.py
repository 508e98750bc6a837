"""Which records a run leaves out, and when they are too many."""

import json
import os
import shutil
from pathlib import Path

from acformer.errors import DataError
from acformer.files import locked

FsPath = str | os.PathLike[str]
SKIPPED = "skipped.jsonl"
"""The log's name in a stage's folder, and in a checkpoint: what was skipped until then."""


class SkipLog:
    """Counts what was offered and skipped: used + skipped = offered, also when an image turns out bad late.

    The file at `path` is shared by the copies in loaders' workers and by the processes of a distributed run: a record
    is written there once and counted by all. `fresh` removes an older file. Without a path, each copy is on its own.
    """

    def __init__(self, path: FsPath | None = None, *, max_bad_fraction: float = 0.01, fresh: bool = True) -> None:
        self.path = None if path is None else Path(path)
        self.max_bad_fraction = max_bad_fraction
        self.offered = 0
        self._reasons: dict[tuple[str, int], str] = {}
        self._inode, self._end = -1, 0  # which file the reasons are from, and how much of it was read
        if self.path is not None and fresh:
            self.path.unlink(missing_ok=True)

    @property
    def skipped(self) -> int:
        """How many records were skipped."""
        return len(self._known())

    @property
    def used(self) -> int:
        """How many records were not skipped."""
        return self.offered - self.skipped

    def skip(self, file: str, record: int, reason: str) -> None:
        """Write down that a record is left out, unless that is known."""
        if self.path is None:
            self._reasons.setdefault((file, record), reason)
            return
        with locked(self.path):
            if (file, record) not in self._known():
                with self.path.open("a", encoding="utf-8") as log:
                    log.write(json.dumps({"file": file, "record": record, "reason": reason}) + "\n")

    def copy_to(self, folder: Path) -> None:
        """What is written down by now, as a file of the same name there; nothing if nothing was skipped."""
        if self.path is not None and self.path.exists():
            with locked(self.path):
                shutil.copy(self.path, folder)

    def check(self) -> None:
        """`DataError` once more than `max_bad_fraction` of the records offered were skipped."""
        if self.skipped > self.max_bad_fraction * self.offered:
            (file, record), reason = next(iter(self._reasons.items()))
            where = "" if self.path is None else f", all in {self.path}"
            raise DataError(
                f"{self.skipped} of {self.offered} records are bad, more than {self.max_bad_fraction:.1%}; "
                f"the first is {file}:{record}: {reason}{where}"
            )

    def _known(self) -> dict[tuple[str, int], str]:
        """The reasons of all records skipped so far, whoever wrote them down."""
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as log:
                inode = os.fstat(log.fileno()).st_ino
                if inode != self._inode:  # the first to be read, or an older one was removed since
                    self._inode, self._end, self._reasons = inode, 0, {}
                log.seek(self._end)
                while (line := log.readline()).endswith(b"\n"):
                    entry = json.loads(line)
                    self._reasons[entry["file"], entry["record"]] = entry["reason"]
                    self._end += len(line)
        return self._reasons
