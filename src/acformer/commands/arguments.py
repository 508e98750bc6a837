"""Arguments that several commands take, and the types that check them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from acformer.fetch import trained
from acformer.fetch.embedded import PREFIX

ENCODER = "embedded:dinov2-s14"
MODEL_HELP = "a model folder, a run's folder or a hub name"
ENCODER_HELP = f"encoder: {ENCODER} (default), hub name, folder, timm:NAME, open_clip:NAME@WEIGHTS"


def add_model(
    sub: argparse.ArgumentParser, max_new_tokens: int | None, tokens: Callable[[str], Any] | None = None
) -> None:
    """A model, and how it answers; `tokens` is the type of `--tokens`, a positive number if not given."""
    sub.add_argument("model", help=MODEL_HELP)
    add_answering(sub, max_new_tokens, tokens)


def add_answering(
    sub: argparse.ArgumentParser, max_new_tokens: int | None, tokens: Callable[[str], Any] | None = None
) -> None:
    """How a model answers, as `add_model`."""
    sub.add_argument("--tokens", type=tokens or positive, help="visual tokens an image, where the connector can choose")
    sub.add_argument("--max-new-tokens", type=positive, default=max_new_tokens)
    sub.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16, float16")
    add_device(sub)


def add_device(sub: argparse.ArgumentParser) -> None:
    """Where to compute."""
    sub.add_argument("--device", default="auto", help="cpu, cuda, ... (default: an accelerator if there is one)")


def load(arguments: argparse.Namespace) -> Any:
    """The model of `add_model` and its processor, on the device that was asked for."""
    from acformer.hf.build import parse_device, parse_dtype
    from acformer.hf.checkpoints import load_model

    dtype = "auto" if arguments.dtype == "auto" else parse_dtype(arguments.dtype)
    return load_model(arguments.model, dtype=dtype, device=parse_device(arguments.device))


def default_model() -> str | None:
    """The model that answers where none is named; None where there is none that is good enough."""
    return None if trained.DEFAULT is None else PREFIX + trained.DEFAULT


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def numbers(text: str) -> list[int]:
    """Whole numbers from 1 on, with commas between."""
    return [positive(part) for part in text.split(",")]


def image_file(text: str) -> Path:
    """An image that can be written there."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise argparse.ArgumentTypeError(f"must end in .png, .jpg or .webp, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path
