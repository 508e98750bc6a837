"""Which things of a drawn scene have a chosen patch on them: every selector at several numbers of patches.

    acformer fetch dinov2-s14 openmoji photographs
    python examples/coverage.py

A thing, object or word, is covered if the middle of a chosen patch lies in its rectangle; on the ground are the chosen
patches whose middle lies in none. Mean over scenes with the 95 % interval of that mean (Student's t). `--spacing` shows
`spaced` with other factors than its own, which was chosen so on the validation scenes.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from acformer.anchors.selectors import SELECTORS, cls_attention, spaced_points
from acformer.fetch.embedded import cache_dir
from acformer.files import write_text
from acformer.hf.build import square_image_processor
from acformer.images import load_image
from acformer.lab.reproduce.measured import student_t
from acformer.lab.scenes.dataset import draw_missing, image_path
from acformer.lab.scenes.difficulty import DIFFICULTIES
from acformer.lab.scenes.layout import SIDE, Scene, make_scene
from acformer.vision.encoder import load_vision_encoder
from acformer.vision.feature_cache import FeatureCache
from acformer.vision.features import VisionFeatures
from acformer.viz.overlay import patch_box


def encode(images: list[Path], image_size: int) -> VisionFeatures:
    """What DINOv2-S/14 makes of them; kept in the feature cache."""
    encoder = load_vision_encoder("embedded:dinov2-s14", dtype=torch.bfloat16).eval()
    cache = FeatureCache(
        cache_dir() / "features", encoder, encoder.tower, square_image_processor(encoder.tower, image_size)
    )
    cache.add(images)
    rows = [cache(path) for path in images]
    side = image_size // 14
    attention = torch.stack([row["cls_attention"] for row in rows])
    return VisionFeatures(torch.stack([row["tokens"] for row in rows]), attention, (side, side), 1)


def coverage(scene: Scene, chosen: Tensor, grid: tuple[int, int]) -> tuple[float, float]:
    """Of a scene the share of its things that are covered, and of the chosen patches those on the ground."""
    h, w = grid
    x, y = (chosen % w + 0.5) * SIDE / w, (chosen // w + 0.5) * SIDE / h
    inside = torch.stack(
        [
            ((x - thing.x).abs() <= thing.width / 2) & ((y - thing.y).abs() <= thing.height / 2)
            for thing in (*scene.objects, *scene.words)
        ]
    )  # (things, K)
    return float(inside.any(1).float().mean()), float((~inside.any(0)).float().mean())


def with_interval(values: list[float]) -> str:
    """Percent: mean and half of the 95 % interval."""
    sample = 100 * torch.tensor(values)
    return f"{float(sample.mean()):.1f} ± {student_t(len(values) - 1) * float(sample.std()) / len(values) ** 0.5:.1f}"


def draw(images: list[Path], features: VisionFeatures, names: list[str], num: int, path: Path) -> None:
    """A row a selector, a column an image, the chosen patches outlined."""
    figure, axes = plt.subplots(len(names), len(images), figsize=(2.2 * len(images), 2.25 * len(names)), squeeze=False)
    for row, name in zip(axes, names, strict=True):
        for place, (image, chosen) in enumerate(zip(images, SELECTORS[name](features, num).tolist(), strict=True)):
            shown = load_image(image)
            row[place].imshow(shown)
            for colour, width in (("black", 3.2), ("gold", 1.8)):  # the rim first
                for left, top, right, bottom in (patch_box(one, features.grid, shown.size, False) for one in chosen):
                    corner, sides = (left, top), (right - left, bottom - top)
                    row[place].add_patch(Rectangle(corner, *sides, fill=False, edgecolor=colour, linewidth=width))
            row[place].set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """The table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--difficulty", default="openmoji-scenes-hard", choices=DIFFICULTIES)
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=500, help="scenes")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num", type=int, nargs="+", default=[16, 36, 64], help="patches to choose")
    parser.add_argument("--spacing", type=float, nargs="+", default=[], help="factors of `spaced` alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path, help="the first scenes with the first number of patches, drawn")
    parser.add_argument("--show", nargs="+", default=["anchors", "spaced"], help="selectors in the figure")
    parser.add_argument("--columns", type=int, default=4, help="scenes in the figure")
    options = parser.parse_args()
    difficulty = DIFFICULTIES[options.difficulty]
    numbers = list(range(min(options.limit, difficulty.num_scenes(options.split))))
    draw_missing(difficulty, options.split, numbers)
    scenes = [make_scene(difficulty, options.split, number) for number in numbers]
    images = [image_path(difficulty, options.split, number) for number in numbers]
    features = encode(images, options.image_size)
    if options.figure:
        first = features.rows(range(options.columns))
        draw(images[: options.columns], first, options.show, options.num[0], options.figure)
    title = (
        f"{len(scenes)} scenes of `{difficulty.name}:{options.split}`, {features.grid[0]} x {features.grid[1]} patches"
    )
    lines = [f"Things covered (chosen patches on the ground), percent. {title}.", ""]
    lines += [
        "| | " + " | ".join(f"{num} patches" for num in options.num) + " |",
        "| --- |" + " --- |" * len(options.num),
    ]
    for name, factor in [("spaced", factor) for factor in options.spacing] or [
        (name, None) for name in SELECTORS.names()
    ]:
        cells = []
        for num in options.num:
            if factor:
                choice = spaced_points(cls_attention(features), features.grid, num, factor)
            else:
                choice = SELECTORS[name](features, num)
            pairs = [coverage(scene, row, features.grid) for scene, row in zip(scenes, choice, strict=True)]
            covered, ground = map(list, zip(*pairs, strict=True))
            cells.append(f"{with_interval(covered)} ({sum(ground) / len(ground):.0%})")
        lines.append(f"| `{name}`{f', factor {factor}' if factor else ''} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        write_text(options.out, text)


if __name__ == "__main__":
    main()
