"""The command line: `acformer COMMAND`. It stays small: what a run does is in its recipe, not in flags.

What a command takes and does is in `acformer.commands`; here is what they have in common. Errors are one line,
`acformer: error: ...`; the exit code says of what kind (see `acformer.errors`).
"""

import argparse
import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from acformer import __version__
from acformer.commands import COMMANDS
from acformer.errors import AcFormerError, CheckpointError, UsageError
from acformer.lab.commands import COMMANDS as LAB_COMMANDS

INTERRUPTED, TERMINATED, PREEMPTED = 130, 143, 75
GOES_ON = "; the same command goes on from the last checkpoint of the run (or starts the stage anew if none was saved)"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 ok, 2 usage, 3 data, 4 model, 5 diverged, 130 Ctrl-C, 143 terminated.

    A command that can go on where it was stopped (`train`, `reproduce`) returns 75 for 143: start it
    again. 1: a run of a table failed; the table names it.
    """
    arguments = _parse(argv)
    _set_up_logs(arguments.quiet)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        if said := arguments.run(arguments):
            print(said)
    except (AcFormerError, MemoryError, OSError) as error:
        if arguments.debug:
            raise
        print(f"acformer: error: {_rank()}{_one_line(error)}", file=sys.stderr)
        return _exit_code(error)
    except KeyboardInterrupt as stop:
        print(f"acformer: interrupted{GOES_ON if arguments.resumable else ''}", file=sys.stderr)
        terminated = PREEMPTED if arguments.resumable else TERMINATED
        return terminated if stop.args else INTERRUPTED
    return 0


def _exit_code(error: Exception) -> int:
    if isinstance(error, AcFormerError):
        return error.exit_code
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return CheckpointError.exit_code if is_full else UsageError.exit_code


def _rank() -> str:
    """Which of several processes this is, as torchrun and accelerate say it."""
    return f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""


def _one_line(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "out of memory: take smaller batches, smaller images or a smaller model"
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
    if not sys.stderr.isatty():  # a bar in a file: one state now and then, before tqdm is imported
        os.environ.setdefault("TQDM_MININTERVAL", "30")
        os.environ.setdefault("TQDM_MAXINTERVAL", "30")


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
    for command in (*COMMANDS, *LAB_COMMANDS):
        command.add(commands, common)
    return parser


if __name__ == "__main__":
    sys.exit(main())
