"""`acformer ask`: questions about an image, several or none."""

import argparse
import re
from pathlib import Path
from typing import Any

from acformer.commands.arguments import MODEL_HELP, add_answering, default_model, load
from acformer.errors import UsageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser(
        "ask",
        parents=[common],
        help="ask questions about an image, several or none",
        usage=f"acformer ask [OPTION ...] {words_of_call()} [QUESTION ...]",
    )
    left_out = f", before an image also left out: {default_model()}" if default_model() else ""
    about = (
        f"MODEL: {MODEL_HELP}{left_out}. Then image files, then the question; more questions are turns of one dialogue"
    )
    sub.add_argument("words", nargs="+", metavar="MODEL IMAGE ... QUESTION", help=about)
    add_answering(sub, max_new_tokens=128)
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """The answers are printed as they are made."""
    arguments.model, words = split_model(arguments.words)
    images, questions = split_words(words)
    from acformer.images import load_image

    for image in images:
        load_image(image)  # a bad image is told before the model is loaded
    from acformer.evaluate.generate import converse

    limits = {"num_visual_tokens": arguments.tokens, "max_new_tokens": arguments.max_new_tokens}
    model, processor = load(arguments)
    for _ in converse(model, processor, images, questions, **limits, stream=True):
        pass


def words_of_call() -> str:
    """What `acformer ask` takes, in order."""
    return f"{'[MODEL]' if default_model() else 'MODEL'} [IMAGE ...] QUESTION"


def split_model(words: list[str]) -> tuple[str, list[str]]:
    """The model, and the words behind it; a file of an image in its place means the default one.

    Raises:
        UsageError: no model is named and there is no default, or there is one word alone, a model or a question.
    """
    first, default = words[0], default_model()
    if _is_image(first, is_last=False) and not _is_folder(first):
        if default is None:
            raise UsageError(f"there is no model before {first}: acformer ask {words_of_call()}")
        return default, words
    if len(words) == 1:
        raise UsageError(f"there is {first!r} alone: acformer ask {words_of_call()}")
    return first, words[1:]


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Image files come first, questions after them; `UsageError` for images alone or in between."""
    is_image = [_is_image(word, is_last=word is words[-1]) for word in words]
    count = [*is_image, False].index(False)
    images, questions = words[:count], words[count:]
    if not questions:
        raise UsageError(f"there is no question behind {images[-1]}: acformer ask {words_of_call()}")
    if any(is_image[count:]):
        late = words[count + is_image[count:].index(True)]
        raise UsageError(f"{late} stands behind {questions[0]!r}: images come before the first question")
    return images, questions


def _is_folder(word: str) -> bool:
    try:
        return Path(word).is_dir()
    except (OSError, ValueError):
        return False


def _is_image(word: str, *, is_last: bool) -> bool:
    """Whether it is a file, or the name of one that should be there; a last word may end in one: "what is in a.png"."""
    if re.match(r"(https?|data):", word):
        return True  # load_image says what is wrong with it
    if word.lower().endswith(IMAGE_SUFFIXES) and not (is_last and re.search(r"\s", word)):
        return True
    try:
        return bool(word) and Path(word).exists()
    except (OSError, ValueError):  # longer than a file name may be
        return False
