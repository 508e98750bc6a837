"""A run of `acformer stats`: an encoder and a folder of images in, rows, summary, table and figure out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from acformer.errors import UsageError
from acformer.hf.build import square_image_processor
from acformer.images import load_image
from acformer.lab.stats.measure import encode_views, measure
from acformer.lab.stats.plot_statistics import plot_statistics
from acformer.lab.stats.rows import MADE_ON, ImageStats, make_rows
from acformer.lab.stats.stats_table import table_text
from acformer.lab.stats.summary import Summary, read_summary, summarise, write_summary
from acformer.provenance import machine
from acformer.vision.encoder import VisionEncoder, load_vision_encoder
from acformer.vision.families import patch_grid
from acformer.vision.feature_cache import encoder_key

FORMAT = 1  # of a row; a change refuses older ones


@dataclass(frozen=True)
class StatsConfig:
    """What rows depend on beside the images. random_seed: of weights that were never trained; None for the real."""

    vision: str
    images: Path
    num_anchors: int = 64
    image_size: int = 336
    feature_layer: int = -2
    random_seed: int | None = None

    def encoder(self) -> VisionEncoder:
        """The encoder, with its own weights or with those of a new one of its configuration."""
        trained = load_vision_encoder(self.vision, self.feature_layer)
        if self.random_seed is None:
            return trained
        torch.manual_seed(self.random_seed)
        return load_vision_encoder(type(trained.tower)(trained.tower.config), self.feature_layer)


def run_stats(
    config: StatsConfig,
    images: Sequence[Path],
    out: Path,
    *,
    beside: Sequence[Path] = (),
    device: torch.device | None = None,
    progress: bool = True,
) -> str:
    """Measure the images (paths from `config.images`), going on where an earlier run was stopped; returns the table.

    Writes to `out`: settings.json and images.csv, a row an image (see `acformer.lab.stats.rows`), summary.json, and
    figure.png and figure.svg, in which finished runs in the folders `beside` stand beside this one.

    Raises:
        UsageError: rows of other settings in `out`, no finished run in a folder beside, more anchors than patches, no
            [CLS] attention.
        DataError: no images.
        CheckpointError: no such encoder.
    """
    others = [_finished(folder) for folder in beside]
    encoder = config.encoder().to(device or torch.device("cpu"))
    processor = square_image_processor(config.vision, config.image_size)
    settings = {**_settings(config, encoder, processor), MADE_ON: machine(device)}

    def row(image: Path) -> ImageStats:
        features = encode_views(load_image(config.images / image), encoder, processor, config.image_size)
        return measure(features, config.num_anchors, image.as_posix())

    settings, rows = make_rows(out, settings, images, row, progress=progress)
    summary = summarise(out.name, settings, rows)
    write_summary(out / "summary.json", summary)
    plot_statistics([summary, *others], out / "figure")
    return f"{table_text([summary, *others])}\n{out / 'figure.png'}"


def _settings(config: StatsConfig, encoder: VisionEncoder, image_processor: Any) -> dict[str, Any]:
    """What stands in settings.json: the configuration, and what the encoder makes of it."""
    tower = encoder.tower.config
    grid = patch_grid(tower, config.image_size, config.image_size)
    if not 1 <= config.num_anchors <= grid[0] * grid[1]:
        raise UsageError(
            f"--num-anchors {config.num_anchors} of {grid[0] * grid[1]} patches: take fewer or larger images"
        )
    made = {
        "format": FORMAT,
        "encoder": encoder_key(encoder.tower, image_processor),
        "num_heads": tower.num_attention_heads,
        "grid": list(grid),
    }
    return {**asdict(config), "images": str(config.images), **made}


def _finished(folder: Path) -> Summary:
    if not (folder / "summary.json").exists():
        raise UsageError(f"--beside {folder}: no summary.json there; run `acformer stats --out {folder} ...` first")
    return read_summary(folder / "summary.json")
