"""Adapters as PEFT makes them: a model that is wrapped by one can be asked, a folder that holds one can be loaded.

Differs from transformers' own way: nothing is loaded besides the model that was asked for, and an adapter that does not
fit is an error where PEFT warns. Modules that were trained whole beside it (PEFT's `modules_to_save`, our connector)
are put into the model itself: PEFT would wrap a copy, which hooks on the original do not know.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from acformer.errors import CheckpointError, UsageError
from acformer.files import located
from acformer.untrusted import read_weights
from acformer.vision.load import loading

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""How PEFT's files begin the name of a weight."""
MISSING = "{} needs peft: pip install 'acformer[peft]'"


def unwrapped(model: Any) -> Any:
    """Our model inside of what `peft.get_peft_model` made of it, its adapters active; any other model as it is.

    Raises:
        UsageError: an adapter that stands beside the model, such as prompt tuning, and would be lost.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise UsageError(f"an adapter of PEFT type {model.active_peft_config.peft_type.value} cannot answer here")
    return model.get_base_model()


def adapter_base(folder: Path) -> str | None:
    """The model that an adapter in that folder belongs to; None for a folder that holds none.

    Raises:
        CheckpointError: an adapter that is not whole, not of safetensors, or wants to import something.
    """
    if not (folder / CONFIG).is_file():
        return None
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        base, imports = config["base_model_name_or_path"], config.get("megatron_config")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG} is no config of an adapter") from error
    if (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds a model and an adapter: move the adapter to a folder of its own")
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds an adapter without {WEIGHTS}: save it with save_pretrained, no pickles")
    if imports:
        raise CheckpointError(f"{folder / CONFIG} has megatron_config, for which PEFT would import a module it names")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder / CONFIG} does not name its base model (base_model_name_or_path)")
    base = located(folder, base)
    if (Path(base) / CONFIG).is_file():
        raise CheckpointError(f"{folder} is an adapter of {base}, which is an adapter itself: merge that first")
    return base


def merged(model: Any, folder: Path) -> Any:
    """The model with the adapter's weights added to its own: an ordinary model again, of the same class.

    Raises:
        UsageError: PEFT is not installed.
        CheckpointError: an adapter of another model, or one that cannot be merged.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise UsageError(MISSING.format(f"{folder} holds an adapter, which")) from error
    with loading(str(folder)):
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise CheckpointError(f"{folder}: an adapter of PEFT type {config.peft_type.value} cannot be merged")
        rest = _load_whole_modules(model, folder, config.modules_to_save or ())
        if config.modules_to_save:  # where PEFT puts no adapters
            config.exclude_modules = rf"(.*\.)?({'|'.join(map(re.escape, config.modules_to_save))})(\..*)?"
        config.modules_to_save = None
        with warnings.catch_warnings():  # PEFT asks transformers under a name that this one takes back
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            wrapped = PeftModel(model, config)
        _load_adapter(wrapped, folder, rest)
        return wrapped.merge_and_unload()


def save_adapter(model: Any, folder: Path, weights: Mapping[str, Tensor], base: str, modules: Sequence[str]) -> None:
    """Write what PEFT writes: the adapter of `model.add_adapter`, and of `model.model` the modules that learn whole.

    weights: the whole model's, as `state_dict` gives them. base: the model under it, a hub's name or a folder, which
    may be relative to `folder`.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    whole = tuple(f"model.{module}." for module in modules)
    chosen = dict(get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False))
    chosen |= {name: weight for name, weight in weights.items() if name.startswith(whole)}
    named = {PREFIX + name: weight.detach().cpu().contiguous() for name, weight in chosen.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    (config,) = model.peft_config.values()
    config = replace(config, base_model_name_or_path=base, modules_to_save=list(modules) or None, inference_mode=True)
    config.save_pretrained(str(folder))


def load_adapter(model: Any, folder: Path) -> None:
    """Weights of an adapter, and of the modules saved beside it, into a model that has it already (`add_adapter`).

    Raises:
        CheckpointError: weights of another adapter or another model.
    """
    with loading(str(folder)):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        rest = _load_whole_modules(model, folder, config.get("modules_to_save") or ())
        _load_adapter(model, folder, {name.removeprefix(PREFIX): weight for name, weight in rest.items()})


def _load_whole_modules(model: Any, folder: Path, modules: Sequence[str]) -> dict[str, Tensor]:
    """Put into the model what the file has of these modules; returns the rest of it."""
    found = read_weights(folder / WEIGHTS)
    known = model.state_dict()
    wanted = {name for name in known if set(name.split(".")) & set(modules)}
    own = {name: weight for key, weight in found.items() if (name := key.removeprefix(PREFIX)) in wanted}
    if missing := sorted(wanted - own.keys()):
        raise CheckpointError(f"{folder}: {len(missing)} weights do not fit the adapter's config, first: {missing[0]}")
    model.load_state_dict(own, strict=False)
    return {key: weight for key, weight in found.items() if key.removeprefix(PREFIX) not in own}


def _load_adapter(model: Any, folder: Path, weights: dict[str, Tensor]) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if wrong := sorted(expected.keys() ^ weights.keys()):
        raise CheckpointError(f"{folder}: {len(wrong)} weights do not fit the adapter's config, first: {wrong[0]}")
    set_peft_model_state_dict(model, weights)
