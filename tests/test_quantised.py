"""Quantised models load, answer and save; parts stay out by the names that users give."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING

from acformer.errors import UsageError
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration
from acformer.hf.skipped_modules import with_full_names

extras = pytest.mark.extras
quiet = pytest.mark.filterwarnings("ignore")
ASK = "USER: <image>\nWhat? ASSISTANT:"


@pytest.fixture
def folder(tmp_path):
    """A model of width 64, below which there are no blocks of 4 bits."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    special = {f"{name}_token_id": getattr(tiny.tokenizer(), f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = AcFormerConfig(
        vision_config=CONFIG_MAPPING["clip_vision_model"](**sizes, image_size=16, patch_size=4),
        text_config=CONFIG_MAPPING["llama"](**sizes, vocab_size=len(tiny.tokenizer()), **special),
        connector_kwargs={"num_anchors": 4, "depth": 1, "num_heads": 2, "head_dim": 32},
        image_token_id=tiny.tokenizer().convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    AcFormerForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def quantisation(name: str, skipped: list[str] | None = None) -> Any:
    """What `from_pretrained` takes; a test is skipped where the library is missing."""
    if name.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        bits = {"load_in_8bit": True} if "int8" in name else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        return BitsAndBytesConfig(**bits, llm_int8_skip_modules=skipped)
    if name.startswith("torchao"):
        from transformers import TorchAoConfig

        quantization = pytest.importorskip("torchao.quantization")
        return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=skipped)
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8", modules_to_not_convert=skipped)


def is_quantised(model, part: str) -> bool:
    linear = [
        module for name, module in model.named_modules() if name.startswith(part) and hasattr(module, "in_features")
    ]
    plain = [type(module) is torch.nn.Linear and type(module.weight) is torch.nn.Parameter for module in linear]
    assert linear
    assert len({*plain}) == 1, "all of a part or nothing"
    return not plain[0]


LIBRARIES = ["bitsandbytes int8", "bitsandbytes nf4", "torchao int8", "quanto int8"]


@extras
@quiet
@torch.no_grad()
@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("skipped", [None, ["connector", "lm_head"], ["model.connector", "lm_head"]])
def test_it_loads_answers_and_is_saved(name, skipped, folder, tmp_path):
    model = AcFormerForConditionalGeneration.from_pretrained(folder, quantization_config=quantisation(name, skipped))
    assert is_quantised(model, "model.language_model")
    assert is_quantised(model, "model.vision_tower")
    assert is_quantised(model, "model.connector") == (skipped is None)
    inputs = tiny.inputs(ASK, tiny.picture())
    logits = model(**inputs).logits
    whole = AcFormerForConditionalGeneration.from_pretrained(folder)(**inputs).logits
    assert (logits - whole).abs().max() < (0.3 if "nf4" in name else 0.03) * whole.abs().max()
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    if name.startswith("quanto"):
        again = reload_of_quanto(model, folder, tmp_path)
    else:
        model.save_pretrained(tmp_path / "saved")
        again = AcFormerForConditionalGeneration.from_pretrained(tmp_path / "saved")
        assert is_quantised(again, "model.connector") == (skipped is None)
        if "nf4" in name:  # once it was saved, bitsandbytes runs another kernel on a CPU
            before, logits = logits, model(**inputs).logits
            assert (before - logits).abs().max() < 0.1 * logits.abs().max()  # measured 0.058
    assert torch.equal(again(**inputs).logits, logits)


def reload_of_quanto(model, folder, tmp_path):
    """Its own way, since transformers saves no model of quanto's: docs/export.md."""
    from optimum.quanto import quantization_map, requantize
    from safetensors.torch import load_file, save_file

    with pytest.raises(UsageError, match=r"QuantoHfQuantizer: transformers cannot save .* quantization_map"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    save_file(model.state_dict(), tmp_path / "quantised.safetensors")
    (tmp_path / "map.json").write_text(json.dumps(quantization_map(model)))
    again = AcFormerForConditionalGeneration.from_pretrained(folder)
    requantize(again, load_file(tmp_path / "quantised.safetensors"), json.loads((tmp_path / "map.json").read_text()))
    return again.eval()


@pytest.mark.parametrize("name", ["llm_int8_skip_modules", "modules_to_not_convert"])
def test_names_as_users_give_them(name):
    given = SimpleNamespace(**{name: ["connector", "language_model.layers.0", "lm_head", "model.fusion"]})
    full = [*vars(given)[name], "model.connector", "model.language_model.layers.0"]
    assert vars(with_full_names(given))[name] == full
    assert with_full_names({name: vars(given)[name], "bits": 8}) == {name: full, "bits": 8}
    assert len(vars(given)[name]) == 4, "the config that was given stays as it is"
    assert with_full_names(None) is None
    assert vars(with_full_names(SimpleNamespace(**{name: None}))) == {name: None}


def test_few_bits_that_cannot_be_saved_are_refused(tmp_path):
    model = tiny.model()
    model.hf_quantizer = SimpleNamespace(is_serializable=lambda: False)
    with pytest.raises(UsageError, match="transformers cannot save weights in its few bits; save state_dict"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_buffer_that_no_constructor_gives_keeps_its_value(folder):
    """As quanto's scales, which come to be after the connector was built."""
    model = AcFormerForConditionalGeneration.from_pretrained(folder)
    linear = model.model.connector.projector[0]
    linear.register_buffer("input_scale", torch.full((), 3.0))
    model._init_weights(model.model.connector)
    assert linear.input_scale == 3
