"""A run of `acformer stats`: an encoder and a folder of pictures in, rows, summary, table and figure out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from acformer.errors import UsageError
from acformer.hf.build import square_image_processor
from acformer.images import load_image
from acformer.lab.stats.figure import draw_figure
from acformer.lab.stats.measure import measure, see
from acformer.lab.stats.report import table_text
from acformer.lab.stats.rows import MADE_ON, Row, make_rows
from acformer.lab.stats.summary import Summary, read_summary, summarise, write_summary
from acformer.provenance import machine
from acformer.vision.encoder import VisionEncoder, load_vision_encoder
from acformer.vision.families import patch_grid
from acformer.vision.feature_cache import encoder_key

FORMAT = 1  # of a row; a change refuses older ones


@dataclass(frozen=True)
class Run:
    """What rows depend on beside the pictures. random_seed: of weights that were never trained; None for the real."""

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
    run: Run,
    pictures: Sequence[Path],
    out: Path,
    *,
    beside: Sequence[Path] = (),
    device: torch.device | None = None,
    progress: bool = True,
) -> str:
    """Measure the pictures (paths from `run.images`), going on where an earlier run was stopped; returns the table.

    Writes to `out`: settings.json and images.csv, a row a picture (see `acformer.lab.stats.rows`), summary.json, and
    figure.png and figure.svg, in which finished runs in the folders `beside` stand beside this one.

    Raises:
        UsageError: rows of other settings in `out`, no finished run in a folder beside, more anchors than patches,
            no [CLS] attention. DataError: no pictures. CheckpointError: no such encoder.
    """
    others = [_finished(folder) for folder in beside]
    encoder = run.encoder().to(device or torch.device("cpu"))
    processor = square_image_processor(run.vision, run.image_size)
    settings = {**_settings(run, encoder, processor), MADE_ON: machine(device)}

    def row(picture: Path) -> Row:
        features = see(load_image(run.images / picture), encoder, processor, run.image_size)
        return measure(features, run.num_anchors, picture.as_posix())

    settings, rows = make_rows(out, settings, pictures, row, progress=progress)
    summary = summarise(out.name, settings, rows)
    write_summary(out / "summary.json", summary)
    draw_figure([summary, *others], out / "figure")
    return f"{table_text([summary, *others])}\n{out / 'figure.png'}"


def _settings(run: Run, encoder: VisionEncoder, image_processor: Any) -> dict[str, Any]:
    """What stands in settings.json: the run, and what the encoder makes of it."""
    config = encoder.tower.config
    grid = patch_grid(config, run.image_size, run.image_size)
    if not 1 <= run.num_anchors <= grid[0] * grid[1]:
        raise UsageError(f"--num-anchors {run.num_anchors} of {grid[0] * grid[1]} patches: take fewer or larger images")
    made = {
        "format": FORMAT,
        "encoder": encoder_key(encoder.tower, image_processor),
        "num_heads": config.num_attention_heads,
        "grid": list(grid),
    }
    return {**asdict(run), "images": str(run.images), **made}


def _finished(folder: Path) -> Summary:
    if not (folder / "summary.json").exists():
        raise UsageError(f"--beside {folder}: no summary.json there; run `acformer stats --out {folder} ...` first")
    return read_summary(folder / "summary.json")
