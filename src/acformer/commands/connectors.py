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

    def describe(name: str) -> tuple[str, str]:
        options = ", ".join(f"{key}={value}" for key, value in connector_options(name).items())
        return (CONNECTORS[name].__doc__ or "").strip().partition("\n")[0], options

    return CONNECTORS.listing(describe)
