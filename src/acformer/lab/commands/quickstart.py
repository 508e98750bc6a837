"""`acformer quickstart`: from nothing to answers about images."""

import argparse
from pathlib import Path
from typing import Any

from acformer.commands.arguments import positive


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("quickstart", parents=[common], help="fetch, train `tiny`, evaluate, ask, draw")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys to change")
    sub.add_argument("--out", default="runs/quickstart", type=Path, help="where everything is written")
    sub.add_argument("--limit", type=positive, default=2400, help="how many test questions (default 2400)")
    sub.set_defaults(run=run)  # not resumable: it starts anew, so that its seconds are those of the whole


def run(arguments: argparse.Namespace) -> None:
    """It prints its report itself."""
    from acformer.lab.quickstart import quickstart

    quickstart(arguments.out, arguments.overrides, limit=arguments.limit, progress=not arguments.quiet)
