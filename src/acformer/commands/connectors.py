"""`acformer connectors`: what there is, and its options."""

import argparse
from typing import Any


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("connectors", parents=[common], help="list the connectors and their options")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """Two lines a connector: what it does, its options with their defaults."""
    from acformer.connectors import CONNECTORS, connector_options, list_connectors

    names: list[str] = list_connectors()
    width, lines = max(map(len, names)), list[str]()
    for name in names:
        options = ", ".join(f"{key}={value}" for key, value in connector_options(name).items())
        idea = (CONNECTORS[name].__doc__ or "").strip().partition("\n")[0]
        lines += [f"{name:<{width}} {idea}", f"{'':<{width}} {options}".rstrip()]
    return "\n".join(lines)
