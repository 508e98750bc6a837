"""Records -> one Markdown page: mean and 95 % interval over seeds, the blind score beside them, failures in words.

Below each table the same by kind of question, and every row less another one, seed by seed (`pairs.py`).
"""

import math
from collections.abc import Sequence
from typing import Any

from acformer.lab.markdown import markdown_table
from acformer.lab.reproduce.measured import AVERAGE, Measured, Score, mean_interval, percent, shown_scores
from acformer.lab.reproduce.pairs import pairs_table
from acformer.lab.reproduce.plans import Plan


def table_text(plan: Plan, cells: Sequence[Measured]) -> str:
    """The whole page of a plan."""
    scale = plan.scale
    parts = [
        f"# {plan.name}, {scale.name} scale",
        plan.asks,
        f"Made by `{plan.command}`: recipe `{scale.recipe}`, the same samples and steps for every row; "
        f"{_rates(plan, cells)} Scores in percent, mean and 95 % interval over seeds (Student's t, where there are "
        "several); *average* is the mean of the families, *blind* what is scored without a look at the image, in each "
        "family the better of the most frequent answers and, of questions about scenes, of a probe that sees nothing. "
        "*step* is the median time of a training step, taken alone, one row after the other; *rate* is the factor of "
        "that learning rate that was best, with < or > where it is the lowest or highest tried and a better one may "
        "lie beyond.",
        scale.note,
    ]
    for data in scale.data:
        parts += [f"## {data}", _verdict(cells, data)]
        for budget in scale.budgets:
            chosen = [cell for cell in cells if cell.budget == budget and cell.fraction == 1]
            parts.append(f"### T = {budget}")
            if any(cell.records for cell in chosen) or all_errors(chosen):
                parts += [_table(chosen, data), _kinds_table(chosen, data), _pairs(plan, chosen, data)]
            else:
                parts.append("Not measured.")
        for fraction in plan.fractions:
            chosen = [cell for cell in cells if cell.fraction == fraction]
            parts += [f"### {fraction:g} of the samples, T = {scale.scaling_budget}", _table(chosen, data)]
    if errors := all_errors(cells):
        parts += ["## Failed", "\n".join(f"- {error}" for error in errors)]
    return "\n\n".join(part for part in [*parts, _machines(cells)] if part) + "\n"


def _rates(plan: Plan, cells: Sequence[Measured]) -> str:
    """How the connector's learning rate was found, in the rows that were run."""
    scale, measured = plan.scale, {cell.name for cell in cells if cell.records}
    borrowing = [row for row in plan.rows if row.rate_of and row.name in measured]
    factors = scale.search.factors
    found = f"is the best of {len(factors)} tried by every row for {scale.search.fraction:g} of the steps"
    if len(factors) == 1:
        found = f"is {factors[0]:g} times the recipe's in every row, without a search"
    elif borrowing:
        borrowers = ", ".join(f"`{row.name}`" for row in borrowing)
        lenders = ", ".join(sorted({f"`{row.rate_of}`" for row in borrowing}))
        found += f" (without a search, at that of {lenders}: {borrowers})"
    if scale.probe is None:
        return f"the connector's learning rate {found}."
    return (
        f"before it, every row's connector was trained with the probe of `{scale.probe}`, whose data and steps are its "
        f"own. There the connector's learning rate {found} (*rate*); after the probe it is the same for all rows."
    )


def _table(cells: Sequence[Measured], data: str) -> str:
    """One line a row, best first; then the blind line, and the names of the rows that were not run."""
    known = [cell for cell in cells if cell.records]
    columns = shown_scores(known[0].records[0]["scores"][data]) if known else {AVERAGE: Score(math.nan)}
    blind = ["" if math.isnan(score.blind) else f"{100 * score.blind:.1f}" for score in columns.values()]
    head = ["connector", "T", *columns, "rate", "weights", "step", "seeds"]
    ranked = sorted(known, key=lambda cell: -mean_interval(cell.values(data))[0])
    ranked.sort(key=lambda cell: not cell.learned(data))
    lines = [_line(cell, data, list(columns)) for cell in ranked]
    missing = [cell for cell in cells if not cell.records]
    lines += [[f"`{cell.name}`", "", "failed", *[""] * (len(head) - 3)] for cell in missing if cell.errors]
    lines.append(["*blind*", "", *blind, "", "", "", ""])
    table = markdown_table(head, lines)
    unknown = ", ".join(f"`{cell.name}`" for cell in missing if not cell.errors)
    return f"{table}\n\nNot measured: {unknown}." if unknown else table


def _kinds_table(cells: Sequence[Measured], data: str) -> str:
    """Accuracy by kind of question, rows as they come; empty where records have no kinds beside families."""
    known = [cell for cell in cells if cell.records and cell.kinds(data)]
    if not known:
        return ""
    kinds = known[0].kinds(data)
    ranked = sorted(known, key=lambda cell: -mean_interval(cell.values(data))[0])
    lines = [[f"`{cell.name}`", *(percent(cell.accuracies(data, kind)) for kind in kinds)] for cell in ranked]
    return "Accuracy by kind of question:\n\n" + markdown_table(["connector", *kinds], lines)


def _pairs(plan: Plan, cells: Sequence[Measured], data: str) -> str:
    """Every row less those that the plan compares with."""
    tables = [table for against in plan.against if (table := pairs_table(cells, against, data))]
    if not tables:
        return ""
    said = (
        "Paired by seed (the same samples in the same order), in points: mean difference, 95 % interval, p of the "
        "paired t-test (of one comparison), each seed, then by kind of question:"
    )
    return "\n\n".join([said, *tables])


def _line(cell: Measured, data: str, columns: Sequence[str]) -> list[str]:
    scores = [percent(cell.values(data, column)) for column in columns]
    if not cell.learned(data):
        scores = [f"did not learn ({scores[0]})", *[""] * (len(columns) - 1)]
    weights, step = cell.median("num_parameters") / 1e6, cell.step()
    tokens = f"{cell.median('num_tokens'):.0f}"
    rates = sorted({_rate(record) for record in cell.records})
    return [
        f"`{cell.name}`",
        tokens,
        *scores,
        *[", ".join(rates)],
        f"{weights:.1f} M",
        "" if math.isnan(step) else f"{step:.3g} s",
        str(len(cell.records)),
    ]


def _rate(record: dict[str, Any]) -> str:
    """`0.3`; `<0.03` or `>10` where the search ended at the end of its range."""
    tried, factor = sorted(record["losses_of_factors"], key=float), record["factor"]
    beyond = "" if len(tried) < 2 else {float(tried[0]): "<", float(tried[-1]): ">"}.get(factor, "")
    return f"{beyond}{factor:g}"


def _verdict(cells: Sequence[Measured], data: str) -> str:
    """Whether the table counts: what all tokens through the MLP come to, against blind."""
    every = [cell for cell in cells if cell.name == "mlp" and cell.fraction == 1 and cell.records]
    if not every:
        return "Whether this table counts is not known: `mlp` over all tokens, its measure, was not run."
    blind = 100 * shown_scores(every[0].records[0]["scores"][data])[AVERAGE].blind
    if not every[0].learned(data):
        return f"This table does not count: `mlp` over all tokens is at the blind level ({blind:.1f})."
    return f"`mlp` over all tokens: {percent(every[0].values(data))} (aim 85); blind: {blind:.1f} (aim under 40)."


def all_errors(cells: Sequence[Measured]) -> list[str]:
    """What went wrong, each once: cells of one row share its timing."""
    return list(dict.fromkeys(error for cell in cells for error in cell.errors))


def _machines(cells: Sequence[Measured]) -> str:
    """Where and with what the records were made."""
    scores = _made_on([record for cell in cells for record in cell.records])
    steps = _made_on([cell.timing for cell in cells if cell.timing])
    return "\n\n".join(f"{what} on: {where}." for what, where in (("Measured", scores), ("Timed", steps)) if where)


def _made_on(records: Sequence[dict[str, Any]]) -> str:
    keys = ("device", "machine", "torch", "transformers", "commit")
    return "; ".join(sorted({", ".join(f"{key} {record[key]}" for key in keys) for record in records}))
