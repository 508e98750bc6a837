"""`acformer connectors`: what there is, and its options."""

import argparse
from typing import Any


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("connectors", parents=[common], help="list the connectors and their options")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """Two lines a connector: what it does, its options with their defaults."""
    from acformer.connectors import CONNECTORS, connector_options

    width, lines = max(map(len, CONNECTORS)), []
    for name, connector in sorted(CONNECTORS.items()):
        options = ", ".join(f"{key}={value}" for key, value in connector_options(name).items())
        lines += [f"{name:<{width}} {(connector.__doc__ or '').splitlines()[0]}", f"{'':<{width}} {options}".rstrip()]
    return "\n".join(lines)
