"""`acformer visualize`: the paper's figures of an encoder (Fig. 2, 4, 6) or of a whole model's answer (Fig. 5)."""

import argparse
from pathlib import Path
from typing import Any

from acformer.commands.arguments import ENCODER, ENCODER_HELP, add_device, load, positive
from acformer.errors import UsageError


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser(
        "visualize", parents=[common], help="figures: anchors, features and heads; or what an answer reads (--model)"
    )
    sub.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the PNG, SVG and JSON files")
    sub.add_argument("--num-anchors", type=positive, help="default: a patch in nine, 64 of 24 x 24")
    sub.add_argument("--vision", help=ENCODER_HELP)
    sub.add_argument("--image-size", type=positive, help="pixels a side that the encoder sees (default 336)")
    sub.add_argument("--feature-layer", type=int, help="whose heads choose the anchors (default -2)")
    sub.add_argument("--model", help="instead of an encoder: a model folder, a run's folder or a hub name")
    sub.add_argument("--question", help="with --model: whose answer's attention is drawn")
    sub.add_argument("--tokens", type=positive, help="with --model: visual tokens, where the connector can choose")
    sub.add_argument("--max-new-tokens", type=positive, default=32)
    sub.add_argument("--dtype", default="auto", help="with --model: auto (as saved), float32, bfloat16, float16")
    add_device(sub)
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """The files, and with a model what it answered and how much of what it read lies on anchors."""
    encoder = {"--vision": arguments.vision, "--image-size": arguments.image_size}
    encoder["--feature-layer"] = arguments.feature_layer
    if (arguments.model is None) != (arguments.question is None):
        raise UsageError("--model and --question go together: the figure shows what an answer reads")
    for flag, value in encoder.items():
        if arguments.model is not None and value is not None:
            raise UsageError(f"{flag} belongs to a bare encoder; --model brings its own")
    from acformer.images import load_image

    for image in arguments.images:
        load_image(image)  # a bad image is refused before the model is loaded
    arguments.out.mkdir(parents=True, exist_ok=True)
    return _encoder_figures(arguments) if arguments.model is None else _answer_figures(arguments)


def _encoder_figures(arguments: argparse.Namespace) -> str:
    from acformer.hf.build import parse_device
    from acformer.lab.figures.write import write_layers

    files = write_layers(
        arguments.images,
        arguments.out,
        vision=arguments.vision or ENCODER,
        num_anchors=arguments.num_anchors,
        image_size=arguments.image_size or 336,
        feature_layer=-2 if arguments.feature_layer is None else arguments.feature_layer,
        device=parse_device(arguments.device),
        progress=not arguments.quiet,
    )
    return "\n".join(map(str, files))


def _answer_figures(arguments: argparse.Namespace) -> str:
    from acformer.lab.figures.write import write_answer_attention

    model, processor = load(arguments)
    results = write_answer_attention(
        model,
        processor,
        arguments.images,
        arguments.question,
        arguments.out,
        num_visual_tokens=arguments.tokens,
        num_anchors=arguments.num_anchors,
        max_new_tokens=arguments.max_new_tokens,
        progress=not arguments.quiet,
    )
    lines = []
    for path, found in results.items():
        shares = ", ".join(f"{name} {100 * value:.1f} %" for name, value in found.overlap().items())
        lines += [f"{found.answer}", f"  {shares}", f"  {path}.png .svg .json"]
    return "\n".join(lines)
