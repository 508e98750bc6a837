"""Adapters as PEFT makes them: a model that is wrapped by one can be asked, a folder that holds one can be loaded.

Differs from transformers' own way: nothing is loaded besides the model that was asked for, and an adapter that does not
fit is an error where PEFT warns.
"""

import json
from pathlib import Path
from typing import Any

from acformer.errors import CheckpointError, UsageError
from acformer.vision.load import loading

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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
    if (Path(base) / CONFIG).is_file():
        raise CheckpointError(f"{folder} is an adapter of {base}, which is an adapter itself: merge that first")
    return base


def merged(model: Any, folder: Path) -> Any:
    """The model with the adapter's weights added to its own: an ordinary model again, of the same class.

    Raises:
        UsageError: PEFT is not installed. CheckpointError: an adapter of another model, or one that cannot be merged.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise UsageError(f"{folder} holds an adapter, which needs peft: pip install 'acformer[peft]'") from error
    with loading(str(folder)):
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise CheckpointError(f"{folder}: an adapter of PEFT type {config.peft_type.value} cannot be merged")
        wrapped = PeftModel(model, config)
        report = wrapped.load_adapter(str(folder), "default")
        if wrong := sorted({*report.missing_keys, *report.unexpected_keys}):
            raise CheckpointError(f"{folder}: {len(wrong)} weights do not fit the adapter's config, first: {wrong[0]}")
        return wrapped.merge_and_unload()
