"""What is measured and with what: the arguments of `acformer bench`, resolved."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from acformer.connectors import list_connectors
from acformer.errors import UsageError
from acformer.hf.build import parse_device, parse_dtype
from acformer.lab.bench.presets import Preset, free_memory, load_preset

TRUE_SIZE = "llava15-7b"
GRIDS = (256, 576, 1024, 2304, 4096)
DEFAULTS: dict[str, dict[str, Any]] = {
    "encoder": {"preset": TRUE_SIZE, "batch": (1, 8), "rounds": 7},
    "selector": {"preset": TRUE_SIZE, "batch": (1, 64), "rounds": 15},
    "connector": {"preset": TRUE_SIZE, "batch": (4,), "rounds": 5},
    "train": {"preset": "smol", "rounds": 5},
    "generate": {"preset": "smol", "batch": (1, 8, 32), "rounds": 5},
    "growth": {"preset": TRUE_SIZE, "batch": (1,), "rounds": 2},
}
"""Of each command; the preset is that of two cores, an accelerator gets the true size."""
TIMED = ("preset", "device", "dtype", "rounds", "batch")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "encoder": (*TIMED, "tokens", "variants"),
    "selector": (*TIMED, "tokens"),
    "connector": (*TIMED, "tokens", "connectors"),
    "train": (*TIMED, "tokens", "connectors"),
    "generate": (*TIMED, "tokens", "connectors"),
    "growth": (*TIMED, "patches", "memory_limit"),
    "agreement": ("vision", "images", "device", "dtype", "tokens"),
    "summary": (),
}
"""The arguments that each command takes."""
ONE_NUMBER = ("encoder", "agreement")
"""Commands that take one number of tokens."""


@dataclass(frozen=True)
class Settings:
    """One command in one dtype. Tuples are things to go through; see `acformer bench --help` for each."""

    what: str
    preset: Preset
    device: torch.device
    dtype: torch.dtype
    rounds: int
    batch: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    connectors: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    patches: tuple[int, ...] = ()
    memory_limit: int = 8
    progress: bool = False

    def label(self, *of: Any) -> str | None:
        """A progress bar's, if there is to be one."""
        return " ".join(map(str, (self.what, *of))) if self.progress else None

    def command(self, dtypes: list[torch.dtype]) -> str:
        """The call that makes the same table, with nothing but `--out` left to a default."""
        words = {**vars(self), "preset": self.preset.name, "dtype": tuple(map(dtype_name, dtypes))}
        return command_line(self.what, words)


def command_line(what: str, arguments: Mapping[str, Any]) -> str:
    """`acformer bench ...` with those arguments that the command takes; None and () are left out."""
    words = ["acformer", "bench", what]
    for name in ARGUMENTS[what]:
        value = arguments.get(name)
        if value not in (None, ()):
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def dtype_name(dtype: torch.dtype) -> str:
    """As `--dtype` takes it."""
    return str(dtype).removeprefix("torch.")


def given_arguments(what: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were given (are not None), lists as tuples.

    Raises:
        UsageError: this command does not take one of them, or takes one value of it alone.
    """
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in arguments.items() if v is not None}
    for name in given:
        if name not in ARGUMENTS[what]:
            raise UsageError(f"bench {what} takes no --{name.replace('_', '-')}")
    if what in ONE_NUMBER and len(given.get("tokens", ())) > 1:
        raise UsageError(f"bench {what} takes one number of --tokens, got {len(given['tokens'])}: run it for each")
    return given


def resolve(what: str, arguments: Mapping[str, Any], *, progress: bool = False) -> list[Settings]:
    """Settings for each dtype, defaults where nothing (None) was given.

    Raises:
        UsageError: a name that does not exist, or an argument that this command does not take (`given_arguments`).
    """
    given = given_arguments(what, arguments)
    place = parse_device(given.get("device", "auto"))
    is_accelerator = place.type != "cpu"
    preset = load_preset(given.get("preset", TRUE_SIZE if is_accelerator else DEFAULTS[what]["preset"]))
    known: dict[str, Any] = {
        "batch": (preset.train_batch,),
        "tokens": preset.tokens if what in ("train", "generate") else preset.tokens[1:2],
        "connectors": tuple(list_connectors()) if what == "connector" else ("mlp", "acformer"),
        "patches": GRIDS,
        "memory_limit": memory_limit(place),
        "dtype": ("bfloat16" if is_accelerator else "float32",),
        **DEFAULTS[what],
        **given,
        "preset": preset,
        "device": place,
    }
    taken = {name: known[name] for name in ARGUMENTS[what] if name in known}
    return [
        Settings(**{**taken, "what": what, "dtype": parse_dtype(name), "progress": progress}) for name in known["dtype"]
    ]


def memory_limit(device: torch.device) -> int:
    """Whole GiB: half of what is free on a CPU, nine tenths on an accelerator, 8 where nobody says what is free."""
    free = free_memory(device)
    return 8 if free is None else max(1, int((0.5 if device.type == "cpu" else 0.9) * free / 2**30))
