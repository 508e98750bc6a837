"""Would a test notice? The wiring of a run is changed in one place at a time, and the tests that ought to fail are run.

    python tests/mutants.py                    all of mutants.toml; mutants-results.json keeps what is done
    python tests/mutants.py --only elastic     those whose file, texts or tests hold the word
    python tests/mutants.py --again            survivors once more, after a test was written

A mutant dies when a test fails; of one whose tests take longer than `--timeout` nothing is known. One that breaks
nothing says why (`equivalent`) and is not run.

Nothing on disk is changed. A server imports torch, transformers, this package and the tests; a process forked from it
for each mutant puts the changed code into the functions that are there, whoever has imported them, and runs pytest. So
a change must lie within a function, and tests that start a Python of their own do not see it.
"""

import argparse
import json
import multiprocessing
import os
import re
import shlex
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
RAN = 10
"""Added to what pytest ends with: a process that fails before it ends with 1, too."""
NOTICED = (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
"""A run that a signal has stopped raises KeyboardInterrupt, which interrupts pytest."""
ELSEWHERE = "gpu hub embedded conformance extras benchmarks lmms_eval serve vllm"
"""Markers of tests that need what may not be here. Slow ones count."""
MARKED = " and ".join(f"not {name}" for name in ELSEWHERE.split())
QUIETLY = f"-x -q -m '{MARKED}' -p no:cacheprovider -p no:xdist -W ignore::pytest.PytestAssertRewriteWarning"


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

    @property
    def module(self) -> str:
        """The module that the file is."""
        return f"acformer.{self.file.removesuffix('.py').replace('/', '.')}"


def read_mutants() -> list[Mutant]:
    """All of `mutants.toml`."""
    files = tomllib.loads((HERE / "mutants.toml").read_text(encoding="utf-8"))
    return [Mutant(file, **entry) for file, entries in files.items() for entry in entries]


def put_in(mutant: Mutant) -> None:
    """The change into the functions of the module, in this process; `ValueError` where it is not within one."""
    module = import_module(mutant.module)
    path = Path(module.__file__ or "")
    before = path.read_text(encoding="utf-8")
    if (count := before.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.old!r} is {count} times in {mutant.file}")
    old, new = (
        _outermost(compile(text, str(path), "exec")) for text in (before, before.replace(mutant.old, mutant.new))
    )
    changed = {name for name in new if name not in old or _meaning(old[name]) != _meaning(new[name])}
    for function in _functions(module):
        if function.__code__.co_qualname in changed and function.__code__.co_filename == str(path):
            changed.remove(function.__code__.co_qualname)
            function.__code__ = new[function.__code__.co_qualname]
    if changed or old.keys() != new.keys():
        raise ValueError(f"{mutant.file}: a change to {changed}, where no function is found")


def _outermost(code: CodeType) -> dict[str, CodeType]:
    """The functions of a module and of its classes by their names; what is defined within them belongs to them."""
    found = {}
    for one in code.co_consts:
        if isinstance(one, CodeType):
            is_class = "__module__" in one.co_names and one.co_names[:1] == ("__name__",)
            found |= _outermost(one) if is_class else {one.co_qualname: one}
    return found


def _meaning(code: CodeType) -> tuple:
    """All of it but the lines where it stands."""
    constants = tuple(_meaning(one) if isinstance(one, CodeType) else (type(one), one) for one in code.co_consts)
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """Each once, also those in classes and behind decorators."""
    seen: set[int] = set()
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    waiting: list[Any] = [value for owner in (module, *classes) for value in vars(owner).values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, FunctionType) and id(value) not in seen:
            seen.add(id(value))
            yield value
        inner = (getattr(value, name, None) for name in ("__wrapped__", "__func__", "fget", "func"))
        waiting += [one for one in inner if callable(one) and id(one) not in seen]


def run_tests(mutant: Mutant, log: str) -> None:
    """In a process of its own: the change, then its tests."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(HERE.parent)
    put_in(mutant)
    arguments = [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(mutant.tests)]
    code = int(pytest.main([*shlex.split(QUIETLY), *arguments]))
    sys.stdout.flush()
    os._exit(RAN + code)


def outcome(mutant: Mutant, log: Path, seconds: float) -> str:
    """`died`, `survived`, or why neither can be said."""
    process = multiprocessing.get_context("forkserver").Process(target=run_tests, args=(mutant, str(log)))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return "not ended"
    code = (process.exitcode or 0) - RAN
    if code == pytest.ExitCode.OK or code in NOTICED:
        return "died" if code else "survived"
    return f"broken: {log.read_text(encoding='utf-8').strip()[-300:]}"


def main() -> None:
    """Run, print a line a mutant, and say how many of how many died."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word of the mutants to run")
    parser.add_argument("--again", action="store_true", help="also what has survived before")
    parser.add_argument("--results", type=Path, default=HERE / "mutants-results.json")
    parser.add_argument("--timeout", type=float, default=240, help="seconds a mutant")
    options = parser.parse_args()
    mutants = read_mutants()
    chosen = [mutant for mutant in mutants if options.only in json.dumps(asdict(mutant)) and not mutant.equivalent]
    modules = {mutant.module for mutant in chosen}
    tests = {name for mutant in chosen for name in re.findall(r"(test_\w+)\.py", mutant.tests)}
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (SOURCE, HERE)))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(["torch._dynamo", "peft", "conftest", *sorted(modules), *sorted(tests)])
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for mutant in chosen:
            known = results.get(mutant.key)
            if known == "died" or (known == "survived" and not options.again):
                continue
            started = time.monotonic()
            results[mutant.key] = said = outcome(mutant, Path(folder) / "log.txt", options.timeout)
            seconds = time.monotonic() - started
            sys.stdout.write(f"{said:<9}{seconds:5.0f} s  {mutant.file}: {mutant.new.strip()[:80]!r}\n")
            sys.stdout.flush()
            options.results.write_text(json.dumps(results, indent=1) + "\n")
    ran = Counter(results.get(mutant.key, "not run").split(":")[0] for mutant in mutants if not mutant.equivalent)
    equivalent = sum(bool(mutant.equivalent) for mutant in mutants)
    sys.stdout.write(f"{ran['died']} of {ran.total()} die {dict(ran)}; {equivalent} more are equivalent\n")


if __name__ == "__main__":
    main()
