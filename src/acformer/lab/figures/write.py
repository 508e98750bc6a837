"""Figures as files: for every image a PNG and an SVG, for all of them a contact sheet, beside them a JSON."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from acformer.errors import UsageError
from acformer.files import write_text
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.images import load_image
from acformer.lab.figures.answer_attention import AnswerAttention, attend_to_answer
from acformer.lab.figures.layers import EncoderLayers, LayerExtractor, draw_contact_sheet, draw_layers
from acformer.lab.figures.plot_attention import plot_attention
from acformer.lab.figures.sheet import save
from acformer.provenance import machine

MOST_IMAGES = 32  # on a contact sheet


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
    """Fig. 2, 4 and 6 for images: `<name>-layers.png|svg` of each, `contact-sheet.png|svg`, `layers.json`.

    Args:
        images: images, at most 32.
        out: a folder that is there.
        vision, feature_layer: as `load_vision_encoder` takes them.
        num_anchors: by default a patch in nine, the paper's 64 of 576.
        image_size: pixels a side of the square that the encoder is fed.
        device: where to compute.
        progress: show a bar.

    Returns:
        the files.

    Raises:
        UsageError: too many images, too small a square, an encoder without [CLS] attention.
        CheckpointError: no such encoder.
        ImageError: an image that cannot be read.
    """
    if len(images) > MOST_IMAGES:
        raise UsageError(f"a contact sheet holds {MOST_IMAGES} images, not {len(images)}: call it several times")
    extract = LayerExtractor(vision, image_size, feature_layer, device)
    files, sheets = [], []
    for name, image in tqdm(_named(images), desc="figures", unit="image", disable=not progress):
        layers = extract(load_image(image), image.name, num_anchors)
        files += save(draw_layers(layers), out / f"{name}-layers")
        sheets.append(layers)
    files += save(draw_contact_sheet(sheets), out / "contact-sheet")
    made = {"vision": vision, "image_size": image_size, **machine()}
    files.append(_write_json(out / "layers.json", {**made, "pictures": [_record(layers) for layers in sheets]}))
    return files


def write_answer_attention(
    model: AcFormerForConditionalGeneration,
    processor: AcFormerProcessor,
    images: Sequence[Path],
    question: str,
    out: Path,
    *,
    progress: bool = True,
    **options: Any,
) -> dict[Path, AnswerAttention]:
    """Fig. 5 for images: `<name>-reading.png|svg|json` of each; returns what was found by path without ending.

    `options`: of `attend_to_answer`, with its errors.
    """
    results = {}
    made = {"model": model.name_or_path, "connector": model.config.connector, **machine()}
    for name, image in tqdm(_named(images), desc="figures", unit="image", disable=not progress):
        found = attend_to_answer(model, processor, image, question, **options)
        path = out / f"{name}-reading"
        save(plot_attention(found), path)
        _write_json(path.with_name(f"{path.name}.json"), {"image": image.name, **made, **found.record()})
        results[path] = found
    return results


def _named(images: Sequence[Path]) -> list[tuple[str, Path]]:
    """Each image with the name of its files: its own without the ending, and a number where two are alike."""

    def names() -> Iterator[str]:
        seen: dict[str, int] = {}
        for image in images:
            seen[image.stem] = seen.get(image.stem, 0) + 1
            yield image.stem if seen[image.stem] == 1 else f"{image.stem}-{seen[image.stem]}"

    return list(zip(names(), images, strict=True))


def _record(layers: EncoderLayers) -> dict[str, Any]:
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
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path
