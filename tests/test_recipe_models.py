"""The recipes of published models build with tiny weights of the same families, and say what their tokenizers say.

Real tokenizer files are used where `make tokenizers` has put them, and skipped with a word where it has not; a stand-in
with the same marks and a template of the same kind always runs.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoTokenizer

from acformer.data.conversation import encode_conversation, encode_prompt
from acformer.data.templates import resolve_template
from acformer.errors import AcFormerError, UsageError
from acformer.fetch.embedded import cache_dir
from acformer.hf.build import build_model, train_tokenizer
from acformer.training.recipe import load_recipe
from acformer.training.skeleton import geometries
from acformer.vision.families import ENCODERS

CHATML = (
    "{%- for message in messages -%}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)
REAL = {
    "llava15-13b-acformer145": "llama2",
    "openllama3b-acformer145": "llama2",
    "llava15-7b-acformer145-lora": "llama2",
    "siglip2-qwen3-0.6b": "qwen3",
    "dinov3-smollm2-360m": None,  # no package has SmolLM2's alone
}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE_TOKENS = {"siglip2-qwen3-0.6b": 144, "dinov3-smollm2-360m": 65}  # SigLIP has no [CLS] to add
IMAGE = {"type": "image"}
TALK = [
    {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A red circle."},
    {"role": "user", "content": "And its size?"},
    {"role": "assistant", "content": "Small."},
]


def stand_in(has_template: bool):
    """Byte-level BPE with Llama's marks, or with those of ChatML."""
    made = copy.deepcopy(train_tokenizer(["user assistant red circle small what is it"], 320))
    if has_template:
        made.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
        made.bos_token, made.chat_template = None, CHATML
    return made


def real(name: str | None):
    folder = cache_dir() / "tokenizers" / str(name)
    if name is None:
        pytest.skip("no package has this model's tokenizer files alone")
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the real tokenizer files are not here: make tokenizers")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["stand-in", "real"])
def built(request, tmp_path):
    """A recipe's model and processor with tiny parts in folders, made as `train` makes them."""

    def build(name: str):
        recipe = load_recipe(name, [f"model.vision={tmp_path}/vision", f"model.text={tmp_path}/text"])
        shipped = load_recipe(name).model
        vision = dict(geometries()[shipped.vision])
        if vision["model_type"] not in ENCODERS:
            pytest.skip(f"encoders of type {vision['model_type']} are not known yet")
        uses_own = shipped.template == "tokenizer"
        tokenizer = stand_in(uses_own) if request.param == "stand-in" else real(REAL[name])
        write_parts(tmp_path, vision, geometries()[shipped.text], tokenizer)
        return build_model(**asdict(recipe.model))

    return build


def write_parts(folder: Path, vision: dict, text: dict, tokenizer) -> None:
    """Same families, same patches, same image size; small widths."""
    config = CONFIG_MAPPING[vision["model_type"]](**{**vision, **SMALL})
    AutoModel.from_config(config).save_pretrained(folder / "vision")
    pixels = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "vision/preprocessor_config.json").write_text(json.dumps(pixels))
    options = {**text, **SMALL, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer)}
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[options.pop("model_type")](**options)).save_pretrained(
        folder / "text"
    )
    tokenizer.save_pretrained(folder / "text")


def encode(processor, messages, **kwargs):
    """As training does it; Qwen3's own template thinks, which may not be known yet."""
    try:
        return encode_conversation(processor, messages, **kwargs)
    except UsageError as error:
        if "rewrites what it wrote" in str(error):
            pytest.skip("templates that take thoughts out of earlier turns are not known yet")
        raise


@pytest.mark.parametrize("name", REAL)
def test_model_and_prompt(name, built):
    model, processor = built(name)
    num_tokens = IMAGE_TOKENS.get(name, 145)
    assert model.config.num_placeholders == processor.num_placeholders == num_tokens
    encoded = encode(processor, TALK)
    assert encoded.input_ids.count(model.config.image_token_id) == num_tokens
    prompt = encode_prompt(processor, TALK[:-1])
    assert encoded.input_ids[: len(prompt)] == prompt
    learned = [label for label in encoded.labels if label != -100]
    said = processor.tokenizer.decode(learned)
    assert "A red circle." in said
    assert "Small." in said
    assert "What is it" not in said
    assert learned.count(processor.tokenizer.eos_token_id) == 2  # each answer ends in the token that stops generation


@pytest.mark.parametrize("name", REAL)
def test_both_stages_make_a_loss(name, built):
    model, processor = built(name)
    pixels = processor.image_processor([tiny.picture()], return_tensors="pt")["pixel_values"]
    for _, spec in load_recipe(name).stages():
        speaker = copy.copy(processor)
        if spec.template is not None:
            speaker.chat_template = resolve_template(spec.template, processor.tokenizer)
        encoded = encode(speaker, TALK[:2], max_length=spec.max_length)
        batch = {"input_ids": torch.tensor([encoded.input_ids]), "labels": torch.tensor([encoded.labels])}
        loss = model(**batch, pixel_values=pixels, supervised_only=True).loss
        assert loss.isfinite()
        assert loss > 0


def test_parts_that_are_not_there_are_named():
    with pytest.raises(AcFormerError, match="nowhere"):
        build_model(vision="/nowhere/vision", text="/nowhere/text")
