"""A score as a person reads it: a headline, the doubts, and the parts as tables."""

from collections.abc import Mapping, Sequence
from typing import Any


def score_text(result: Mapping[str, Any]) -> str:
    """Of what `score_answers` gives, with what `compare` gives under `against`."""
    low, high = result["interval"]
    lines = [
        f"{result['benchmark']} {result['score']:.2f} [{low:.2f}, {high:.2f}]  ({result['metric']})",
        f"protocol {result['protocol']}: {result['protocol_does']}",
        f"{result['num_questions']:,} questions about {result['num_images']:,} images; interval: 95 %, over images",
    ]
    if result["note"]:
        lines.append(result["note"])
    if result["blind"] is not None:
        lines.append(f"blind, by the most frequent answers: {result['blind']:.2f}")
    lines.append(_unparsed(result))
    if result["unreadable_images"]:
        lines.append(f"{result['unreadable_images']:,} images could not be read: wrong answers")
    if "against" in result:
        lines.append(_against(result["against"]))
    return "\n".join([*lines, *_parts(result["parts"])])


def budget_table(results: Sequence[Mapping[str, Any]]) -> str:
    """A row for each number of visual tokens, of what `evaluate_benchmark` gives."""
    head = ("tokens", "score", "95 % interval", "visual tokens", "first token", "keys and values")
    rows = [head, *map(_budget_row, results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    first = results[0]
    what = f"{first['benchmark']}, {first['metric']}" if first["score"] is not None else first["benchmark"]
    return "\n".join([what, *lines])


def _budget_row(result: Mapping[str, Any]) -> tuple[str, ...]:
    if result["score"] is None:
        score, interval = "not published", ""
    else:
        low, high = result["interval"]
        score, interval = f"{result['score']:.2f}", f"{low:.2f} to {high:.2f}"
    first, size = result["first_token_ms"], result["kv_bytes_image"] / 2**20
    return (
        str(result["visual_tokens"]),
        score,
        interval,
        f"{result['visual_tokens']} of {result['vision_tokens']}",
        "" if first is None else f"{first:.0f} ms",
        f"{size:.2f} MiB",
    )


def _unparsed(result: Mapping[str, Any]) -> str:
    examples = "; ".join(f"{one['id']} {one['answer'][:60]!r}" for one in result["unparsed_examples"])
    return f"{result['unparsed']:,} answers could not be parsed" + (f": {examples}" if examples else "")


def _against(other: Mapping[str, Any]) -> str:
    low, high = other["interval"]
    return (
        f"against {other['answers']}, {other['score']:.2f}: {other['difference']:+.2f} [{low:+.2f}, {high:+.2f}]; "
        f"better on {other['better']:,} questions, worse on {other['worse']:,}; McNemar's p {other['p']:.2g}"
    )


def _parts(parts: Mapping[str, Any]) -> list[str]:
    """Numbers first, a line each; then groups, as tables where they have columns."""
    plain = {name: value for name, value in parts.items() if not isinstance(value, dict)}
    groups = {name: value for name, value in parts.items() if isinstance(value, dict)}
    lines = [f"{_words(name)}  {_number(value)}" for name, value in plain.items()]
    rows = {name: group for name, group in groups.items() if _is_row(group)}
    if rows and all(group.keys() == next(iter(rows.values())).keys() for group in rows.values()) and len(rows) > 1:
        lines += ["", *_table(rows)]
        groups = {name: group for name, group in groups.items() if name not in rows}
    for name, group in groups.items():
        body = _table(group) if all(isinstance(one, dict) for one in group.values()) else _list(group)
        lines += ["", f"{_words(name)}:", *body]
    return lines


def _is_row(group: Mapping[str, Any]) -> bool:
    return all(isinstance(value, float | int) for value in group.values())


def _list(group: Mapping[str, float]) -> list[str]:
    width = max(map(len, group))
    return [f"  {name:<{width}}  {value:7.2f}" for name, value in group.items()]


def _table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    columns = list(next(iter(rows.values())))
    width = max(map(len, rows))
    head = f"  {'':<{width}}  " + "  ".join(f"{_words(column):>9}" for column in columns)
    body = [
        f"  {name:<{width}}  " + "  ".join(f"{row[column]:{max(9, len(column))}.2f}" for column in columns)
        for name, row in rows.items()
    ]
    return [head, *body]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: Any) -> str:
    return ", ".join(f"{one:.2f}" for one in value) if isinstance(value, list) else f"{value:.2f}"
