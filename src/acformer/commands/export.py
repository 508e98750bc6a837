"""`acformer export`: a model for those who do not have this package, or what was trained of it alone."""

import argparse
from pathlib import Path
from typing import Any

from acformer.commands.arguments import positive
from acformer.errors import UsageError

SELF_CONTAINED, PARTS, ONNX, TORCH = "self-contained", "parts", "onnx", "torch"


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("export", parents=[common], help="a model to share: with its code, as graphs, or small")
    sub.add_argument("model", help="a model folder, a run's folder or a hub name")
    sub.add_argument(
        "--format",
        choices=(SELF_CONTAINED, PARTS, ONNX, TORCH),
        default=SELF_CONTAINED,
        help="its code beside its weights (default); connector and adapter alone, in bf16; an ONNX graph; a graph of "
        "torch.export",
    )
    sub.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    sub.add_argument(
        "--part", choices=("vision", "all"), default="vision", help="of a graph: pixels to visual tokens, or to logits"
    )
    sub.add_argument(
        "--tokens", type=positive, help="of a graph: visual tokens an image, where the connector can choose"
    )
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """What was written."""
    if arguments.format in (ONNX, TORCH):
        from acformer.export.graph import export_graph

        return str(export_graph(arguments.model, arguments.out, arguments.format, arguments.part, arguments.tokens))
    if arguments.tokens or arguments.part != "vision":
        raise UsageError("--tokens and --part are for graphs (--format onnx, --format torch)")
    if arguments.format == PARTS:
        from acformer.export.parts import export_parts

        return str(export_parts(arguments.model, arguments.out))
    from acformer.export.self_contained import export_self_contained

    return str(export_self_contained(arguments.model, arguments.out))
