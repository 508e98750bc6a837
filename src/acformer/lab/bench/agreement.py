"""`bench agreement`: do bf16 and fp16 find the anchors that float32 finds? On real images, with real weights.

Two things that a dtype can do are kept apart: round the [CLS] row of a float32 encoder (`row`), and run the whole
encoder (`encoder`, whose row is formed in float32 from q and k of that dtype, as `cls_row` does). Beside them stands
what float32 itself allows: the same encoder with another attention kernel (`kernel`).

Patches that differ are of two kinds. The search is sequential, so one head's other choice changes what later heads
find free. Here both searches are therefore replayed head by head from the same free patches; what still differs is a
*swap*, and its gap, 1 - s(came) / s(left) in float32 scores s, says what the rounding had to bridge.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from acformer.anchors.search import quotas, select_anchors
from acformer.anchors.selectors import cls_attention
from acformer.fetch.embedded import embedded_path, resolve
from acformer.files import write_text
from acformer.hf.build import square_image_processor
from acformer.images import load_image
from acformer.lab.bench.harness import save_record
from acformer.lab.bench.result_page import measured_on
from acformer.lab.bench.settings import command_line, dtype_name
from acformer.lab.markdown import markdown_table
from acformer.provenance import machine
from acformer.vision.encoder import load_vision_encoder

CASES = {
    "kernel": "the float32 encoder with eager attention",
    "row": "the float32 encoder's row, rounded to the dtype",
    "encoder": "the whole encoder in the dtype",
}


def bench_agreement(
    encoder_name: str,
    paths: Sequence[Path],
    dtypes: Sequence[torch.dtype],
    *,
    num_anchors: int = 144,
    image_size: int = 336,
    device: torch.device | str = "cpu",
    out: Path = Path("results/bench"),
    progress: bool = True,
) -> str:
    """Measure on the images of `paths`, by default 108 crops of the embedded photographs; returns the table.

    Writes `<out>/agreement.json` and, for people, `agreement.md`.
    """
    if paths:
        images, about = [load_image(path) for path in paths], f"{len(paths)} images"
    else:
        sources = photographs()
        images = photograph_crops(sources, image_size)
        about = f"{len(images)} crops of {len(sources)} scikit-image photographs (they overlap)"
    arguments = {
        "vision": encoder_name,
        "images": tuple(paths),
        "device": device,
        "dtype": tuple(map(dtype_name, dtypes)),
        "tokens": num_anchors + 1,
    }
    rows = measure_agreement(encoder_name, images, dtypes, num_anchors, image_size, device=device, progress=progress)
    record = {
        "command": command_line("agreement", arguments),
        "encoder": encoder_name,
        "pictures": about,
        "image_size": image_size,
        "num_anchors": num_anchors,
        **machine(torch.device(device)),
        "chance": rows[0]["chance"],
        "rows": rows,
    }
    save_record(record, out / "agreement.json")
    text = page(record)
    write_text(out / "agreement.md", text)
    return text


def measure_agreement(
    encoder_name: str,
    images: Sequence[Image.Image],
    dtypes: Sequence[torch.dtype],
    num_anchors: int = 144,
    image_size: int = 336,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> list[dict[str, Any]]:
    """One row a case and dtype, see `compare`; `case` is one of `CASES`. All against the float32 encoder with SDPA.

    Args:
        encoder_name: of a Hugging Face encoder, as `load_vision_encoder` takes it.
        images: RGB; each is padded to a square and resized to `image_size`.
        dtypes: to compare with float32.
        num_anchors: T_N.
        image_size: pixels a side.
        device: where the encoder runs.
        progress: show a bar a case.

    Raises:
        UsageError: the encoder gives no [CLS] attention.
    """
    processor = square_image_processor(resolve(encoder_name), image_size)
    pixels = [processor(image, return_tensors="pt")["pixel_values"] for image in images]

    def attention(dtype: torch.dtype, kernel: str) -> Tensor:
        encoder = load_vision_encoder(encoder_name, dtype=dtype).to(device)
        tower: Any = encoder.tower
        tower.set_attn_implementation(kernel)
        batches = tqdm(pixels, desc=f"{dtype_name(dtype)}, {kernel}", unit="image", disable=not progress)
        with torch.inference_mode():
            return torch.cat([cls_attention(encoder(batch.to(device, dtype))).cpu() for batch in batches])

    reference = attention(torch.float32, "sdpa")
    cases = [("kernel", torch.float32, attention(torch.float32, "eager"))]
    for dtype in dtypes:
        cases += [("row", dtype, reference.to(dtype)), ("encoder", dtype, attention(dtype, "sdpa"))]
    found = []
    for case, dtype, rows in cases:
        # Two roundings to nearest bridge at most eps. What an encoder makes of its roundings is measured.
        bound = torch.finfo(dtype).eps if case == "row" else 2 * noise(reference, rows)
        found.append({"case": case, "dtype": dtype_name(dtype), **compare(reference, rows, num_anchors, bound)})
    return found


def compare(
    reference: Float[Tensor, "B H N"], rounded: Float[Tensor, "B H N"], num_anchors: int, bound: float
) -> dict[str, Any]:
    """How far the anchors of `rounded` are those of the float32 `reference`.

    same, least: mean and least share of an image's anchors that both find; chance: of two random sets. identical:
    share of the images with one set. swaps: a mean image's. gap_median, gap_largest: of the swaps (0 without any).
    explained: share of the swaps whose gap is within `bound`, None without any.
    """
    theirs, mine = (as_mask(select_anchors(rows, num_anchors), rows.shape[-1]) for rows in (reference, rounded))
    same = (theirs & mine).sum(dim=-1) / num_anchors
    gaps = swap_gaps(reference, rounded, num_anchors)
    return {
        "chance": num_anchors / reference.shape[-1],
        "same": same.mean().item(),
        "least": same.min().item(),
        "identical": (same == 1).float().mean().item(),
        "swaps": len(gaps) / len(reference),
        "gap_median": gaps.median().item() if len(gaps) else 0.0,
        "gap_largest": gaps.max().item() if len(gaps) else 0.0,
        "bound": bound,
        "explained": (gaps <= bound).float().mean().item() if len(gaps) else None,
    }


def swap_gaps(reference: Tensor, rounded: Tensor, num_anchors: int) -> Float[Tensor, "S"]:
    """For every patch that a head gave up: 1 - s(came) / s(left), against the worst patch that it took instead."""
    num_heads, num_patches = reference.shape[1:]
    taken = torch.zeros(len(reference), num_patches, dtype=torch.bool)
    gaps = []
    for head, quota in enumerate(quotas(num_anchors, num_heads)):
        if quota == 0:
            break
        scores = reference[:, head]  # (B, N)
        theirs, mine = (
            as_mask(select_anchors(rows[:, head].masked_fill(taken, -torch.inf).unsqueeze(1), quota), num_patches)
            for rows in (reference, rounded)
        )
        worst = scores.masked_fill(~mine | theirs, torch.inf).amin(dim=-1, keepdim=True).expand_as(scores)
        left = theirs & ~mine
        gaps.append(1 - worst[left] / scores[left])
        taken |= mine
    return torch.cat(gaps)


def noise(reference: Tensor, rounded: Tensor) -> float:
    """The 95th percentile of |s' / s - 1| over all scores, subsampled to what `quantile` takes."""
    change = (rounded.float() / reference - 1).abs().flatten()
    return change[:: -(-len(change) // 2**20)].quantile(0.95).item()


def as_mask(anchors: Tensor, num_patches: int) -> Bool[Tensor, "B N"]:
    """Indices as a mask over the patches."""
    return torch.zeros(len(anchors), num_patches, dtype=torch.bool).scatter(1, anchors, True)


def photographs() -> list[Path]:
    """The embedded ones, 9 in number."""
    return sorted(embedded_path("photographs").glob("*.png"))


def photograph_crops(sources: Sequence[Path], side: int, each: int = 12) -> list[Image.Image]:
    """Squares of random size and place, at least `side` pixels, `each` of every photograph; they overlap."""
    crops = []
    for path in sources:
        image, random = load_image(path), Random(path.stem)
        for _ in range(each):
            size = random.randint(min(side, *image.size), min(image.size))
            x, y = random.randint(0, image.width - size), random.randint(0, image.height - size)
            crops.append(image.crop((x, y, x + size, y + size)))
    return crops


def page(record: dict[str, Any]) -> str:
    """`agreement.md`."""
    meanings = "\n".join(f"- `{case}`: {meaning}." for case, meaning in CASES.items())
    table = markdown_table(COLUMNS, ([cell(row) for cell in COLUMNS.values()] for row in record["rows"]))
    return f"""# The same anchors in fewer bits?

{record["encoder"]} at {record["image_size"]} px, {record["pictures"]}, {record["num_anchors"]} anchors each, compared
with the encoder in float32. Two random sets would share {record["chance"]:.1%}.

{table}

{meanings}
- A swap is another choice of a head that had the same free patches; the further differences follow from swaps, since
  later heads find other patches free. Its gap is 1 - s(came) / s(left) in float32 scores.
- Bound: for `row` the dtype's eps (two roundings to nearest); else twice the 95th percentile of the relative change of
  the scores, measured on the same images. `explained`: share of the swaps whose gap is within it.

`{record["command"]}` -> `agreement.json`; {measured_on(record)}
"""


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "case": lambda row: f"`{row['case']}`",
    "dtype": lambda row: row["dtype"],
    "same anchors": lambda row: f"{row['same']:.2%}",
    "least": lambda row: f"{row['least']:.2%}",
    "identical": lambda row: f"{row['identical']:.2%}",
    "swaps an image": lambda row: f"{row['swaps']:.2f}",
    "gap, median": lambda row: f"{row['gap_median']:.2g}",
    "largest": lambda row: f"{row['gap_largest']:.2g}",
    "bound": lambda row: f"{row['bound']:.2g}",
    "explained": lambda row: "" if row["explained"] is None else f"{row['explained']:.1%}",
}
