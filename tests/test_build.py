"""Models out of parts: what of `model.text` and of the device can be wrong, and how it is said."""

import random
import time

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from acformer.data.samples import Sample
from acformer.errors import UsageError
from acformer.evaluate.generate import answer, converse
from acformer.hf.build import _new_text, build_model, parse_device, pretrained_text, train_tokenizer
from acformer.hf.checkpoints import load_model

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def test_a_new_language_model_has_the_tokenizers_vocabulary():
    options = {"model_type": "gpt2", "hidden_size": 32, "n_head": 4, "n_layer": 1, "n_inner": 16}
    model = _new_text(options, tiny.tokenizer(), torch.float32)
    assert model.config.vocab_size == len(tiny.tokenizer())
    assert (model.config.hidden_size, model.config.n_inner) == (32, 16)


def test_what_is_saved_pads_on_the_left(tmp_path):
    """An answer begins right behind its prompt, whatever the language model's own tokenizer did."""
    tokenizer = train_tokenizer(["What?"], 300)
    tokenizer.save_pretrained(tmp_path / "new")
    _new_text(SIZES, tokenizer, torch.float32).save_pretrained(tmp_path / "text")
    right = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", padding_side="right"
    )
    right.save_pretrained(tmp_path / "text")
    pretrained_text(str(tmp_path / "text"), torch.float32)[0].save_pretrained(tmp_path / "loaded")
    for folder, side in (("new", "left"), ("text", "right"), ("loaded", "left")):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).padding_side == side


def test_a_tokenizer_is_learnt_from_long_words_in_seconds():
    started = time.monotonic()
    letters = "".join(random.Random(0).choices("abcdefgh", k=500_000))
    tokenizer = train_tokenizer([letters, "x " + "\n" * 50_000], 400)
    assert time.monotonic() - started < 15, "200,000 letters took 12 s as one word"
    assert tokenizer.decode(tokenizer("abab " + "\n" * 9)["input_ids"]) == "abab " + "\n" * 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hiden_size": 32}, r"unknown recipe key 'model.text.hiden_size'; did you mean 'model.text.hidden_size'"),
        ({"vocab_size": 300}, r"model.text.vocab_size follows from the new tokenizer"),
        ({"eos_token_id": 2}, r"model.text.eos_token_id follows from the new tokenizer"),
        ({"hidden_size": "big"}, r"model.text does not .*'hidden_size' expected int, got str"),
        ({"hidden_size": 30}, r"model.text does not .*\(30\) is not a multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, r"model.text does not describe a language model: .*zero"),
        ({"hidden_act": "silly"}, r"model.text does not describe a language model: .*silly"),
        ({"intermediate_size": -3}, r"model.text does not describe a language model: "),
        ({"model_type": "lama"}, r"model.text.model_type 'lama' is not"),
        ({"model_type": ["llama"]}, r"model.text.model_type \['llama'\] is not"),
        ({"model_type": "dinov2"}, r"model.text.model_type 'dinov2' is not a language model"),
    ],
)
def test_what_is_wrong_with_a_new_language_model(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        _new_text({**SIZES, **options}, tiny.tokenizer(), torch.float32)
    assert "\n" not in str(caught.value)


def test_devices():
    assert parse_device("cpu") == torch.device("cpu")
    assert parse_device("auto").type == (torch.accelerator.current_accelerator() or torch.device("cpu")).type


@pytest.mark.parametrize("name", ["foo", "cuda:x", "cuda:99", "meta", "mps", ""])
def test_devices_that_are_not_here(name):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is here")
    with pytest.raises(UsageError, match=f"no device '{name}' here: ") as caught:
        parse_device(name)
    assert "\n" not in str(caught.value)


def test_the_templates_end_token_ends_answers_on_every_path(tmp_path):
    """Its end of a turn is not `eos_token`, and is all that this model ever says: one token, then silence."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]  # of equal logits the first is said
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["what color?"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[1], pad_token=special[1])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "text")
    text = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=300, eos_token_id=1, pad_token_id=1, bos_token_id=None))
    torch.nn.init.zeros_(text.model.norm.weight)
    text.save_pretrained(tmp_path / "text")
    AutoModel.from_config(tiny.config().vision_config).save_pretrained(tmp_path / "vision")
    CLIPImageProcessorPil().save_pretrained(tmp_path / "vision")
    options = {"connector_kwargs": tiny.CONNECTORS["acformer"], "template": "tokenizer"}
    model, processor = build_model(str(tmp_path / "vision"), str(tmp_path / "text"), **options)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")

    loaded, processor = load_model(str(tmp_path / "model"))
    assert {0, 1} <= {*loaded.generation_config.eos_token_id}
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(tiny.picture(), prompt, return_tensors="pt")
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    for one in (model, loaded, auto):
        said = one.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert said.tolist() == [0]
    sample = Sample("", tuple(chat), (tiny.picture(),))
    assert list(answer(loaded, processor, [sample], progress=False)) == [""]
    assert list(converse(loaded, processor, tiny.picture(), ["what color?"])) == [""]
    answers = pipeline("image-text-to-text", model=loaded, processor=processor)
    (said,) = answers(text=[prompt], images=[tiny.picture()], max_new_tokens=5, return_tensors=True)
    assert said["generated_token_ids"][-1] == 0
    assert len(said["generated_token_ids"]) == inputs["input_ids"].shape[1] + 1
