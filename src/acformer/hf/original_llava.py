"""LLaVA's checkpoints in their original format (`llava_llama`): the parts that they hold and name.

The folder has the language model with `model.mm_projector.*` among its weights, or a projector alone
(`mm_projector.bin`) beside a config that names the language model. The encoder is named, as a rule not held.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from acformer.errors import CheckpointError, translated
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration
from acformer.hf.build import add_image_token, assemble, pretrained_text
from acformer.hf.processing_acformer import IMAGE_TOKEN
from acformer.untrusted import read_weights
from acformer.vision.encoder import truncate
from acformer.vision.load import load_tower

LANGUAGE_MODELS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
"""LLaVA's `model_type`s, and transformers' of the language model inside."""
PROJECTOR = "mm_projector"
NOT_OURS = ("model.vision_tower.", f"model.{PROJECTOR}.", "model.image_newline")
"""What of the weights is not the language model's."""


@dataclass(frozen=True)
class Named:
    """What LLaVA's config says of the model beside its language model."""

    vision: str
    layer: int
    include_prefix: bool


def is_original(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is LLaVA's own."""
    return "mm_vision_tower" in config or config.get("model_type") in ("llava_llama", "llava_mistral", "llava_qwen")


def load_original(
    folder: Path, config: dict[str, Any], *, vision: str | None, text: str | None
) -> tuple[AcFormerForConditionalGeneration, PreTrainedTokenizerBase, str]:
    """The model with connector `mlp`, its tokenizer and the encoder's name.

    vision, text: names to take instead of those in the config.

    Raises:
        CheckpointError: a setting that our model does not have, weights that are not there or do not fit.
    """
    named = _named(folder, config, vision)
    weights = _weights(folder)
    projector = _projector(folder, weights)
    if text is None and "model.embed_tokens.weight" in weights:
        tokenizer, language_model = _language_model(folder, config, weights)
    else:
        tokenizer, language_model = pretrained_text(_text_name(folder, config, text), torch.float32)
    dtype = next(language_model.parameters()).dtype
    tower = load_tower(named.vision, dtype)
    linear = "weight" in projector
    ours = AcFormerConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        connector="linear" if linear else "mlp",
        connector_kwargs={"include_prefix": named.include_prefix},
        feature_layer=named.layer,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        dtype=dtype,
    )
    model = assemble(ours, truncate(tower, named.layer), language_model)
    _put(model.model.connector.get_submodule("projector"), projector, folder)
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    return model, tokenizer, named.vision


def _named(folder: Path, config: dict[str, Any], vision: str | None) -> Named:
    kind, feature = config.get("mm_projector_type", "linear"), config.get("mm_vision_select_feature", "patch")
    layer, name = config.get("mm_vision_select_layer", -2), vision or config.get("mm_vision_tower")
    if kind not in ("linear", "mlp2x_gelu"):
        raise CheckpointError(f"{folder}: mm_projector_type={kind!r} is unsupported; known: linear, mlp2x_gelu")
    if feature not in ("patch", "cls_patch"):
        raise CheckpointError(f"{folder}: mm_vision_select_feature={feature!r} is unsupported; known: patch, cls_patch")
    if not isinstance(layer, int) or not isinstance(name, str):
        raise CheckpointError(f"{folder}: its config names no encoder and layer (mm_vision_tower): give --vision NAME")
    return Named(name, layer, feature == "cls_patch")


def _weights(folder: Path) -> dict[str, Tensor]:
    """Of all files of the language model; none where there is a projector alone."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return {name: weight for file in files for name, weight in read_weights(file).items()}


def _projector(folder: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if not any(PROJECTOR in name for name in weights):
        file = folder / f"{PROJECTOR}.bin"
        if not file.is_file():
            raise CheckpointError(f"{folder} holds no projector: neither {file.name} nor model.{PROJECTOR}.* weights")
        weights = read_weights(file)
    return {re.sub(rf".*{PROJECTOR}\.", "", name): weight for name, weight in weights.items() if PROJECTOR in name}


def _put(module: torch.nn.Module, projector: dict[str, Tensor], folder: Path) -> None:
    wanted = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    given = {name: tuple(weight.shape) for name, weight in projector.items()}
    if wanted != given:
        raise CheckpointError(f"{folder}: its projector has weights {given}, where the model wants {wanted}")
    module.load_state_dict(projector)


def _text_name(folder: Path, config: dict[str, Any], text: str | None) -> str:
    name = text or config.get("_name_or_path")
    if not isinstance(name, str) or not name or name == str(folder):
        raise CheckpointError(
            f"{folder} holds no language model and names none: give --text NAME, the one it was made with"
        )
    return name


def _language_model(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> tuple[Any, Any]:
    """Out of the folder's own weights, in their dtype, with `<image>` in its vocabulary."""
    kind = LANGUAGE_MODELS.get(config.get("model_type", ""))
    if kind is None:
        raise CheckpointError(
            f"{folder}: model_type {config.get('model_type')!r} is none of {', '.join(LANGUAGE_MODELS)}"
        )
    config_class = CONFIG_MAPPING[kind]
    known = {*(field.name for field in fields(config_class)), *config_class.attribute_map, "rope_theta", "rope_scaling"}
    own = {name: weight for name, weight in weights.items() if not name.startswith(NOT_OURS)}
    with translated(f"cannot load {str(folder)!r}", CheckpointError):
        text_config = config_class(**{key: value for key, value in config.items() if key in known})
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
        model, report = AutoModelForCausalLM._model_mapping[config_class].from_pretrained(
            None,
            config=text_config,
            state_dict=own,
            dtype=own["model.embed_tokens.weight"].dtype,
            output_loading_info=True,
        )
    wrong = {*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])}
    if wrong := {key for key in wrong if not key.endswith("rotary_emb.inv_freq")}:  # which older versions have saved
        raise CheckpointError(f"{folder}: {len(wrong)} weights do not fit its config, first: {min(wrong)}")
    add_image_token(tokenizer, model)
    return tokenizer, model
