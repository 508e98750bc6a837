"""`acformer ask`: questions about a picture."""

import argparse
from pathlib import Path
from typing import Any

from acformer.commands.arguments import add_model, load


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("ask", parents=[common], help="ask questions about a picture")
    add_model(sub, max_new_tokens=128)
    sub.add_argument("image", type=Path)
    sub.add_argument("questions", nargs="+", metavar="question", help="more than one are turns of one dialogue")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """The answers are printed as they are made."""
    from acformer.images import load_image

    load_image(arguments.image)  # a bad picture is told before the model is loaded
    from acformer.evaluate.generate import converse

    limits = {"num_visual_tokens": arguments.tokens, "max_new_tokens": arguments.max_new_tokens}
    model, processor = load(arguments)
    for _ in converse(model, processor, arguments.image, arguments.questions, **limits, stream=True):
        pass
