"""`acformer bench`: what anchors cost."""

import argparse
from pathlib import Path
from typing import Any

from acformer.commands.arguments import positive


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("bench", parents=[common], help="time the [CLS] row and the selector, side by side")
    sub.add_argument("what", choices=["encoder"])
    sub.add_argument("--batch", type=positive, nargs="+", default=[1, 8])
    sub.add_argument("--num-anchors", type=positive, default=144)
    sub.add_argument("--rounds", type=positive, default=7)
    sub.add_argument("--variants", nargs="+", choices=["floor", "cls_row", "anchors", "all_layers", "authors"])
    sub.add_argument("--out", type=Path, default=Path("results/bench"))
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """The table of times."""
    from acformer.bench import bench_encoder

    return bench_encoder(arguments.batch, arguments.num_anchors, arguments.rounds, arguments.out, arguments.variants)
