"""The JSON of the bench as Markdown: one table a file, and all of a folder on one page."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acformer.errors import DataError
from acformer.lab.markdown import markdown_table

Result = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a command's rows are shown: what the page says first, what labels a line, what stands in its cells.

    spread: the label that becomes columns, one for each value with its batch; then every cell is milliseconds and
    the ratio to the roofline's.
    """

    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    spread: str | None = None


TIMES = ("ms", "x floor", "peak MiB")
LAYOUTS = {
    "encoder": Layout("[CLS] row and anchors", ("dtype", "batch", "variant"), ("x plain", *TIMES)),
    "selector": Layout("Selectors", ("dtype", "batch", "chosen", "way"), ("ATen calls", "x copy", "ms", "peak MiB")),
    "connector": Layout(
        "Connectors", ("dtype", "batch", "pass", "connector", "tokens"), ("weights", "x mlp", "floor ms", *TIMES)
    ),
    "train": Layout(
        "A step of stage 1",
        ("dtype", "batch", "features", "connector", "tokens"),
        ("speed", "floor speed", "share", "floor ms", *TIMES),
    ),
    "generate": Layout("From image to token", ("dtype", "connector", "tokens"), ("KV MiB an image",), "part"),
    "growth": Layout("Growth with N", ("dtype", "batch", "patches", "way"), ("x ours", "floor ms", *TIMES)),
}
CELLS: dict[str, Callable[[Result], Any]] = {
    "ms": lambda row: row.get("error") or row["ms"],
    "floor ms": lambda row: row.get("floor_ms"),
    "x floor": lambda row: row.get("x_floor"),
    "peak MiB": lambda row: row.get("peak_mib"),
    "ATen calls": lambda row: row["aten_calls"],
    "weights": lambda row: f"{row['parameters'] / 1e6:.3g} M",
    "speed": lambda row: f"{row['speed']:.2f}",
    "floor speed": lambda row: f"{row['floor_speed']:.2f}",
    "share": lambda row: f"{100 * row['share']:.0f} %",
    "KV MiB an image": lambda row: row["kv_mib_image"],
    **{f"x {base}": lambda row: _ratio(row) for base in ("plain", "copy", "mlp", "ours")},
}


def table(record: dict[str, Any]) -> str:
    """A record's rows."""
    layout = LAYOUTS[record["what"]]
    lines = [_line(layout, [row]) for row in record["rows"]]
    if layout.spread is not None:
        groups: dict[tuple, list[Result]] = {}
        for row in record["rows"]:
            groups.setdefault(tuple(row[label] for label in layout.labels), []).append(row)
        lines = [_line(layout, rows) for rows in groups.values()]
    columns = max(lines, key=len)
    return markdown_table(columns, [[line.get(column) for column in columns] for line in lines])


def page(folder: Path) -> str:
    """Every record in the folder as a section with its table, its command and where it was measured.

    Raises:
        DataError: the folder holds none.
    """
    records = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    ours = {path: record for path, record in records.items() if isinstance(record, dict) and "what" in record}
    if not ours:
        raise DataError(f"{folder} holds no results: run `acformer bench encoder` or another command first")
    order = sorted(ours.items(), key=lambda item: ([*LAYOUTS].index(item[1]["what"]), item[0]))
    return "\n\n".join([HEAD, *(_section(path, record) for path, record in order)]) + "\n"


HEAD = """# What it costs

Made by `acformer bench summary` from the JSON files beside it; [docs/bench.md](../../docs/bench.md) says what each
command measures and how to read the rooflines. All models have random weights: speed does not depend on them. Times are
medians; each ratio is the median of its rounds' own ratios, with their quartiles in brackets. The roofline's time
(*floor*) is arithmetic over the measured rate of a matrix product, or bytes over the measured rate of memory, whichever
is more; a selector has none, but a copy of its scores beside it."""


def _section(path: Path, record: dict[str, Any]) -> str:
    measured = {row["dtype"]: row for row in record["rows"] if "gflop_per_s" in row}.values()
    rates = (f"{row['dtype']} {row['gflop_per_s']:g} GFLOP/s, memory {row['gb_per_s']:g} GB/s" for row in measured)
    about = f"{record['vision']}; {record['text']}. {record['rounds']} rounds. Measured rates: {'; '.join(rates)}."
    title = f"## {LAYOUTS[record['what']].title}: {record['preset']}"
    made_by = f"`{record['command']}` -> [{path.name}]({path.name})"
    return "\n\n".join([title, about, table(record), made_by, measured_on(record)])


def measured_on(record: dict[str, Any]) -> str:
    """Device, machine, versions and commit of a record."""
    versions = [f"{key} {record[key]}" for key in ("python", "torch", "transformers", "commit")]
    facts = [record.get("device"), record["machine"], *versions, record.get("changes")]
    return "; ".join(str(fact) for fact in facts if fact)


def _line(layout: Layout, rows: list[Result]) -> dict[str, Any]:
    """Column -> cell, for one line of the table."""
    line = {label: rows[0][label] for label in layout.labels}
    line |= {name: CELLS[name](rows[0]) for name in layout.columns}
    if layout.spread is None:
        return line
    return line | {f"{row[layout.spread]} @{row['batch']}, ms (x floor)": _time(row) for row in rows}


def _time(row: Result) -> str:
    return f"{row['ms']:g} ({row['x_floor']:g})" if "x_floor" in row else f"{row['ms']:g}"


def _ratio(row: Result) -> str | None:
    if "ratio" not in row:
        return None
    low, high = row["ratio_quartiles"]
    return f"{row['ratio']:g} ({low:g} .. {high:g})"
