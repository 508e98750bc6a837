"""Checkpoints that are whole or absent: written beside, checksummed, renamed; refused when damaged.

safetensors has no checksum and a killed save leaves half a folder, so every folder that we write carries
`manifest.json`: the size and sha256 of each of its files but the card. It is written last.
"""

import json
import shutil
import stat
from collections.abc import Callable
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from acformer.errors import CheckpointError, translated
from acformer.fetch.embedded import resolve
from acformer.files import file_sha256, flush_to_disk, partial_path, whole_file, whole_folder
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.hf.adapters import CONFIG as ADAPTER
from acformer.hf.adapters import adapter_base, merged
from acformer.hf.build import from_parts
from acformer.hf.connector_weights import load_connector, read_parts
from acformer.hf.processing_acformer import check_processor
from acformer.hf.publish import CARD
from acformer.untrusted import refuse_files_outside
from acformer.vision.load import loading, placement

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Describe every file of `folder` but the card, which people edit; the manifest appears in one step, after them."""
    entries = {}
    with whole_file(folder / MANIFEST) as part:
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)  # of any new file: safetensors' are readable by their owner alone
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p not in (part, folder / MANIFEST)):
            path.chmod(mode)
            flush_to_disk(path)
            name = path.relative_to(folder).as_posix()
            if name == CARD:
                continue
            entries[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        part.write_text(json.dumps(entries, indent=1), encoding="utf-8")


def verify_folder(folder: Path) -> str | None:
    """What is wrong with a folder that should have a manifest; None when it is whole."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return "it has no manifest: the save did not finish"
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return "its manifest is not JSON"
    if not (isinstance(entries, dict) and entries):
        return "its manifest names no file"
    for name, entry in entries.items():
        match entry:
            case {"size": int(size), "sha256": str(sha256)}:
                path = folder / name
            case _:
                return f"its manifest gives no size and sha256 for {name}"
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"its manifest names a file outside of it: {name}"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or file_sha256(path) != sha256:
            return f"{name} has changed since it was saved"
    unnamed = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in entries)
    return f"{unnamed[0]} is not in its manifest" if unnamed else None


def latest_valid_checkpoint(folder: Path, warn: Callable[[str], Any]) -> Path | None:
    """The newest `checkpoint-N` that is whole; `warn` is called for each damaged one that is passed over."""
    for _, checkpoint in sorted(_by_step(folder).items(), reverse=True):
        problem = verify_folder(checkpoint)
        if problem is None:
            return checkpoint
        warn(f"passing over {checkpoint}: {problem}")
    return None


def keep_newest(folder: Path, limit: int | None, step: int) -> None:
    """Remove all but `limit` checkpoints, the newest being that of `step`: a later one was passed over as damaged.

    As with the Trainer, None or a number below 1 keeps all.
    """
    if limit is None or limit < 1:
        return
    found = _by_step(folder)
    kept = sorted(number for number in found if number <= step)[-limit:]
    for number in found.keys() - set(kept):
        shutil.rmtree(found[number], ignore_errors=True)


def _by_step(folder: Path) -> dict[int, Path]:
    numbered = {path.name.rpartition("-")[2]: path for path in folder.glob("checkpoint-*")}
    return {int(number): path for number, path in numbered.items() if number.isdigit()}


def save_trained(trainer: Trainer, processor: AcFormerProcessor, folder: Path) -> None:
    """Write the trained model and its processor to `folder`, replacing what is there once all of it is on disk.

    Called by every process of a distributed run, since a sharded model is gathered from all of them; one writes.
    """
    writes = trainer.is_world_process_zero()
    saving = translated(f"cannot save {folder}", CheckpointError)  # every library says otherwise that a disk is full
    with saving, whole_folder(folder) if writes else nullcontext(partial_path(folder)) as part:
        trainer.accelerator.wait_for_everyone()  # until the folder is there
        trainer.save_model(str(part))
        if writes:
            (part / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle: the recipe is kept as YAML
            processor.save_pretrained(part)
            write_manifest(part)
    trainer.accelerator.wait_for_everyone()


def model_folder(name: str) -> str:
    """A run's folder stands for the model of its last stage, `embedded:NAME` for what was fetched; else the name.

    Raises:
        CheckpointError: a model of ours that was not fetched.
    """
    name = resolve(name)
    run = Path(name)
    for stage in ("finetune", "pretrain"):
        folder = run / stage / "model"
        has_model = any((folder / file).is_file() for file in ("config.json", ADAPTER))
        if has_model and not (run / "config.json").is_file():
            return str(folder)
    return name


def _check_path(name: str) -> None:
    """`CheckpointError` for a misspelt local path, before the hub is asked for a model of that name."""
    path = Path(name)
    parts = name.replace("\\", "/")
    is_path = parts.count("/") > 1 or parts.startswith((".", "~")) or ("/" in parts and path.parent.is_dir())
    if is_path and not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, siblings, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else " (train one: acformer train tiny)"
        raise CheckpointError(f"no model in {name}: there is no such folder{hint}")


def load_model(
    name: str, *, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu"
) -> tuple[AcFormerForConditionalGeneration, AcFormerProcessor]:
    """Model (in eval mode) and processor from a model folder, a run's folder, a hub name or the folder of an adapter.

    `embedded:acformer-scenes` is the one that `acformer fetch acformer-scenes` has put together.

    An adapter is one that PEFT saved; it is merged into its base model. A folder of the connector alone says where the
    other weights are; they are read from there.

    Raises:
        CheckpointError: nothing there, a file that changed since it was saved, weights that do not fit the config, a
            processor of another model, code of its own.
        UsageError: an adapter, but PEFT is not installed.
    """
    folder = model_folder(name)
    _check_path(name)
    _check_whole(Path(folder))
    if (base := adapter_base(Path(folder))) is not None:
        model, processor = load_model(base, dtype=dtype, device=device)
        return merged(model, Path(folder)).eval(), processor
    if Path(folder).exists():
        if not (Path(folder) / "config.json").is_file():
            raise CheckpointError(f"no model in {name}: there is no config.json (train one: acformer train tiny)")
        refuse_files_outside(folder)
    with loading(name):
        model_type = AcFormerConfig.get_config_dict(folder)[0].get("model_type")
        if model_type != AcFormerConfig.model_type:
            raise CheckpointError(
                f"{name} holds a model of type {model_type!r}, not one of {AcFormerConfig.model_type}"
            )
        model = _weights(Path(folder), dtype)
        processor = AcFormerProcessor.from_pretrained(folder)
    for field in ("num_placeholders", "fusion", "image_token_id"):
        written, read = getattr(processor, field), getattr(model.config, field)
        if written != read:
            raise CheckpointError(
                f"{name}: its processor writes prompts for {field} {written!r}, but its model has {read!r}: take the "
                "processor that was saved with the model"
            )
    processor.budgets = [list(run) for run in model.config.budgets]
    check_processor(processor, model.config.image_size, name)
    check_fields(model, name)
    return model.eval() if placement() else model.eval().to(device), processor


def check_fields(model: AcFormerForConditionalGeneration, name: str) -> None:
    """`CheckpointError` for fields that transformers takes as they come, and trips over at the first answer."""
    configs = {"text_config": model.config.text_config, "vision_config": model.config.vision_config}
    for part, config in {**configs, "generation_config": model.generation_config}.items():
        for flag in ("return_dict", "output_hidden_states", "output_attentions"):
            if not isinstance(getattr(config, flag, None), bool | None):
                raise CheckpointError(f"{name}: {flag} of its {part} is {getattr(config, flag)!r}, not true or false")
    for part, config in configs.items():
        config.return_dict = True  # what reads its outputs asks for them by name
        heads = getattr(config, "num_attention_heads", 1)
        if not isinstance(heads, int) or heads < 1:
            raise CheckpointError(f"{name}: num_attention_heads of its {part} is {heads!r}, not a number of heads")
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.generation_config, token, None)
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(one, int | None) for one in ids):
            raise CheckpointError(f"{name}: {token} of its generation_config is {value!r}, not the id of a token")


def _check_whole(folder: Path) -> None:
    if (folder / MANIFEST).is_file() and (problem := verify_folder(folder)):
        raise CheckpointError(f"the model in {folder} is damaged: {problem}; restore it or train again")


def _weights(folder: Path, dtype: torch.dtype | str) -> AcFormerForConditionalGeneration:
    """The model of a folder or a hub name; of a folder that holds a connector alone, with the rest from elsewhere."""
    parts = read_parts(folder)
    if parts is None:
        return AcFormerForConditionalGeneration.from_pretrained(folder.as_posix(), dtype=dtype, **placement())
    if parts.model is None:
        return from_parts(folder, parts, None if isinstance(dtype, str) else dtype)
    model, _ = load_model(parts.model, dtype=dtype)
    load_connector(model, str(folder))
    return model


def check_new_folder(folder: Path) -> None:
    """`CheckpointError` where something is there already."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not empty: name a new folder")


def save_model(model: AcFormerForConditionalGeneration, processor: AcFormerProcessor, folder: Path) -> None:
    """Write an ordinary model folder, whole or not at all.

    Raises:
        CheckpointError: the folder holds something already, or it cannot be written.
    """
    check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with translated(f"cannot save {folder}", CheckpointError), whole_folder(folder) as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)
        write_manifest(part)
