"""Answers on disk as they come, so that an evaluation that was stopped goes on where it was."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from acformer.files import write_text


def resumed(path: Path, settings: dict[str, Any], answers: Callable[[int], Iterable[str]]) -> Iterator[str]:
    """The answers that a stopped evaluation has left in `path`, then those that `answers(how many)` gives.

    Args:
        path: a JSON line of settings, then one an answer; removed when all were given.
        settings: what is asked of which model. Answers under other settings are not gone on from.
        answers: from the number of answers that are there to those that follow.
    """
    done = _answers_so_far(path, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(map(_line, [settings, *done])))
    yield from done
    with path.open("a", encoding="utf-8") as file:
        for said in answers(len(done)):
            file.write(_line(said))
            file.flush()
            yield said
    path.unlink()


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True) + "\n"


def _answers_so_far(path: Path, settings: dict[str, Any]) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # a line without its end is not whole
    try:
        before, *done = map(json.loads, lines)
    except ValueError:
        return []
    return done if before == settings and all(isinstance(said, str) for said in done) else []
