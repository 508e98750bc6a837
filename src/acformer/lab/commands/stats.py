"""`acformer stats`: the paper's observation, measured over a folder of images."""

import argparse
from pathlib import Path
from typing import Any

from acformer.commands.arguments import ENCODER, ENCODER_HELP, add_device, positive


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("stats", parents=[common], help="measure the anchors of an encoder over many images")
    sub.add_argument("--vision", default=ENCODER, help=ENCODER_HELP)
    sub.add_argument("--images", type=Path, required=True, help="folder; a subfolder's images count as one group")
    sub.add_argument("--limit", type=positive, help="take so many of the images, evenly spaced")
    sub.add_argument("--num-anchors", type=positive, default=64)
    sub.add_argument("--image-size", type=positive, default=336, help="pixels a side that the encoder sees")
    sub.add_argument("--feature-layer", type=int, default=-2)
    sub.add_argument("--random-weights", action="store_true", help="the same architecture, untrained, as the control")
    sub.add_argument("--seed", type=int, default=0, help="of the random weights")
    sub.add_argument(
        "--beside", type=Path, nargs="+", default=[], help="finished --out folders to show beside this run"
    )
    sub.add_argument("--out", type=Path, required=True, help="gets images.csv, summary.json, figure.png, figure.svg")
    add_device(sub)
    sub.set_defaults(run=run, resumable=True)


def run(arguments: argparse.Namespace) -> str:
    """The table of the run, with those beside it."""
    from acformer.lab.stats.rows import find_images

    images = find_images(arguments.images, arguments.limit)  # before torch, as in `train`
    from acformer.hf.build import parse_device
    from acformer.lab.stats.run import StatsConfig, run_stats

    config = StatsConfig(
        vision=arguments.vision,
        images=arguments.images,
        num_anchors=arguments.num_anchors,
        image_size=arguments.image_size,
        feature_layer=arguments.feature_layer,
        random_seed=arguments.seed if arguments.random_weights else None,
    )
    return run_stats(
        config,
        images,
        arguments.out,
        beside=arguments.beside,
        device=parse_device(arguments.device),
        progress=not arguments.quiet,
    )
