"""`acformer eval`: answers to a data set, and their scores."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from acformer.commands.arguments import add_model, load, positive


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("eval", parents=[common], help="answer a data set and score the answers")
    add_model(sub, max_new_tokens=16)
    names = "easy-vqa, openmoji-scenes[-small][:PART], or a LLaVA / chat JSON file (default easy-vqa)"
    sub.add_argument("--data", default="easy-vqa", help=names)
    sub.add_argument("--out", type=Path, help="where predictions and scores go (default MODEL/eval)")
    sub.add_argument("--limit", type=positive, help="only the first questions")
    sub.add_argument("--batch-size", type=positive, default=32)
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """The scores as JSON."""
    from acformer.evaluate.report import evaluate

    out = arguments.out or Path(arguments.model) / "eval"
    scores = evaluate(
        load(arguments),
        arguments.data,
        out,
        limit=arguments.limit,
        num_visual_tokens=arguments.tokens,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        progress=not arguments.quiet,
    )
    sys.stderr.write(f"predictions: {out / 'predictions.jsonl'}\n")
    return json.dumps(scores, indent=1)
