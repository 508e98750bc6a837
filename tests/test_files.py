"""Files and folders are whole or absent, one process at a time, and errors of other libraries are one line of ours."""

import errno
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from acformer.errors import CheckpointError, DataError, UsageError, one_line, translated
from acformer.files import locked, only_process, whole_file, whole_folder, write_text

HOLD = """
import sys
from pathlib import Path
from acformer.files import only_process
with only_process(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_written_at_once(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old\n")
    with suppress(ZeroDivisionError), whole_file(path) as part:
        part.write_text("half")
        assert path.read_text() == "old\n"
        raise ZeroDivisionError
    assert path.read_text() == "old\n"
    write_text(path, "new\n")
    assert path.read_bytes() == b"new\n"
    assert left(tmp_path) == {"a.txt"}


def test_what_was_written_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """As Windows wants it: a file that is open for reading cannot be flushed there."""
    import fcntl

    flushed = []

    def fsync(descriptor: int) -> None:
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a.txt", "text")
    with whole_folder(tmp_path / "b") as part:
        (part / "deep").mkdir()
        (part / "deep/c.txt").write_text("text")
    assert flushed == [".a.txt.partial", "c.txt"]


def test_a_disk_without_room_names_the_file(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match="No space") as caught, whole_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(path)


def test_a_folder_is_replaced_at_once(tmp_path):
    folder = tmp_path / "model"
    with whole_folder(folder) as part:
        (part / "one").touch()
    with suppress(ZeroDivisionError), whole_folder(folder) as part:
        (part / "two").touch()
        assert left(folder) == {"one"}
        raise ZeroDivisionError
    assert left(folder) == {"one"}
    with whole_folder(folder) as part:
        (part / "two").touch()
    assert left(folder) == {"two"}
    assert left(tmp_path) == {"model"}


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one_to_be_found(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    with whole_folder(folder) as part:
        (part / "one").touch()
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: rename(self, to) if self == folder else 1 / 0)
    with pytest.raises(ZeroDivisionError), whole_folder(folder) as part:
        (part / "two").touch()
    assert left(tmp_path) == {".model.replaced"}


def test_threads_wait_for_one_another(tmp_path):
    order = []

    def second() -> None:
        with locked(tmp_path / "lock"):
            order.append("second")

    with locked(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.fixture
def holder(tmp_path):
    """A process that is inside `only_process`, and its lock file."""
    lock = tmp_path / "run/.lock"
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process, lock
        process.kill()


def test_a_second_process_is_refused_until_the_first_has_gone(holder):
    process, lock = holder
    with pytest.raises(BlockingIOError), only_process(lock):
        pass
    process.communicate()
    assert not lock.parent.exists(), "nothing is left of it"
    with only_process(lock):
        assert lock.exists()


def test_the_lock_of_a_process_that_was_killed_is_free(holder):
    process, lock = holder
    process.kill()
    process.wait()
    assert lock.exists()
    with only_process(lock):
        (lock.parent / "kept").touch()
    assert left(lock.parent) == {"kept"}


def test_where_no_lock_can_be_had_there_is_none(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "file").touch()
    with only_process(tmp_path / "file/.lock"):  # cannot be made
        pass
    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with only_process(tmp_path / "run/.lock"):
        pass


def test_errors_of_other_libraries_become_ours():
    with (
        pytest.raises(CheckpointError, match=r"^cannot load 'x': two lines$"),
        translated("cannot load 'x'", CheckpointError),
    ):
        raise RuntimeError("two\nlines")
    with pytest.raises(DataError, match=r"^as it was$"), translated("cannot load", CheckpointError):
        raise DataError("as it was")
    with pytest.raises(ZeroDivisionError), translated("no number", UsageError, ValueError, TypeError):
        _ = 1 / 0
    with pytest.raises(UsageError, match=r"^stage: wrong$"), translated("stage", UsageError, UsageError):
        raise UsageError("wrong")


def test_an_exception_in_one_line():
    assert one_line(MemoryError()) == "MemoryError"
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError("long " * 100), 20) == "long long long lo..."
