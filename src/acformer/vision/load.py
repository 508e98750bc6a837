"""Vision towers by name, and how they want their pixels: hub, folder, embedded, timm and open_clip."""

import math
import os
from typing import Any

import torch
from transformers import AutoModel, LlavaImageProcessorPil, PreTrainedModel
from transformers.integrations.fsdp import is_fsdp_enabled

from acformer.errors import CheckpointError, UsageError, translated
from acformer.fetch.embedded import resolve
from acformer.untrusted import load_config
from acformer.vision.families import ENCODERS
from acformer.vision.library import LibraryVisionModel, is_library_name, load_library_model


def placement() -> dict[str, Any]:
    """Arguments of `from_pretrained`: no memory for weights that another process reads and sends here.

    That is so under FSDP with `cpu_ram_efficient_loading`, on all ranks of a machine but the first. transformers then
    leaves only weights without memory that no file has, and reads the others on every rank.
    """
    waits = is_fsdp_enabled() and os.environ.get("LOCAL_RANK", "0") != "0"
    return {"device_map": {"": "meta"}} if waits else {}


def load_tower(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The vision tower of that name, as `load_vision_encoder` takes it, whole.

    Of a checkpoint of two towers (CLIP's, SigLIP's) only the vision half is read.
    """
    if is_library_name(name):
        with translated(f"cannot load {name!r}", CheckpointError):
            return load_library_model(name, dtype)
    name = resolve(name)
    with translated(f"cannot load {name!r}", CheckpointError):
        config = load_config(name)
        if config.model_type not in ENCODERS.names():  # of two towers: the vision half
            config = getattr(config, "vision_config", config)
        # Other shapes are let through to be named below, where transformers' own error would not name them.
        tower, report = AutoModel.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **placement(),
        )
    if report["missing_keys"] or report["mismatched_keys"]:
        missing = sorted(report["missing_keys"]) or sorted(str(key) for key in report["mismatched_keys"])
        raise CheckpointError(f"{name}: {len(missing)} weights are missing or of another shape, first: {missing[0]}")
    return tower


def pixel_statistics(vision: str | PreTrainedModel) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, by channel, with which the encoder wants its pixels normalised.

    vision: an encoder's tower, or a name as `load_vision_encoder` takes it; `UsageError` or `CheckpointError` where
    the model does not say.
    """
    if isinstance(vision, str) and is_library_name(vision):
        vision = load_tower(vision, torch.float32)
    if isinstance(vision, LibraryVisionModel):
        config = vision.config
        if config.image_mean is None or config.image_std is None:
            raise UsageError(f"{vision.name_or_path or 'the model'} does not say the mean and std of its pixels")
        return list(config.image_mean), list(config.image_std)
    name = resolve(vision if isinstance(vision, str) else vision.name_or_path)
    with translated(f"cannot load {name!r}", CheckpointError):
        # The file itself: AutoImageProcessor wants torchvision in transformers < 5.19.
        own, _ = LlavaImageProcessorPil.get_image_processor_dict(name)
    if own.get("do_normalize") is False:  # RADIO normalises inside
        return [0.0] * 3, [1.0] * 3
    mean, std = own.get("image_mean"), own.get("image_std")
    if not _three_numbers(mean) or not _three_numbers(std) or min(std) <= 0:
        raise CheckpointError(
            f"{name}: its preprocessor_config.json gives no image_mean and image_std of three numbers (std above 0)"
        )
    return list(mean), list(std)


def _three_numbers(values: object) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )
