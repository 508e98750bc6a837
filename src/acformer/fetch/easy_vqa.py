"""easy-VQA as its wheel has it -> images and LLaVA conversations: questions, dialogues, captions."""

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any
from zipfile import ZipFile

COLORS = {"green", "red", "gray", "teal", "black", "yellow", "brown", "blue"}
SHAPES = {"circle", "rectangle", "triangle"}


def convert_easy_vqa(wheel: ZipFile, folder: Path) -> None:
    """The images as they are, the questions as LLaVA conversations, in the dataset's order."""
    for split in ("train", "test"):
        images = folder / "images" / split
        images.mkdir(parents=True)
        for member in wheel.namelist():
            if member.startswith(f"easy_vqa/data/{split}/images/") and member.endswith(".png"):
                (images / Path(member).name).write_bytes(wheel.read(member))
        rows = json.loads(wheel.read(f"easy_vqa/data/{split}/questions.json"))
        questions, dialogues, captions = [], [], []
        for number, group in groupby(rows, key=lambda row: row[2]):
            key, image = f"{split}-{number}", f"images/{split}/{number}.png"
            pairs = [(question, answer) for question, answer, _ in group]
            for n, pair in enumerate(pairs):
                questions.append({**_talk(f"{key}-{n}", image, [pair]), "kind": question_kind(pair[0])})
            dialogues.append(_talk(f"{key}-dialogue", image, pairs))
            if caption := _caption(pairs):
                captions.append(_talk(f"{key}-caption", image, [("", caption)]))
        _write_jsonl(folder / f"{split}.jsonl", questions)
        if split == "train":
            _write_jsonl(folder / "train_dialogues.jsonl", dialogues)
            _write_jsonl(folder / "captions.jsonl", captions)


def _talk(key: str, image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """One LLaVA record; the image comes before the first question."""
    words = []
    for question, answer in turns:
        words += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    words[0]["value"] = f"<image>\n{words[0]['value']}".strip()
    return {"id": key, "image": image, "conversations": words}


def question_kind(question: str) -> str:
    """`color` or `shape` for the open questions; `exists-` or `absent-` and one of the two for yes/no."""
    words = set(question.rstrip("?").split())
    if "what" in words:
        return "color" if "color" in words else "shape"
    return f"{'absent' if words & {'no', 'not'} else 'exists'}-{'color' if words & COLORS else 'shape'}"


def _caption(pairs: list[tuple[str, str]]) -> str | None:
    """`a blue circle.`, from what the answers affirm; None when they leave colour or shape open."""
    known: set[str] = set()
    for question, answer in pairs:
        denied = question_kind(question).startswith("absent")
        if answer not in ("yes", "no") or (answer == "no") == denied:
            known |= {answer, *question.rstrip("?").split()}
    color, shape = known & COLORS, known & SHAPES
    return f"a {color.pop()} {shape.pop()}." if color and shape else None


def _write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
