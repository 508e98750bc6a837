"""The connector alone: a file of its weights (LLaVA's `mm_projector.bin`), and a model folder that holds no others.

Such a folder names in `parts.json` where the rest comes from: the encoder and the language model that the run began
with, or a whole model. A connector belongs to its options: another number of them, or another width, is an error.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from acformer.connectors import CONNECTORS, complete_options
from acformer.errors import CheckpointError, UsageError
from acformer.files import write_text
from acformer.hf.adapters import PREFIX
from acformer.hf.configuration_acformer import AcFormerConfig
from acformer.hf.convert import mlp_from_llava
from acformer.hf.local_parts import located
from acformer.untrusted import read_weights, refuse_files_outside
from acformer.vision.load import placement

FILE, PARTS = "connector.safetensors", "parts.json"
NEW_MODULES = ("model.connector.", "model.fusion.")
"""What is new in a model that is built out of parts, and is saved as the connector."""


@dataclass(frozen=True)
class Parts:
    """Where a folder's other weights are: an encoder, a language model and their dtype, or a whole `model`."""

    vision: str | None = None
    text: str | None = None
    dtype: str = "float32"
    model: str | None = None


def save_connector(model: Any, folder: Path, weights: Mapping[str, Tensor], parts: Parts) -> None:
    """Write the connector (and the fusion), the model's config and where the rest is.

    weights: the whole model's, as `state_dict` gives them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {
        name.removeprefix("model."): weight.detach().cpu().contiguous()
        for name, weight in weights.items()
        if name.startswith(NEW_MODULES)
    }
    save_file(chosen, folder / FILE, metadata={"format": "pt", "options": json.dumps(_options(model.config))})
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    write_text(folder / PARTS, json.dumps({key: value for key, value in vars(parts).items() if value is not None}))


def read_parts(folder: Path) -> Parts | None:
    """Where the other weights of a folder are; None where it holds all of them."""
    if not (folder / PARTS).is_file():
        return None
    try:
        values = json.loads((folder / PARTS).read_text(encoding="utf-8"))
        parts = Parts(**values)
        is_whole = isinstance(parts.model, str) or (isinstance(parts.vision, str) and isinstance(parts.text, str))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / PARTS} does not say where the model's other weights are") from error
    if not is_whole:
        raise CheckpointError(f"{folder / PARTS} names neither a model nor an encoder and a language model")
    roles = ("model",) if parts.model else ("vision", "text")
    return Parts(**{**values, **{role: located(folder, values[role], role) for role in roles}})


def load_connector(model: Any, source: str) -> None:
    """Put a trained connector into a model, in place.

    Args:
        source: `connector.safetensors`, or a folder that holds one, a whole model of ours or an adapter; for the
            connectors `mlp` and `linear` LLaVA's `mm_projector.bin`, too.

    Raises:
        CheckpointError: nothing there, or the connector of another model: it says in what they differ.
    """
    path = Path(source)
    if path.suffix == ".bin":
        connector = mlp_from_llava(path, model.config.geometry, **_prefix_option(model.config))
        found, options = {f"connector.{name}": weight for name, weight in connector.state_dict().items()}, None
        if model.config.connector not in ("mlp", "linear"):
            raise CheckpointError(f"{source} is LLaVA's projector, and this model has connector {_name(model.config)}")
    else:
        found, options = _read(path)
    if options is not None:
        _compare_options(source, options, _options(model.config))
    own = model.state_dict()
    wanted = {name.removeprefix("model."): tuple(t.shape) for name, t in own.items() if name.startswith(NEW_MODULES)}
    given = {name: tuple(weight.shape) for name, weight in found.items()}
    if wrong := sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)):
        name = wrong[0]
        raise CheckpointError(
            f"{source} does not fit connector {_name(model.config)}: {len(wrong)} weights differ, first {name}: "
            f"{given.get(name, 'not there')} in the file, {wanted.get(name, 'not there')} in the model"
        )
    if not placement():
        model.load_state_dict({f"model.{name}": weight for name, weight in found.items()}, strict=False)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The connector's weights, by their names in `model`, and its options where the source says them."""
    if path.is_dir():
        for file in (path / FILE, path / "adapter_model.safetensors"):
            if file.is_file():
                return _read(file)
        if not (path / "config.json").is_file():
            raise CheckpointError(f"no connector in {path}: there is no {FILE}, adapter or model")
        options = _options(AcFormerConfig.from_pretrained(path))
        return dict(_of_model(path)), options
    if not path.is_file():
        raise CheckpointError(f"no connector in {path}: there is no such file")
    weights = {name.removeprefix(PREFIX).removeprefix("model."): weight for name, weight in read_weights(path).items()}
    known = {name: weight for name, weight in weights.items() if f"model.{name}".startswith(NEW_MODULES)}
    if not known:
        raise CheckpointError(f"{path} holds no weights of a connector (they would be named connector.*)")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return known, json.loads(metadata["options"]) if "options" in metadata else None


def _of_model(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Out of the files of a whole model, of which the rest is not read."""
    refuse_files_outside(str(folder))
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"no connector in {folder}: there are no weights")
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                if name.startswith(NEW_MODULES):
                    yield name.removeprefix("model."), file.get_tensor(name)


def _options(config: AcFormerConfig) -> dict[str, Any]:
    """What decides the weights of connector and fusion."""
    return {
        "connector": CONNECTORS.resolve(config.connector).name,
        "connector_kwargs": complete_options(config.connector, config.connector_kwargs),
        "fusion": config.fusion,
        "fusion_kwargs": config.fusion_kwargs,
    }


def _compare_options(source: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """`CheckpointError` for the first that differs. An option younger than the source had its first default there."""
    if (name := theirs.get("connector")) == ours["connector"]:
        options = {**CONNECTORS[name].former_defaults, **theirs["connector_kwargs"]}
        try:
            theirs = {**theirs, "connector_kwargs": complete_options(name, options)}
        except UsageError as error:  # one of them was removed
            raise CheckpointError(f"{source}: {error}") from error
    flat = [{**{k: v for k, v in one.items() if isinstance(v, str)}, **_inner(one)} for one in (theirs, ours)]
    for key in sorted(flat[0].keys() | flat[1].keys()):
        then, now = (options.get(key, "its default") for options in flat)
        if then != now:
            raise CheckpointError(f"{source} was trained with model.{key} {then}, and this model has {now}")


def _inner(options: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{k}.{key}": value for k, v in options.items() if isinstance(v, Mapping) for key, value in v.items()}


def _prefix_option(config: AcFormerConfig) -> dict[str, bool]:
    return {"include_prefix": bool(config.connector_kwargs.get("include_prefix", False))}


def _name(config: AcFormerConfig) -> str:
    return f"{config.connector!r} ({', '.join(f'{k}={v}' for k, v in config.connector_kwargs.items()) or 'defaults'})"
