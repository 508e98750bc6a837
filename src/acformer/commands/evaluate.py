"""`acformer eval`: answers to a data set, and their scores."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from acformer.commands.arguments import add_model, load, numbers, positive
from acformer.errors import UsageError


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("eval", parents=[common], help="answer a data set and score the answers")
    add_model(sub, max_new_tokens=None, tokens=numbers)
    names = (
        "easy-vqa, openmoji-scenes[-small|-hard][:PART], a LLaVA / chat JSON file, or a benchmark of `acformer score`"
    )
    sub.add_argument("--data", default="easy-vqa", help=f"{names} (default easy-vqa)")
    sub.add_argument(
        "--root",
        "--image-root",
        dest="root",
        type=Path,
        help="the folder of the images; of a benchmark, that of its published files or a hub data set",
    )
    sub.add_argument("--protocol", default="llava", help="of a benchmark: llava (default), lmms-eval or official")
    sub.add_argument("--out", type=Path, help="where predictions and scores go (default: under MODEL/eval)")
    sub.add_argument("--limit", type=positive, help="only the first questions")
    sub.add_argument("--batch-size", type=positive, default=32)
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """The scores: as JSON, of a benchmark as text, or as a table of several numbers of visual tokens."""
    from acformer.benchmarks import BENCHMARKS

    if arguments.data in BENCHMARKS.names():
        return _benchmark(arguments)
    if arguments.tokens and len(arguments.tokens) > 1:
        raise UsageError("several numbers of --tokens are for benchmarks (--data pope --root FOLDER)")
    from acformer.evaluate.report import evaluate

    out = arguments.out or _folder(arguments.model) / _evaluation_name(arguments)
    scores = evaluate(
        load(arguments),
        arguments.data,
        out,
        image_root=arguments.root,
        limit=arguments.limit,
        num_visual_tokens=arguments.tokens[0] if arguments.tokens else None,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens or 16,
        progress=not arguments.quiet,
    )
    from acformer.evaluate.card_scores import record_scores

    record_scores(arguments.model, scores)
    sys.stderr.write(f"predictions: {out / 'predictions.jsonl'}\n")
    return json.dumps(scores, indent=1)


def _folder(model: str) -> Path:
    """Where a model's evaluations lie: beside a local one. A folder of a hub's name would hide the hub's model."""
    return Path(model) / "eval" if Path(model).exists() else Path("runs/eval") / model.replace("/", "--")


def _evaluation_name(arguments: argparse.Namespace) -> str:
    """Another folder for every data set, number of visual tokens and limit: `easy-vqa`, `easy-vqa-T9-limit200`."""
    path = Path(arguments.data)
    name = path.stem if path.suffix else arguments.data.replace(":", "-")
    tokens = f"-T{arguments.tokens[0]}" if arguments.tokens else ""
    return name + tokens + (f"-limit{arguments.limit}" if arguments.limit else "")


def _benchmark(arguments: argparse.Namespace) -> str:
    if arguments.root is None:
        raise UsageError(f"--data {arguments.data} is a benchmark: --root says in which folder its files are")
    from acformer.benchmarks.run import evaluate_benchmark
    from acformer.benchmarks.score_text import budget_table, score_text

    out = arguments.out or _folder(arguments.model)
    results = evaluate_benchmark(
        load(arguments),
        arguments.data,
        arguments.root,
        out,
        budgets=arguments.tokens or (None,),
        model_name=arguments.model,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        protocol=arguments.protocol,
        progress=not arguments.quiet,
    )
    from acformer.evaluate.card_scores import record_scores

    for result in results:
        record_scores(arguments.model, result)
    sys.stderr.write(f"predictions and scores: {out}\n")
    return "\n\n".join([*map(score_text, results[:1]), budget_table(results)]) if results else ""
