"""Windows and macOS, simulated: modules that they lack, files that they lock; what the packages must hold.

Nothing here has run on either of them.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import psutil
import pytest

from acformer import files, provenance
from acformer.errors import CheckpointError
from acformer.fetch.trained import PLACES
from acformer.hf.checkpoints import load_model, verify_folder, write_manifest

ROOT = Path(__file__).parents[1]
UNIX_ONLY = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "crypt", "posix"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

WITHOUT_THEM = """
import builtins, errno, os, sys
from pathlib import Path

def imported(name, globals=None, *rest, load=builtins.__import__, **named):
    if name in {blocked!r} and (globals or {{}}).get("__name__", "").startswith("acformer"):
        raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)
    return load(name, globals, *rest, **named)

builtins.__import__ = imported

def fsync(descriptor, flush=os.fsync):
    flags = next(line for line in Path(f"/proc/self/fdinfo/{{descriptor}}").read_text().split("\\n") if "flags" in line)
    if int(flags.split()[1], 8) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    flush(descriptor)

os.fsync = fsync
import tiny
import acformer.lab.bench.growth, acformer.lab.quickstart
from acformer.cli import main
from acformer.files import locked, only_process, whole_folder
from acformer.hf.checkpoints import load_model, write_manifest

folder = Path(sys.argv[1])
with locked(folder / "lock"), only_process(folder / "run/.lock"), whole_folder(folder / "model") as part:
    tiny.model().save_pretrained(part)
    tiny.processor().save_pretrained(part)
    write_manifest(part)
tiny.picture().save(folder / "photo.png")
main(["ask", "--quiet", str(folder / "model"), str(folder / "photo.png"), "what?", "--max-new-tokens", "2"])
print("whole:", load_model(str(folder / "model"))[0].num_parameters())
"""


def test_no_module_of_unix_alone_is_imported_at_the_top():
    """Where it is, the import stands in a `try`."""
    for path in (ROOT / "src/acformer").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = {name.name for name in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            assert not names & UNIX_ONLY, path


@pytest.mark.slow
def test_a_model_is_saved_loaded_and_asked_without_these_modules(tmp_path):
    code = WITHOUT_THEM.format(blocked=UNIX_ONLY)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^whole: \d+$", result.stdout, re.MULTILINE)
    assert not (tmp_path / "run").exists()


def test_a_lock_file_is_closed_before_it_is_removed_where_there_are_no_locks(tmp_path, monkeypatch):
    """Windows removes no file that is open."""
    monkeypatch.setattr(files, "fcntl", None)
    remove = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        opened = {os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()}
        if str(path) in opened:
            raise PermissionError(13, "being used by another process", str(path))
        remove(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with files.only_process(tmp_path / "run/.lock"):
        assert (tmp_path / "run/.lock").exists()
    assert not (tmp_path / "run").exists()


def test_a_manifest_holds_no_backslashes(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/file.bin").write_bytes(b"1")
    relative = Path.relative_to
    monkeypatch.setattr(Path, "relative_to", lambda self, *other: PureWindowsPath(relative(self, *other)))
    write_manifest(tmp_path)
    monkeypatch.undo()
    assert verify_folder(tmp_path) is None
    assert '"deep/file.bin"' in (tmp_path / "manifest.json").read_text()


def test_a_path_with_backslashes_is_no_name_of_a_hub():
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load_model(r"C:\runs\nothing\model")


def test_peak_memory_is_in_bytes_everywhere(monkeypatch):
    import resource

    held = provenance.peak_resident_bytes()
    assert psutil.Process().memory_info().rss / 2 < held < psutil.virtual_memory().total
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(sys, "platform", "darwin")
    assert provenance.peak_resident_bytes() == pytest.approx(kib, rel=0.1), "macOS counts in bytes"
    monkeypatch.setitem(sys.modules, "resource", None)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=7))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert provenance.peak_resident_bytes() == 7, "Windows'"


def test_the_readme_survives_on_an_index_page():
    """No link and no image into the repository, no word lost."""
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = readme = "".join((ROOT / one["path"]).read_text(encoding="utf-8") for one in hook["fragments"])
    for one in hook["substitutions"]:
        text = re.sub(one["pattern"], one["replacement"], text)
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    shown = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", readme)
    kept, words = (re.sub(r"\]\([^)]*\)|[\[\]]", "", one).split() for one in (text, shown))
    assert kept == words


def test_the_sdist_has_what_its_tests_read():
    included = {name.strip("/") for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    for path in (ROOT / "tests").rglob("*.py"):
        read = set(re.findall(r"ROOT / \"([^\"/]+)", path.read_text(encoding="utf-8"))) - {"runs", "pyproject.toml"}
        assert read <= included, path
    assert all((ROOT / name).exists() for name in included)
    assert all(name.startswith("/") for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])


def test_the_wheel_has_the_trained_weights_where_they_are_looked_for():
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    places = {(ROOT / "src" / inside).resolve() for inside in included.values()}
    assert {ROOT / folder for folder in included} | places == set(PLACES)


def test_the_package_is_typed():
    assert (ROOT / "src/acformer/py.typed").exists()
    assert PROJECT["project"]["urls"]
