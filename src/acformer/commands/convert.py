"""`acformer convert`: a trained LLaVA with another connector, to be trained on."""

import argparse
import sys
from pathlib import Path
from typing import Any

from acformer.errors import UsageError


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("convert", parents=[common], help="put another connector into a trained LLaVA")
    sub.add_argument(
        "source", help="a hub name or a folder: LLaVA (transformers' format or its own), or a model of ours"
    )
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options of the connector, e.g. num_anchors=64")
    sub.add_argument("--connector", required=True, help="a name of `acformer connectors`")
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder (default: SOURCE-CONNECTOR here)")
    sub.add_argument("--template", default="vicuna_v1", help="chat template of the result (default vicuna_v1)")
    sub.add_argument("--vision", metavar="NAME", help="the encoder, in place of the one that LLaVA's own config names")
    sub.add_argument("--text", metavar="NAME", help="the language model, likewise (of a projector alone)")
    sub.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16, float16")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """The folder of the model."""
    from acformer.connectors import CONNECTORS
    from acformer.hf.build import parse_dtype
    from acformer.hf.checkpoint_formats import convert
    from acformer.hf.checkpoints import check_new_folder, save_model

    _ = CONNECTORS[arguments.connector]  # a typo should not take a model's loading
    dtype = None if arguments.dtype == "auto" else parse_dtype(arguments.dtype)
    out = arguments.out or Path(f"{Path(arguments.source).name}-{arguments.connector}")
    check_new_folder(out)
    model, processor, kept = convert(
        arguments.source,
        arguments.connector,
        _options(arguments.overrides),
        template=arguments.template,
        vision=arguments.vision,
        text=arguments.text,
        dtype=dtype,
    )
    save_model(model, processor, out)
    if not arguments.quiet:
        weights = "its projector is LLaVA's, trained; the rest of it is new" if kept else "it is new"
        sys.stderr.write(f"connector {arguments.connector}: {weights}. train it with from_model={out}\n")
    return str(out)


def _options(words: list[str]) -> dict[str, Any]:
    from acformer.training.strict_yaml import parse_yaml

    options = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise UsageError(f"{word!r} is not of the form KEY=VALUE, an option of the connector")
        options[key] = parse_yaml(value, word)
    return options
