"""`acformer anchors`: the visual anchors of an image, drawn and listed."""

import argparse
import json
from pathlib import Path
from typing import Any

from acformer.commands.arguments import ENCODER, ENCODER_HELP, add_device, image_file, positive


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("anchors", parents=[common], help="find and draw the visual anchors of an image")
    sub.add_argument("image", type=Path)
    sub.add_argument("--vision", default=ENCODER, help=ENCODER_HELP)
    sub.add_argument("--num-anchors", type=positive, default=64)
    sub.add_argument("--image-size", type=positive, default=336, help="pixels a side that the encoder sees")
    sub.add_argument("--feature-layer", type=int, default=-2)
    sub.add_argument("--out", type=image_file, help="image to write (default IMAGE.anchors.png)")
    sub.add_argument("--json", action="store_true", help="print indices and grid positions as JSON")
    add_device(sub)
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """Indices and places of the anchors, and where the drawing is."""
    from acformer.images import load_image

    image = load_image(arguments.image)
    from acformer.hf.build import parse_device, square_image_processor
    from acformer.vision.encoder import load_vision_encoder
    from acformer.vision.families import require_whole_patches
    from acformer.viz import draw_anchors, find_anchors

    device = parse_device(arguments.device)
    encoder = load_vision_encoder(arguments.vision, arguments.feature_layer).to(device)
    require_whole_patches(encoder.tower.config, arguments.image_size)
    processor = square_image_processor(encoder.tower, arguments.image_size)
    found = find_anchors(image, encoder, processor, arguments.num_anchors)
    out = arguments.out or arguments.image.with_suffix(".anchors.png")
    draw_anchors(image, found.indices, found.grid, pad_to_square=True).save(out)
    if arguments.json:
        record = {"indices": found.indices, "positions": found.positions, "grid": found.grid, "picture": str(out)}
        return json.dumps(record)
    head = f"{len(found.indices)} anchors on a {found.grid[0]} x {found.grid[1]} grid -> {out}"
    places = zip(found.indices, found.positions, strict=True)
    lines = [f"{index:5d} {row:3d} {column:3d}" for index, (row, column) in places]
    return "\n".join([head, "index row col", *lines])
