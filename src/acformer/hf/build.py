"""A model out of parts: a pre-trained encoder, a pre-trained or new language model, a new connector.

The parts are ordinary Hugging Face checkpoints; what comes out is an ordinary `AcFormerForConditionalGeneration`
with its processor, ready to train or to save.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from acformer.data.conversation import end_tokens
from acformer.data.templates import resolve_template
from acformer.errors import CheckpointError, UsageError, translated, unknown_name
from acformer.fetch.embedded import resolve
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.hf.connector_weights import FILE, NEW_MODULES, Parts, load_connector
from acformer.hf.convert import with_new_modules
from acformer.hf.head import LanguageModelHead
from acformer.hf.processing_acformer import IMAGE_TOKEN
from acformer.hf.public_names import public_name
from acformer.untrusted import load_config
from acformer.vision.encoder import truncate
from acformer.vision.load import load_tower, pixel_statistics, placement

FROM_TOKENIZER = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}
"""What a new language model's config has from its tokenizer."""
NO_TEXT = "model.text does not describe a language model"
"""Configs and models say in many ways that they cannot be built of its options."""
LONGEST_WORD = 256
"""Letters without a space, or spaces, that a new tokenizer is trained on as one."""


def build_model(
    vision: str,
    text: str | dict,
    connector: str = "acformer",
    *,
    connector_kwargs: dict | None = None,
    fusion: str = "concat",
    fusion_kwargs: dict | None = None,
    feature_layer: int = -2,
    image_size: int | None = None,
    template: str = "vicuna_v1",
    tokenizer_vocab: int = 512,
    dtype: str = "float32",
    connector_weights: str | None = None,
    texts: Iterable[str] = (),
) -> tuple[AcFormerForConditionalGeneration, AcFormerProcessor]:
    """Model and processor out of parts; the connector (and a new language model) start at random.

    Args:
        vision: the image encoder: a hub name, a folder, `embedded:dinov2-s14`, `timm:NAME`, `open_clip:NAME@WEIGHTS`.
        text: the language model: likewise, or a dict that configures a new one (`model_type`, its config's fields).
        connector, connector_kwargs: a name from `list_connectors()` and its options.
        fusion, fusion_kwargs: how they reach the language model: `concat` or `gated_cross_attention`, and options.
        feature_layer, image_size: index into the encoder's `hidden_states` (Sec. 3.1: -2); pixels a side (its own).
        template: chat template: `vicuna_v1`, `bare`, or `tokenizer` for the language model's own.
        tokenizer_vocab, texts: size of a new language model's byte-level BPE, and what it is trained on.
        dtype: of the weights: `float32`, `bfloat16` or `float16`.
        connector_weights: a trained connector of the same options: `connector.safetensors`, a folder with one, a whole
            model, or LLaVA's `mm_projector.bin`.

    Raises:
        CheckpointError: a part cannot be loaded, or another connector's weights.
        UsageError: a name or option that does not exist.
    """
    tower = load_tower(vision, weights_dtype := parse_dtype(dtype))
    if isinstance(text, str):
        tokenizer, language_model = pretrained_text(resolve(text), weights_dtype)
    else:
        tokenizer = train_tokenizer(texts, tokenizer_vocab)
        language_model = _new_text(text, tokenizer, weights_dtype)
    config = AcFormerConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        connector=connector,
        connector_kwargs=connector_kwargs,
        fusion=fusion,
        fusion_kwargs=fusion_kwargs,
        feature_layer=feature_layer,
        image_size=image_size,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        dtype=weights_dtype,
    )
    model = assemble(config, truncate(tower, feature_layer), language_model)
    if connector_weights is not None:
        load_connector(model, connector_weights)
    processor = make_processor(tower, config, tokenizer, template)
    _note_names(model.config, vision, text)
    set_end_tokens(model, language_model.generation_config.eos_token_id, processor)
    return model, processor


def make_processor(
    tower: str | PreTrainedModel, config: AcFormerConfig, tokenizer: PreTrainedTokenizerBase, template: str
) -> AcFormerProcessor:
    """The processor of a model with that config; `template` by name."""
    return AcFormerProcessor(
        square_image_processor(tower, config.image_size),
        tokenizer,
        resolve_template(template, tokenizer),
        num_placeholders=config.num_placeholders,
        fusion=config.fusion,
        budgets=config.budgets,
    )


def _note_names(config: AcFormerConfig, vision: str, text: str | dict) -> None:
    """What the model is made of, for its card; `embedded:` names as they are given, not where they lie."""
    config.vision_config._name_or_path = public_name(vision)
    config.text_config._name_or_path = public_name(text) if isinstance(text, str) else ""


def from_parts(folder: Path, parts: Parts, dtype: torch.dtype | None = None) -> AcFormerForConditionalGeneration:
    """The model of a folder that holds its config and its connector alone; encoder and language model are read anew.

    Raises:
        CheckpointError: a part that cannot be loaded, or is another one than it was.
    """
    config = AcFormerConfig.from_pretrained(folder)
    config.dtype = dtype or parse_dtype(parts.dtype)
    tower = truncate(load_tower(parts.vision or "", config.dtype), config.feature_layer)
    _, language_model = pretrained_text(resolve(parts.text or ""), config.dtype)
    model = assemble(config, tower, language_model)
    load_connector(model, str(folder / FILE))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def set_end_tokens(
    model: AcFormerForConditionalGeneration, own: int | list[int] | None, processor: AcFormerProcessor
) -> None:
    """Generation stops at every token that may end a turn: the language model's own, and the template's."""
    ends = {*end_tokens(processor), *(own if isinstance(own, list) else [own])} - {None}
    model.generation_config.update(eos_token_id=sorted(ends), pad_token_id=processor.tokenizer.pad_token_id)


def assemble(
    config: AcFormerConfig, tower: PreTrainedModel, language_model: PreTrainedModel
) -> AcFormerForConditionalGeneration:
    """The parts' weights in one model; the connector's and the fusion's alone are new."""
    weights = {f"model.vision_tower.{name}": value for name, value in tower.state_dict().items()}
    head = LanguageModelHead(language_model)
    weights |= {head.renamed(name): value for name, value in language_model.state_dict().items()}
    return with_new_modules(config, weights, NEW_MODULES, "the parts do not fit together")


def parse_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16`."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise UsageError(f"unknown dtype {name!r}; valid: {', '.join(dtypes)}")
    return dtypes[name]


def parse_device(name: str) -> torch.device:
    """A device that works here: `cpu`, `cuda`, `cuda:1`, ...; `auto` is an accelerator if there is one."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def square_image_processor(vision: str | PreTrainedModel, image_size: int) -> LlavaImageProcessorPil:
    """LLaVA-1.5's preparation: pad to a square with the mean colour, resize; the encoder's own mean and std."""
    mean, std = pixel_statistics(vision)
    size = {"height": image_size, "width": image_size}
    return LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": image_size}, crop_size=size, image_mean=mean, image_std=std
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text at all can be written with it, the training texts shortest.

    It pads on the left, as every tokenizer that we save: an answer must begin right behind its prompt.
    """
    special = ["<pad>", "<s>", "</s>", IMAGE_TOKEN]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_without_long_words(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )


def _without_long_words(texts: Iterable[str]) -> Iterator[str]:
    """Texts with such words in pieces: training takes the square of a word's length (one of 100,000 letters, hours)."""
    long_word = re.compile(rf"\S{{{LONGEST_WORD},}}|\s{{{LONGEST_WORD},}}")
    for text in texts:
        if long_word.search(text):
            yield from (text[i : i + LONGEST_WORD] for i in range(0, len(text), LONGEST_WORD))
        else:
            yield text


def new_text_config(options: dict, **from_tokenizer: int) -> PreTrainedConfig:
    """The config of a new language model: `model.text` of a recipe, and what its tokenizer decides.

    Errors: `UsageError` for a kind of model or options that there are not, or that make no config.
    """
    options = dict(options)
    model_type = options.pop("model_type", "llama")
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(f"model.text.model_type {model_type!r} is not a language model of transformers")
    config_class = CONFIG_MAPPING[model_type]
    valid = {*(field.name for field in fields(config_class)), *config_class.attribute_map} - FROM_TOKENIZER
    for key in options:
        if key in FROM_TOKENIZER:
            raise UsageError(f"model.text.{key} follows from the new tokenizer: leave it out (see tokenizer_vocab)")
        if key not in valid:
            raise unknown_name("recipe key", f"model.text.{key}", (f"model.text.{name}" for name in valid))
    with translated(NO_TEXT, UsageError):
        return config_class(**from_tokenizer, **options)


def _new_text(options: dict, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    from_tokenizer = {key: len(tokenizer) if key == "vocab_size" else getattr(tokenizer, key) for key in FROM_TOKENIZER}
    config = new_text_config(options, **from_tokenizer)
    with translated(NO_TEXT, UsageError):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def pretrained_text(name: str, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and language model, with `<image>` in the vocabulary and in the embedding."""
    with translated(f"cannot load {name!r}", CheckpointError):
        load_config(name)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False, **placement())
    add_image_token(tokenizer, model)
    return tokenizer, model


def add_image_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """`<image>` into the vocabulary and, where there is no row for it, into the embeddings, in place."""
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > model.config.vocab_size:
        rows = model.config.vocab_size
        # Rows in multiples of 64, for which products are fast; new rows by our own seed, see below.
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
        _fill_new_rows(model, rows)


@torch.no_grad()
def _fill_new_rows(model: PreTrainedModel, first: int) -> None:
    """The same values whenever the language model is read: a connector that is saved alone is put beside them again."""
    generator = torch.Generator().manual_seed(0)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            new = module.weight[first:]
            std = getattr(model.config, "initializer_range", 0.02)
            new.copy_(torch.empty(new.shape).normal_(0, std, generator=generator))
