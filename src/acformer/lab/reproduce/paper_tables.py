"""Scores of any models beside those that the paper prints: `acformer reproduce table1 --scores FOLDER`.

No training and no drawn scenes: what is read are the scores that `acformer eval` writes (`scores.json`) and that
`acformer score --json` prints, of the published benchmarks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from acformer.benchmarks import BENCHMARKS
from acformer.benchmarks.benchmark import LLAVA
from acformer.benchmarks.records import read_json
from acformer.errors import DataError, unknown_name
from acformer.lab import paper

Key = tuple[Any, ...]
SEVEN_B, THIRTEEN_B = "vicuna-7b", "vicuna-13b"


@dataclass(frozen=True)
class PaperTable:
    """Rows of the paper under (language model or data, connector, tokens)."""

    columns: tuple[str, ...]
    rows: Mapping[Key, paper.Scores]


def _of_tables_1_2(tokens: int, columns: str) -> PaperTable:
    """`paper.py` has both tables as one: Table 1 is its rows with 145 tokens, Table 2 those with 257."""
    rows = {key: row for key, row in paper.TABLES_1_2.items() if key[2] in (tokens, 577)}
    return PaperTable(tuple(columns.split()), rows)


TABLES = {
    "table1": _of_tables_1_2(145, "POPE MME MMB MM-Vet TextVQA GQA"),
    "table2": _of_tables_1_2(257, "TextVQA GQA VQAv2 VizWiz SQA-img"),
    "table3": PaperTable(
        ("TextVQA", "GQA", "MMB", "MME"),
        {(SEVEN_B, *key): row for key, row in paper.TABLE3.items()}
        | {(THIRTEEN_B, *key): row for key, row in paper.TABLE3_13B.items()},
    ),
    "table4": PaperTable(("TextVQA", "GQA", "MMB", "MME"), {(SEVEN_B, *key): row for key, row in paper.TABLE4.items()}),
    "table5": PaperTable(
        ("TextVQA", "GQA", "OKVQA", "VQAv2", "VizWiz", "MME"), {(*key, 145): row for key, row in paper.TABLE5.items()}
    ),
}


@dataclass
class ModelRow:
    """One model at one number of visual tokens: its scores, and the protocol of those that are not LLaVA's."""

    connector: str | None = None
    tokens: int | None = None
    scores: dict[str, float] = field(default_factory=dict)
    protocols: dict[str, str] = field(default_factory=dict)


def beside_the_paper(name: str, folder: Path) -> str:
    """A Markdown table: a row a model, a cell `ours / the paper's (difference)`, and what is missing.

    A model stands beside the paper's row that its name is (`vicuna-7b acformer 145`, also with `-` between), else the
    one with its connector and the nearest number of tokens, else that of `acformer`.

    Raises:
        UsageError: another table.
        DataError: no scores in the folder, or two of one model and benchmark.
    """
    if name not in TABLES:
        raise unknown_name("table of scores", name, TABLES)
    table, models = TABLES[name], read_models(folder)
    head = ["model", "beside the paper's", *table.columns]
    lines = [f"Ours / the paper's (difference), {name}; scores from {folder}.", ""]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for model, row in models.items():
        key = _beside(model, row, table)
        cells = [_cell(row, column, table.rows[key].get(column)) for column in table.columns]
        lines.append(f"| {' | '.join([model, _label(key), *cells])} |")
    return "\n".join(lines)


def read_models(folder: Path) -> dict[str, ModelRow]:
    """The scores of each model in a folder, found by what the files hold; of a run's first questions alone: none.

    A model is what `acformer eval` was given, and its number of visual tokens; for a file of `acformer score` it is the
    folder under `folder` in which the file lies.
    """
    models: dict[str, ModelRow] = {}
    sources: dict[tuple[str, str], Path] = {}
    for path, result in _results(folder):
        model, tokens = result.get("model"), result.get("visual_tokens")
        name = f"{model or _folder_name(folder, path)}{f' at {tokens}' if tokens else ''}"
        column = BENCHMARKS[result["benchmark"]].column
        if (other := sources.setdefault((name, column), path)) != path:
            raise DataError(f"two scores of {name} in {column}: {other} and {path}")
        row = models.setdefault(name, ModelRow(result.get("connector"), tokens))
        row.scores[column] = result["score"]
        if result["protocol"] != LLAVA:
            row.protocols[column] = result["protocol"]
    if not models:
        raise DataError(
            f"{folder} holds no scores: write some with acformer eval, or acformer score --json > FILE.json"
        )
    return models


def _results(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.rglob("*.json")):
        result = read_json(path)
        is_score = isinstance(result, dict) and {"benchmark", "score", "protocol"} <= result.keys()
        of_table = is_score and result["benchmark"] in BENCHMARKS.names()  # not of somebody's own data
        if of_table and result["score"] is not None and not result.get("limit"):
            yield path, result


def _folder_name(folder: Path, path: Path) -> str:
    parts = path.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else folder.resolve().name


def _beside(model: str, row: ModelRow, table: PaperTable) -> Key:
    for key in table.rows:
        if model.replace("-", " ") == _label(key).replace("-", " "):
            return key
    fitting = [key for key in table.rows if key[1] == row.connector] or [
        key for key in table.rows if key[1] == "acformer"
    ]
    return min(fitting, key=lambda key: abs(key[2] - (row.tokens or key[2])))


def _label(key: Key) -> str:
    return " ".join(map(str, key))


def _cell(row: ModelRow, column: str, paper_score: float | None) -> str:
    ours = row.scores.get(column)
    theirs = "not in the paper" if paper_score is None else f"{paper_score:g}"
    if ours is None:
        return f"missing / {theirs}"
    protocol = f" ({row.protocols[column]})" if column in row.protocols else ""
    difference = "" if paper_score is None else f" ({ours - paper_score:+.2f})"
    return f"{ours:.2f}{protocol} / {theirs}{difference}"
