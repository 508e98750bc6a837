"""`acformer reproduce`: the paper's tables, made here."""

import argparse
from pathlib import Path
from typing import Any

from acformer.commands.arguments import positive
from acformer.errors import UsageError


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("reproduce", parents=[common], help="train and score every row of a table of the paper")
    sub.add_argument("table", help="table3, table4, figure1 or successor; with --scores table1 to table5")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the scale's recipe; needs --name")
    sub.add_argument("--name", help="of the table, where it is not the paper's: results go to OUT/NAME-SCALE")
    sub.add_argument(
        "--scale",
        default="cpu",
        help="cpu (a probe is given the tokens), cpu-hard (the same on harder scenes), cpu-smollm2, cpu-smollm2-hard "
        "(SmolLM2-135M reads them) or gpu (default cpu)",
    )
    sub.add_argument("--seeds", type=positive, help="runs a row (default: the plan's)")
    sub.add_argument("--connectors", nargs="+", metavar="NAME", help="train only these connectors' rows")
    sub.add_argument(
        "--tokens", type=positive, nargs="+", metavar="T", help="train only at these of the scale's budgets"
    )
    sub.add_argument(
        "--factors",
        type=float,
        nargs="+",
        metavar="X",
        help="what every row multiplies the connector's learning rate by, each for a part of the steps, to find the "
        "best (default: the scale's); one alone: no search; needs --name",
    )
    sub.add_argument("--jobs", type=positive, help="runs side by side (default: one a core, one on an accelerator)")
    sub.add_argument("--out", type=Path, default=Path("results"), help="tables go to OUT/TABLE-SCALE")
    sub.add_argument("--work", type=Path, default=Path("runs/reproduce"), help="where models lie while they are made")
    sub.add_argument("--keep-models", action="store_true", help="do not delete a model when its scores are known")
    sub.add_argument("--scores", type=Path, help="no training: scores of benchmarks in a folder beside the paper's")
    sub.set_defaults(run=run, resumable=True)


def run(arguments: argparse.Namespace) -> str:
    """The table; an error if a run failed."""
    if arguments.scores is not None:
        from acformer.lab.reproduce.paper_tables import beside_the_paper

        return beside_the_paper(arguments.table, arguments.scores)
    if arguments.table in ("table1", "table2", "table5"):
        raise UsageError(f"{arguments.table} is not trained here: --scores FOLDER puts scores beside the paper's")
    from acformer.lab.reproduce.plans import plan_for

    plan = plan_for(  # before torch, as in `train`
        arguments.table,
        arguments.scale,
        arguments.seeds,
        overrides=arguments.overrides,
        factors=arguments.factors,
        name=arguments.name,
    )
    from acformer.lab.reproduce.run_plan import reproduce

    return reproduce(
        plan,
        arguments.out,
        arguments.work,
        connectors=arguments.connectors,
        budgets=arguments.tokens,
        jobs=arguments.jobs,
        keep_models=arguments.keep_models,
        progress=not arguments.quiet,
    )
