"""`acformer merge`: a model that is saved in parts (adapters, the connector alone) as an ordinary one."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("merge", parents=[common], help="adapters, or a connector alone, as an ordinary model")
    sub.add_argument("model", help="a model folder or a run's folder")
    sub.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the model goes: a new folder")
    sub.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16, float16")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """The folder of the model."""
    from acformer.hf.build import parse_dtype
    from acformer.hf.checkpoints import check_new_folder, load_model, save_model

    check_new_folder(arguments.out)
    dtype = "auto" if arguments.dtype == "auto" else parse_dtype(arguments.dtype)
    model, processor = load_model(arguments.model, dtype=dtype)
    save_model(model, processor, arguments.out)
    return str(arguments.out)
