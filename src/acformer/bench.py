"""What anchors cost: the encoder with and without the [CLS] row and the selector, side by side in one process.

Geometry of CLIP ViT-L/14-336 with random weights: speed does not depend on them. The variants take turns within a
round, so that a noisy machine disturbs them alike; ratios are medians over the rounds of a round's own ratio.
"""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from acformer.anchors import select_anchors, select_anchors_reference
from acformer.vision import VisionEncoder, truncate

CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
Variant = Callable[[Tensor], Any]


def bench_encoder(
    batches: Sequence[int], num_anchors: int, rounds: int, out: Path, names: Sequence[str] | None = None
) -> str:
    """Time variants (default: all of `encoder_variants`) for each batch; returns a table.

    Writes `<out>/encoder-cpu-batch-<batches>.json`: seconds, ratios to the floor, machine, versions, commit.
    """
    variants = encoder_variants(num_anchors)
    variants = {name: variants[name] for name in names or variants}
    side = CLIP_L_336["image_size"]
    rows = []
    for batch in batches:
        seconds = interleaved(variants, torch.randn(batch, 3, side, side), rounds)
        rows += summary(seconds, batch, floor="floor")
    record = {"geometry": "CLIP ViT-L/14-336, random weights", "num_anchors": num_anchors, "rounds": rounds}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"encoder-cpu-batch-{'-'.join(map(str, batches))}.json"
    path.write_text(json.dumps({**record, **machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return f"{table(rows)}\n{path}"


def encoder_variants(num_anchors: int) -> dict[str, Variant]:
    """Ways to the same features, cheapest first.

    floor: SDPA up to the feature layer, nothing else. cls_row: the same with the [CLS] row. anchors: and the
    selection. all_layers: SDPA through all 24 blocks, as LLaVA does. authors: eager attention through all blocks,
    every map kept, selection in a Python loop.
    """
    torch.manual_seed(0)
    full = CLIPVisionModel(CLIPVisionConfig(**CLIP_L_336)).eval()
    weights = full.state_dict()

    def copy(attention: str) -> CLIPVisionModel:
        config = CLIPVisionConfig(**CLIP_L_336, attn_implementation=attention)
        model = CLIPVisionModel(config).eval()
        model.load_state_dict(weights, assign=True)
        return model

    plain = truncate(copy("sdpa"), -2)
    encoder = VisionEncoder(copy("sdpa"))
    eager = copy("eager")

    def authors(pixels: Tensor) -> Tensor:
        output = eager(pixels, output_attentions=True, output_hidden_states=True)
        return select_anchors_reference(output.attentions[-2][:, :, 0, 1:], num_anchors)

    return {
        "floor": plain,
        "cls_row": encoder,
        "anchors": lambda pixels: select_anchors(encoder(pixels).cls_attention, num_anchors),
        "all_layers": full,
        "authors": authors,
    }


def interleaved(variants: dict[str, Variant], pixels: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant, one of each a round, after a round of warm-up; forwards and backwards in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        for number in tqdm(range(rounds + 1), desc=f"batch {pixels.shape[0]}", unit="round"):
            order = list(variants.items())
            for name, variant in order if number % 2 else reversed(order):
                start = time.perf_counter()
                variant(pixels)
                if number > 0:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: dict[str, list[float]], batch: int, floor: str) -> list[dict[str, Any]]:
    """Median seconds and the median and quartiles of the ratio to the floor of the same round."""
    rows = []
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds[floor], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        rows.append(
            {
                "batch": batch,
                "variant": name,
                "seconds": round(statistics.median(values), 4),
                "ratio": round(statistics.median(ratios), 4),
                "ratio_quartiles": [round(low, 4), round(high, 4)],
            }
        )
    return rows


def machine() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {capability}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit or "not in a git checkout",
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| batch | variant | seconds | x floor | quartiles |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["ratio_quartiles"]
        cells = (row["batch"], row["variant"], row["seconds"], row["ratio"], f"{low} .. {high}")
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)
