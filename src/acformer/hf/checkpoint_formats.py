"""A trained model in any of the formats that `acformer convert` takes, as a model of ours with its processor."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedTokenizerBase

from acformer.errors import CheckpointError, translated
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.hf.build import make_processor, set_end_tokens
from acformer.hf.checkpoints import load_model, model_folder
from acformer.hf.convert import from_llava, swap_connector
from acformer.hf.original_llava import is_original, load_original
from acformer.hf.processing_acformer import IMAGE_TOKEN
from acformer.untrusted import load_config

WANTED = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]
"""Files of a hub's repository that are read."""


def convert(
    source: str,
    connector: str,
    options: dict[str, Any] | None = None,
    *,
    template: str = "vicuna_v1",
    vision: str | None = None,
    text: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[AcFormerForConditionalGeneration, AcFormerProcessor, bool]:
    """A trained LLaVA, or a model of ours, with another connector; and whether its projector was kept.

    Args:
        source: a hub's name or a folder: LLaVA in transformers' format or in its own, or a model of ours.
        connector, options: what stands between encoder and language model from now on.
        template: chat template of the result, by name.
        vision, text: of LLaVA's own format, encoder and language model in place of those that its config names.
        dtype: of the weights; default theirs.

    Raises:
        CheckpointError: nothing there, another kind of model, or a setting of it that our model does not have.
    """
    folder = model_folder(source)
    model, processor = _read(source, folder, vision, text, template)
    model, kept = swap_connector(model, connector, options)
    processor.num_placeholders = model.config.num_placeholders
    return model if dtype is None else model.to(dtype), processor, kept


def _read(
    source: str, folder: str, vision: str | None, text: str | None, template: str
) -> tuple[AcFormerForConditionalGeneration, AcFormerProcessor]:
    with translated(f"cannot load {source!r}", CheckpointError):
        values = PreTrainedConfig.get_config_dict(folder)[0] if _exists(folder) else {}
    if not values or values.get("model_type") == AcFormerConfig.model_type:
        return load_model(source)
    if "vision_config" not in values and is_original(values):
        path = Path(folder) if Path(folder).is_dir() else Path(snapshot_download(folder, allow_patterns=WANTED))
        model, tokenizer, tower = load_original(path, values, vision=vision, text=text)
    elif values.get("model_type") == "llava":
        model, tokenizer = _transformers(folder)
        tower = folder
    else:
        raise CheckpointError(f"{source} holds a model of type {values.get('model_type')!r}, neither LLaVA nor ours")
    own = model.generation_config.eos_token_id
    processor = make_processor(tower, model.config, tokenizer, template)
    set_end_tokens(model, own, processor)
    return model, processor


def _exists(folder: str) -> bool:
    """A hub's name is asked for; a folder without a config is left to `load_model`, which says what is wrong."""
    path = Path(folder)
    return (path / "config.json").is_file() or not (path.exists() or folder.startswith((".", "/", "~")))


def _transformers(name: str) -> tuple[AcFormerForConditionalGeneration, PreTrainedTokenizerBase]:
    """LLaVA as transformers keeps it, with connector `mlp`."""
    with translated(f"cannot load {name!r}", CheckpointError):
        load_config(name)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
        theirs, report = LlavaForConditionalGeneration.from_pretrained(
            name, dtype="auto", use_safetensors=True, output_loading_info=True
        )
        if wrong := {*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])}:
            raise CheckpointError(f"{name}: {len(wrong)} weights do not fit the config, first: {min(wrong)}")
        model = from_llava(theirs)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != model.config.image_token_id:
        raise CheckpointError(
            f"{name}: its tokenizer has {IMAGE_TOKEN} as {tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)}, its config "
            f"as {model.config.image_token_id}"
        )
    return model, tokenizer
