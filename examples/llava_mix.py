"""A file like LLaVA-1.5's `llava_v1_5_mix665k.json`, made up: as many records of each source, about as many bytes.

    python examples/llava_mix.py FOLDER [RECORDS]      (default 665298: 1 GB of JSON, and 8 images for each source)

Sources and their numbers are LLaVA's (github.com/haotian-liu/LLaVA, issue 657 and the paper's table of the mix). Rounds
and lengths of each are ours, drawn so that the file has LLaVA's size; the words mean nothing. The same in every run.
"""

import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

IMAGES = 8
TEXT = (
    "a the of in on with and is are man woman person street table dog cat red blue white black green "
    "large small standing sitting holding near behind left right image photo sign building water sky "
    "grass people car train clock"
)


@dataclass(frozen=True)
class Source:
    """count: records. rounds: questions of a record, on average. question, answer: bytes of a turn, on average."""

    count: int
    folder: str | None
    rounds: float
    question: int
    answer: int
    spread: float = 0.4


SOURCES = (
    Source(56_681, "coco/train2017", 5.5, 55, 120),  # LLaVA-Instruct: conversations,
    Source(23_240, "coco/train2017", 1, 75, 560),  # descriptions,
    Source(77_791, "coco/train2017", 1, 95, 690),  # reasoning
    Source(82_783, "coco/train2017", 5.4, 35, 5),  # VQAv2
    Source(8_998, "coco/train2017", 1.2, 90, 8),  # OKVQA
    Source(66_160, "coco/train2017", 1, 200, 3),  # A-OKVQA, with choices
    Source(48_447, "coco/train2017", 8, 80, 35),  # RefCOCO
    Source(86_417, "vg/VG_100K", 9, 70, 35),  # Visual Genome
    Source(72_140, "gqa/images", 10, 45, 6),  # GQA
    Source(80_000, "ocr_vqa/images", 5, 45, 20),  # OCR-VQA
    Source(21_953, "textvqa/train_images", 1, 300, 65),  # TextCaps, with what was read
    Source(40_688, None, 3.5, 220, 1100, 0.8),  # ShareGPT: text alone
)
TOTAL = sum(source.count for source in SOURCES)


def main(folder: str, records: str = str(TOTAL)) -> None:
    """Write FOLDER/mix.json and the images that it names."""
    root, count = Path(folder), int(records)
    root.mkdir(parents=True, exist_ok=True)
    _images(root)
    with (root / "mix.json").open("w", encoding="utf-8") as file:
        for number, record in enumerate(tqdm(_records(count), total=count, unit="record")):
            file.write("[\n" if number == 0 else ",\n")
            file.write(json.dumps(record, indent=2))
        file.write("\n]\n")
    print(f"{root / 'mix.json'}: {count} records, {(root / 'mix.json').stat().st_size / 1e9:.2f} GB")


def _images(root: Path) -> None:
    for folder in {source.folder for source in SOURCES if source.folder}:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(IMAGES):
            Image.new("RGB", (336, 252), (30 * number, 90, 160)).save(root / folder / f"{number:012d}.jpg")


def _records(count: int) -> Iterator[dict[str, Any]]:
    """The first so many of the shuffled mix."""
    chance = random.Random(0)
    text = " ".join(chance.choices(TEXT.split(), k=200_000))
    kinds = [source for source in SOURCES for _ in range(source.count)]
    chance.shuffle(kinds)
    for number, source in zip(range(count), kinds, strict=False):
        yield _record(source, number, text, chance)


def _record(source: Source, number: int, text: str, chance: random.Random) -> dict[str, Any]:
    rounds = 1 if source.rounds == 1 else max(1, round(chance.expovariate(1 / (source.rounds - 0.5)) + 0.5))
    turns = []
    for place in range(min(rounds, 40)):
        tag = "<image>\n" if source.folder and place == 0 else ""
        turns.append({"from": "human", "value": tag + _words(source.question, source.spread, text, chance)})
        turns.append({"from": "gpt", "value": _words(source.answer, source.spread, text, chance)})
    image = {"image": f"{source.folder}/{number % IMAGES:012d}.jpg"} if source.folder else {}
    return {"id": f"{number:012d}", **image, "conversations": turns}


def _words(mean: int, spread: float, text: str, chance: random.Random) -> str:
    """A piece of about `mean` bytes: log-normal around it."""
    length = max(2, round(mean * math.exp(chance.gauss(-(spread**2) / 2, spread))))
    start = chance.randrange(len(text) - length)
    return text[start : start + length].strip() or "a"


if __name__ == "__main__":
    main(*sys.argv[1:])
