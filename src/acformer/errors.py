"""The errors a user can cause, each with the exit code that the command line returns for it.

Every message says what is wrong, where, and what to do; the command line prints it as the single line
`acformer: error: <message>`. Codes: 0 ok, 2 usage or config, 3 data, 4 checkpoint or model, 5 diverged,
75 preempted (resume with the same command), 130 Ctrl-C, 143 terminated.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class AcFormerError(Exception):
    """Anything wrong that the user can mend; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(AcFormerError, ValueError):
    """A flag, recipe key or name that does not exist or does not fit (exit code 2)."""

    exit_code = 2


class DataError(AcFormerError, ValueError):
    """A data file or record that cannot be used (exit code 3)."""

    exit_code = 3


class ImageError(DataError):
    """An image that cannot or must not be decoded (exit code 3)."""


class CheckpointError(AcFormerError):
    """A checkpoint or model that is missing, incomplete or of another shape (exit code 4)."""

    exit_code = 4


class DivergedError(AcFormerError):
    """Training produced a loss or gradient that is not finite (exit code 5)."""

    exit_code = 5


def unknown_name(what: str, name: str, valid: Iterable[str]) -> UsageError:
    """`UsageError` for a misspelt `name`, with the nearest valid one first and the rest after it."""
    names = sorted(valid)
    near = get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"unknown {what} {name!r}; {hint}valid: {', '.join(names)}")


@contextmanager
def translated(message: str, kind: type[AcFormerError], *caught: type[Exception]) -> Iterator[None]:
    """Raises `kind` with the line `message: reason` in place of an exception of another library.

    Args:
        message: what was tried, and with what: `cannot load 'runs/tiny'`.
        kind: what the user gets.
        caught: the exceptions to translate; without any, all. Ours pass as they are unless their very class is named:
            `translated("finetune", UsageError, UsageError)` says in which stage a mistake is.
    """
    try:
        yield
    except Exception as error:
        is_ours = isinstance(error, AcFormerError)
        if not (type(error) in caught if is_ours else isinstance(error, caught or Exception)):
            raise
        raise kind(f"{message}: {one_line(error)}") from error


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an exception says, in one line of at most `limit` characters; its class where it says nothing.

    transformers asks to allow code that comes with a model, which is never run here: that is said instead.
    """
    line = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in line:
        return "it works only with code that comes along with it, and such code is never run"
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
