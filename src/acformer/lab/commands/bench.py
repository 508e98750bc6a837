"""`acformer bench`: what things cost, side by side, with the roofline beside them."""

import argparse
from pathlib import Path
from typing import Any

from acformer.commands.arguments import ENCODER, add_device, positive

COMMANDS = ("encoder", "selector", "connector", "train", "generate", "growth", "agreement", "summary")


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments; what is left out is a default of the command (`acformer.lab.bench.settings`)."""
    sub = commands.add_parser("bench", parents=[common], help="time the parts of a model beside their roofline")
    sub.add_argument("what", choices=COMMANDS, help="what to measure; summary: one page of all results in OUT")
    sub.add_argument("--preset", help="tiny, smol, llava15-7b, llava15-13b: true sizes, random weights")
    sub.add_argument("--connectors", nargs="+", metavar="NAME", help="connector: which; train, generate: beside mlp")
    sub.add_argument("--tokens", type=positive, nargs="+", help="visual tokens an image, [CLS] included")
    sub.add_argument("--batch", type=positive, nargs="+", help="images; generate: rows of a step of generation")
    sub.add_argument("--dtype", nargs="+", help="float32, bfloat16, float16 (default: bfloat16 on a GPU)")
    sub.add_argument("--variants", nargs="+", choices=["plain", "cls_row", "anchors", "all_layers", "authors"])
    sub.add_argument("--patches", type=positive, nargs="+", help="growth: numbers of patches N")
    sub.add_argument("--memory-limit", type=positive, metavar="GIB", help="growth: of a run (default half of the free)")
    sub.add_argument("--rounds", type=positive, help="measurements of each")
    sub.add_argument("--vision", help=f"agreement: an encoder with real weights (default: {ENCODER})")
    sub.add_argument("--images", type=Path, nargs="+", help="agreement: images (default: photographs)")
    sub.add_argument("--out", type=Path, default=Path("results/bench"))
    add_device(sub)
    sub.set_defaults(run=run, device=None)  # as of all others: None was not given


def run(arguments: argparse.Namespace) -> str:
    """The table; `UsageError` for an argument that the command does not take."""
    from acformer.lab.bench.settings import ARGUMENTS, given_arguments

    names = {name for known in ARGUMENTS.values() for name in known}
    given = given_arguments(arguments.what, {name: getattr(arguments, name) for name in names})
    make = {"agreement": _agreement, "summary": _summary}.get(arguments.what, _timed)
    return make(arguments, given)


def _timed(arguments: argparse.Namespace, given: dict[str, Any]) -> str:
    from acformer.lab.bench.harness import bench
    from acformer.lab.bench.settings import resolve

    return bench(resolve(arguments.what, given, progress=not arguments.quiet), arguments.out)


def _agreement(arguments: argparse.Namespace, given: dict[str, Any]) -> str:
    from acformer.hf.build import parse_device, parse_dtype
    from acformer.lab.bench.agreement import bench_agreement

    return bench_agreement(
        given.get("vision", ENCODER),
        given.get("images", ()),
        [parse_dtype(name) for name in given.get("dtype", ["bfloat16"])],
        num_anchors=given.get("tokens", (145,))[0] - 1,
        device=parse_device(given.get("device", "auto")),
        out=arguments.out,
        progress=not arguments.quiet,
    )


def _summary(arguments: argparse.Namespace, _: dict[str, Any]) -> str:
    from acformer.files import write_text
    from acformer.lab.bench.result_page import page

    path = arguments.out / "README.md"
    write_text(path, page(arguments.out))
    return str(path)
