"""Runs a command of the bench in each dtype and writes down what came of it, with where and how it was measured."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from acformer.files import write_text
from acformer.lab.bench.result_page import table
from acformer.lab.bench.settings import Settings, dtype_name
from acformer.lab.bench.timing import Result
from acformer.provenance import device_name, machine


def bench(every: list[Settings], out: Path) -> str:
    """Rows of all settings (one a dtype) as a table; the same in `<out>/<what>-<preset>-<device>.json`."""
    first = every[0]
    command = import_module(f"acformer.lab.bench.{first.what}")
    rows: list[Result] = []
    for settings in every:
        rows += [{"dtype": dtype_name(settings.dtype), **row} for row in command.rows(settings)]
    record = {
        "what": first.what,
        "command": first.command([settings.dtype for settings in every]),
        **first.preset.describe(),
        **machine(first.device),
        "rounds": first.rounds,
        "rows": rows,
    }
    device = "-".join(device_name(first.device).lower().split())
    path = save_record(record, out / f"{first.what}-{first.preset.name}-{device}.json")
    return f"{table(record)}\n{path}"


def save_record(record: dict[str, Any], path: Path) -> Path:
    """One row a line, so that a change of one is a change of one line."""
    head = json.dumps({**record, "rows": []}, indent=1).removesuffix('"rows": []\n}')
    rows = ",\n".join(f"  {json.dumps(row)}" for row in record["rows"])
    write_text(path, f'{head}"rows": [\n{rows}\n ]\n}}\n')
    return path
