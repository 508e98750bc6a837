"""A stage's model as it learns, and what is saved of it: everything, the connector, or adapters with the connector.

What is frozen stands in the dtype of the arithmetic, or in few bits; what learns keeps its own.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from acformer.errors import CheckpointError
from acformer.files import whole_folder
from acformer.hf.adapters import adapter_base, load_adapter, save_adapter
from acformer.hf.checkpoints import model_folder, save_model, verify_folder, write_manifest
from acformer.hf.connector_weights import Parts, save_connector
from acformer.hf.local_parts import LOCAL, naming, write_places
from acformer.hf.quantize import quantized
from acformer.training.distributed import tell_apart
from acformer.training.lora import add_adapters
from acformer.training.recipe import Recipe, StageSpec
from acformer.training.trainer import Saver, freeze, learning_table
from acformer.vision.load import placement

BASE = "base"
"""In a stage's folder: what adapters are for, where the run has no other folder of it."""


def half_precision(args: TrainingArguments) -> torch.dtype | None:
    """The dtype of the arithmetic, where it is not that of the weights."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def as_it_learns(model: Any, spec: StageSpec, args: TrainingArguments, checkpoint: Path | None) -> tuple[Any, str]:
    """The model with its adapters, in few bits, as the stage says; and a table of what learns.

    The Trainer moves it to its device, once what is frozen is smaller (`cast_frozen`): a card may not hold it before.
    checkpoint: whose adapters it goes on with.

    Raises:
        UsageError: a package is not installed, or a module or target that the model has not.
    """
    freeze(model, spec.learning_rates)
    if spec.quantize is not None:
        model = quantized(model, spec.quantize, half_precision(args) or model.dtype, args.device)
        freeze(model, spec.learning_rates)
        model._hf_peft_config_loaded = spec.lora is None  # the Trainer takes it for one that nothing can learn in
    if spec.lora is not None:
        with torch.random.fork_rng(devices=[]):  # of the seed alone, whatever was loaded before
            torch.manual_seed(args.seed)
            add_adapters(model, spec.lora)
        if half_precision(args) is not None:
            in_float32(model)
        if checkpoint is not None and adapter_base(checkpoint) is not None and not placement():
            load_adapter(model, checkpoint)
    tell_apart(model)
    return model, learning_table(model, spec.learning_rates)


def in_float32(model: Any) -> None:
    """What learns, in float32: beside a language model in bfloat16, small steps would be lost in rounding."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def cast_frozen(model: Any, dtype: torch.dtype | None) -> None:
    """Weights that do not learn in the dtype of the arithmetic, which would cast them at every step."""
    for parameter in model.parameters() if dtype is not None else ():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def origin(recipe: Recipe, stage: str) -> Parts:
    """Where the weights are that a stage starts from."""
    follows = stage == "finetune" and recipe.pretrain is not None
    if recipe.from_model is not None and not (follows and recipe.stage == "all"):
        return Parts(model=model_folder(recipe.from_model))
    if follows:
        return Parts(model=str(recipe.output / "pretrain" / "model"))
    spec = recipe.model
    text = spec.text if isinstance(spec.text, str) else None
    return Parts(vision=_absolute(spec.vision), text=text and _absolute(text), dtype=spec.dtype)


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def saver(recipe: Recipe, stage: str, model: Any) -> Saver | None:
    """What writes a stage's weights into a folder; None where the whole model is saved."""
    spec: StageSpec = getattr(recipe, stage)
    if spec.lora is not None:
        modules = [module for module in spec.learning_rates if module != "language_model"]
        base = origin(recipe, stage).model or str(recipe.output / stage / BASE)
        return partial(save_adapter, model, base=_named(recipe, stage, base), modules=modules)
    if spec.save == "connector":
        return partial(save_connector, model, parts=_named_parts(recipe, stage))
    return None


def _named_parts(recipe: Recipe, stage: str) -> Parts:
    """The parts that a stage starts from, as its folders name them."""
    start = origin(recipe, stage)
    names: dict[str, Any] = {role: name and _named(recipe, stage, name) for role, name in _roles(start).items()}
    return replace(start, **names)


def _named(recipe: Recipe, stage: str, name: str) -> str:
    return naming(recipe.output / stage / "model", name, recipe.output)


def _roles(start: Parts) -> dict[str, str | None]:
    return {"vision": start.vision, "text": start.text, "model": start.model}


def check_base(recipe: Recipe, stage: str) -> None:
    """`CheckpointError` where adapters would be for a model that is an adapter itself."""
    start = origin(recipe, stage)
    if getattr(recipe, stage).lora is not None and start.model is not None and adapter_base(Path(start.model)):
        raise CheckpointError(f"{stage}.lora: {start.model} is an adapter itself: merge it first (acformer merge)")


def write_base(recipe: Recipe, stage: str, parts: Any) -> None:
    """The model under a stage's adapters, where no folder holds it yet: encoder and language model are named there.

    Of parts that are of this machine alone, their places are written beside the stage's folders.
    """
    folder, start = recipe.output / stage / BASE, origin(recipe, stage)
    spec: StageSpec = getattr(recipe, stage)
    if spec.lora is not None or spec.save == "connector":
        given = {**_roles(start), "base": start.model}
        write_places(
            folder.parent,
            {role: name for role, name in given.items() if name and _named(recipe, stage, name).startswith(LOCAL)},
        )
    if spec.lora is None or start.model is not None or verify_folder(folder) is None:
        return
    model, processor = parts
    if start.text is None:
        save_model(model, processor, folder)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as part:
        save_connector(model, part, model.state_dict(), _named_parts(recipe, stage))
        processor.save_pretrained(part)
        write_manifest(part)
