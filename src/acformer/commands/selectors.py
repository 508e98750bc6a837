"""`acformer selectors`: the ways to choose the patches that stand for an image."""

import argparse
from typing import Any


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("selectors", parents=[common], help="list the selectors: which patches are queries")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """Two lines a selector: what it chooses by, what it needs of the encoder and whether it can be drawn."""
    from acformer.anchors.selectors import SELECTORS

    def describe(name: str) -> tuple[str, str]:
        selector = SELECTORS[name]
        needs = "needs [CLS] attention" if selector.needs_cls_attention else "any encoder"
        return selector.summary, f"{needs}; drawn at random while training: {selector.drawn}"

    return SELECTORS.listing(describe)
