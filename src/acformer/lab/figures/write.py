"""Figures as files: for every picture a PNG and an SVG, for all of them a contact sheet, beside them a JSON."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from acformer.errors import UsageError
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.images import load_image
from acformer.lab.figures.layers import LayerReader, Layers, draw_contact_sheet, draw_layers
from acformer.lab.figures.reading import Reading, read_answer
from acformer.lab.figures.reading_figure import draw_reading
from acformer.lab.figures.sheet import save
from acformer.provenance import machine

MOST_PICTURES = 32  # on a contact sheet


def write_layers(
    images: Sequence[Path],
    out: Path,
    *,
    vision: str = "embedded:dinov2-s14",
    num_anchors: int | None = None,
    image_size: int = 336,
    feature_layer: int = -2,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[Path]:
    """Fig. 2, 4 and 6 for pictures: `<name>-layers.png|svg` of each, `contact-sheet.png|svg`, `layers.json`.

    Args:
        images: pictures, at most 32.
        out: a folder that is there.
        vision, feature_layer: as `load_vision_encoder` takes them.
        num_anchors: by default a patch in nine, the paper's 64 of 576.
        image_size: pixels a side of the square that the encoder is fed.
        device: where to compute.
        progress: show a bar.

    Returns:
        the files.

    Raises:
        UsageError: too many pictures, too small a square, an encoder without [CLS] attention. CheckpointError: no such
            encoder. ImageError: a picture that cannot be read.
    """
    if len(images) > MOST_PICTURES:
        raise UsageError(f"a contact sheet holds {MOST_PICTURES} pictures, not {len(images)}: call it several times")
    reader = LayerReader(vision, image_size, feature_layer, device)
    files, sheets = [], []
    for name, image in tqdm(_named(images), desc="figures", unit="picture", disable=not progress):
        layers = reader(load_image(image), image.name, num_anchors)
        files += save(draw_layers(layers), out / f"{name}-layers")
        sheets.append(layers)
    files += save(draw_contact_sheet(sheets), out / "contact-sheet")
    made = {"vision": vision, "image_size": image_size, **machine()}
    files.append(_write_json(out / "layers.json", {**made, "pictures": [_record(layers) for layers in sheets]}))
    return files


def write_readings(
    model: AcFormerForConditionalGeneration,
    processor: AcFormerProcessor,
    images: Sequence[Path],
    question: str,
    out: Path,
    *,
    progress: bool = True,
    **options: Any,
) -> dict[Path, Reading]:
    """Fig. 5 for pictures: `<name>-reading.png|svg|json` of each; returns the readings by path without ending.

    `options`: of `read_answer`, with its errors.
    """
    readings = {}
    made = {"model": model.name_or_path, "connector": model.config.connector, **machine()}
    for name, image in tqdm(_named(images), desc="figures", unit="picture", disable=not progress):
        reading = read_answer(model, processor, image, question, **options)
        path = out / f"{name}-reading"
        save(draw_reading(reading), path)
        _write_json(path.with_name(f"{path.name}.json"), {"image": image.name, **made, **reading.record()})
        readings[path] = reading
    return readings


def _named(images: Sequence[Path]) -> list[tuple[str, Path]]:
    """Each picture with the name of its files: its own without the ending, and a number where two are alike."""

    def names() -> Iterator[str]:
        seen: dict[str, int] = {}
        for image in images:
            seen[image.stem] = seen.get(image.stem, 0) + 1
            yield image.stem if seen[image.stem] == 1 else f"{image.stem}-{seen[image.stem]}"

    return list(zip(names(), images, strict=True))


def _record(layers: Layers) -> dict[str, Any]:
    return {
        "image": layers.name,
        "grid": layers.anchors.grid,
        "feature_layer": layers.feature_layer,
        "num_blocks": layers.num_blocks,
        "depths": layers.depths,
        "anchors": layers.anchors.indices,
        "anchors_by_head": layers.anchors.by_head,
    }


def _write_json(path: Path, record: dict[str, Any]) -> Path:
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
