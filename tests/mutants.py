"""Would a test notice? The wiring of a run is changed in one place at a time, and the tests that ought to fail are run.

    python tests/mutants.py                    all of mutants.toml; mutants-results.json keeps what is done
    python tests/mutants.py --only elastic     those whose file, texts or tests hold the word
    python tests/mutants.py --again            survivors once more, after a test was written

The changes are made in a copy of the package; the tests are those of this folder. A mutant dies when a test fails; of
one whose tests take longer than `--timeout` nothing is known. One that breaks nothing says why (`equivalent`) and is
not run.

torch, transformers and PEFT are loaded once, in a server from which a process is forked for every mutant.
"""

import argparse
import compileall
import json
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
import tomllib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PRELOADED = [
    *("torch", "torch._dynamo", "transformers.trainer", "accelerate", "peft", "scipy.stats", "PIL.Image"),
    *("beartype", "jaxtyping", "hypothesis"),
    *(f"transformers.models.{name}" for name in ("auto.modeling_auto", "clip.modeling_clip", "llama.modeling_llama")),
]
RAN = 10
"""Added to what pytest ends with: a process that fails before it ends with 1, too."""
NOTICED = (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
"""A run that a signal has stopped raises KeyboardInterrupt, which interrupts pytest."""
QUIETLY = "-x -q -p no:cacheprovider -p no:xdist -W ignore::pytest.PytestAssertRewriteWarning"


@dataclass(frozen=True)
class Mutant:
    """A change to one file of the package, and the tests that ought to notice it, as pytest's arguments."""

    file: str
    old: str
    new: str
    tests: str = ""
    equivalent: str = ""

    @property
    def key(self) -> str:
        """Another one where anything of the change is another."""
        return json.dumps([self.file, self.old, self.new])


def read_mutants() -> list[Mutant]:
    """All of `mutants.toml`."""
    files = tomllib.loads((HERE / "mutants.toml").read_text(encoding="utf-8"))
    return [Mutant(file, **entry) for file, entries in files.items() for entry in entries]


def run_tests(package: str, arguments: list[str], log: str) -> None:
    """In a process of its own: the tests, with the package from this folder."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["PYTHONPATH"] = package
    sys.path.insert(0, package)
    os.chdir(HERE.parent)
    code = int(pytest.main([*QUIETLY.split(), *arguments]))
    sys.stdout.flush()
    os._exit(RAN + code)


def outcome(mutant: Mutant, package: Path, seconds: float) -> str:
    """`died`, `survived`, or why neither can be said; the file is afterwards as it was."""
    path, log = package / "acformer" / mutant.file, package / "log.txt"
    source = path.read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        return f"stale: {mutant.old!r} is {source.count(mutant.old)} times in the file"
    arguments = [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(mutant.tests)]
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=run_tests, args=(str(package), arguments, str(log)))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return "not ended"
    finally:
        path.write_text(source, encoding="utf-8")
    code = process.exitcode - RAN
    if code == pytest.ExitCode.OK or code in NOTICED:
        return "died" if code else "survived"
    return f"broken: pytest ended with {code}: {log.read_text(encoding='utf-8')[-300:]}"


def main() -> None:
    """Run, print a line a mutant, and say how many of how many died."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word of the mutants to run")
    parser.add_argument("--again", action="store_true", help="also what has survived before")
    parser.add_argument("--results", type=Path, default=HERE / "mutants-results.json")
    parser.add_argument("--timeout", type=float, default=240, help="seconds a mutant")
    options = parser.parse_args()
    multiprocessing.set_forkserver_preload(PRELOADED)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        package = Path(shutil.copytree(HERE.parent / "src", Path(folder) / "src"))
        compileall.compile_dir(package, quiet=1)
        for mutant in read_mutants():
            if options.only not in json.dumps(asdict(mutant)) or mutant.equivalent:
                continue
            known = results.get(mutant.key)
            if known == "died" or (known == "survived" and not options.again):
                continue
            started = time.monotonic()
            results[mutant.key] = said = outcome(mutant, package, options.timeout)
            seconds = time.monotonic() - started
            sys.stdout.write(f"{said:<9}{seconds:5.0f} s  {mutant.file}: {mutant.new.strip()[:80]!r}\n")
            sys.stdout.flush()
            options.results.write_text(json.dumps(results, indent=1) + "\n")
    mutants = read_mutants()
    ran = Counter(results.get(mutant.key, "not run").split(":")[0] for mutant in mutants if not mutant.equivalent)
    equivalent = sum(bool(mutant.equivalent) for mutant in mutants)
    sys.stdout.write(f"{ran['died']} of {ran.total()} die {dict(ran)}; {equivalent} more are equivalent\n")


if __name__ == "__main__":
    main()
