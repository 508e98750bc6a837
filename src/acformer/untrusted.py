"""A model folder is data: it runs no code, loads no kernel from a hub and names no file outside of itself.

transformers would ask on standard input whether code that comes with a folder may run, and take the shards of an index
wherever they lie. Nothing here can be switched on: who wants such a model converts it first.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from acformer.errors import CheckpointError

IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
"""Keys of a config, also with underscores around, under which transformers accepts `organisation/kernel`."""

MAX_LAYERS = 10_000


def load_config(name: str) -> PreTrainedConfig:
    """The config of a model of transformers, once its folder has been looked at.

    Raises:
        CheckpointError: a file of weights that lies outside, a kernel from a hub.
        ValueError: code of its own.
    """
    refuse_files_outside(name)
    check_config(PreTrainedConfig.get_config_dict(name)[0])
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def check_config(config: Mapping[str, Any]) -> None:
    """`CheckpointError` where a config, or any part of it, wants a hub's kernel, weights from outside or no end."""
    for key, value in _items(config):
        if key.strip("_").removesuffix("_internal") in IMPLEMENTATIONS:
            for name in value.values() if isinstance(value, Mapping) else [value]:
                if isinstance(name, str) and "/" in name:
                    raise CheckpointError(
                        f"{key} {name!r} is code on a hub, which no config may load: take 'sdpa' or 'eager', or call "
                        "set_attn_implementation on the loaded model"
                    )
        if key.endswith(("layer", "layers", "depth")) and isinstance(value, int) and value > MAX_LAYERS:
            raise CheckpointError(f"{key} is {value}, which would be built until the memory is full")
        if key == "transformers_weights" and value is not None and not _is_file_name(value):
            raise CheckpointError(f"transformers_weights {value!r} is no file beside the config")


def refuse_files_outside(name: str) -> None:
    """`CheckpointError` where an index of shards in a local folder names anything but files beside it."""
    for index in sorted(Path(name).glob("*.index.json")) if Path(name).is_dir() else ():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} is no index of weights") from error
        for shard in shards:
            if not _is_file_name(shard):
                raise CheckpointError(f"{index} names {shard!r}, which is no file beside it")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file of safetensors, or of `torch.save` as long as it holds nothing else.

    Raises:
        CheckpointError: what the file is instead.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(40)
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file that it points to: run git lfs pull")
        if start.lstrip()[:1] in (b"<", b"{", b""):
            raise CheckpointError(f"{path} is {'a page or JSON' if start.strip() else 'empty'}, not weights")
        is_safe = start[8:9] == b"{"
        weights = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than weights: loading it could run code, so it is refused") from error
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())[:300]}") from error
    named = isinstance(weights, Mapping) and all(isinstance(name, str) for name in weights)
    if not named or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise CheckpointError(f"{path} is no dict of weights")
    return dict(weights)


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name not in ("", "..")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested dicts and lists."""
    inner: list[Any] = [value]
    while inner:
        one = inner.pop()
        if isinstance(one, Mapping):
            yield from ((str(key), each) for key, each in one.items())
            inner += one.values()
        elif isinstance(one, list | tuple):
            inner += one
