"""Tables of figures as Markdown."""

from collections.abc import Iterable
from typing import Any


def markdown_table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A header, its rule and the rows, one line each; floats in six digits, None as an empty cell."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
