"""Models out of parts: what of `model.text` and of the device can be wrong, and how it is said."""

import pytest
import tiny
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from acformer.errors import UsageError
from acformer.hf.build import _new_text, _pretrained_text, parse_device, train_tokenizer

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
    _pretrained_text(str(tmp_path / "text"), torch.float32)[0].save_pretrained(tmp_path / "loaded")
    for folder, side in (("new", "left"), ("text", "right"), ("loaded", "left")):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).padding_side == side


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
