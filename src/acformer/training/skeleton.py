"""The model of a recipe without its weights: configs alone are read, modules stand on the meta device.

Sizes come from a folder's `config.json`, from `geometries.yaml` for the models that our recipes name, or from the hub
(its cache, where there is no network).
"""

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from acformer.errors import CheckpointError
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration
from acformer.hf.adapters import adapter_base
from acformer.hf.build import new_text_config
from acformer.hf.checkpoints import model_folder
from acformer.training.recipe import Recipe

ROWS = 64
"""The embedding grows by a whole number of so many rows where `<image>` is added (`acformer.hf.build`)."""


def model_config(recipe: Recipe) -> AcFormerConfig:
    """The architecture that a recipe builds, or that of the model it goes on from.

    Raises:
        CheckpointError: a part's config can be read nowhere.
        UsageError: the parts make no model.
    """
    if recipe.from_model is not None:
        folder = model_folder(recipe.from_model)
        return AcFormerConfig.from_pretrained(adapter_base(Path(folder)) or folder)
    spec = recipe.model
    vision = named_config(spec.vision, "model.vision")
    return AcFormerConfig(
        vision_config=getattr(vision, "vision_config", None) or vision,  # CLIP's and SigLIP's have two towers
        text_config=_text_config(spec.text, spec.tokenizer_vocab),
        **spec.architecture(),
        image_token_id=0,
    )


def named_config(name: str, key: str) -> PreTrainedConfig:
    """Of a folder, a model of `geometries.yaml` or a hub name; `key`: where the recipe names it."""
    known = geometries()
    if name in known and not Path(name).is_dir():
        options = dict(known[name])
        return CONFIG_MAPPING[options.pop("model_type")](**options)
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # a hub, its cache and files have no end of ways to say that a config is not there
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"no config of {name!r} here or on the hub ({reason}): give {key}=FOLDER, a folder with its config.json"
        ) from error


@cache
def geometries() -> dict[str, dict[str, Any]]:
    """`geometries.yaml`: options of a config by the model's name."""
    return yaml.safe_load((files("acformer.training") / "geometries.yaml").read_text(encoding="utf-8"))


def _text_config(text: str | dict, tokenizer_vocab: int) -> PreTrainedConfig:
    if isinstance(text, dict):
        return new_text_config(text, vocab_size=tokenizer_vocab, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = named_config(text, "model.text").get_text_config()
    config.vocab_size = -(-(config.vocab_size + 1) // ROWS) * ROWS
    return config


def empty_model(config: AcFormerConfig) -> AcFormerForConditionalGeneration:
    """The model with weights that have a shape and no memory (meta device)."""
    with torch.device("meta"), no_init_weights():
        model = AcFormerForConditionalGeneration(config)
    model.tie_weights()  # a part of the initialisation that is left out
    return model


def replace_weights(model: nn.Module, make: Callable[[nn.Parameter], torch.Tensor]) -> None:
    """Every weight by what `make` gives for it, once where modules share it; it learns or not as before.

    Buffers are made anew on the current device: nobody looks at their values.
    """
    made: dict[int, Any] = {}
    for parameter in model.parameters():
        made[id(parameter)] = nn.Parameter(make(parameter), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        made[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                tensors[name] = None if tensor is None else made[id(tensor)]
