"""Cheaper steps compute what they computed before, and leave the model as it was."""

import pytest
import tiny
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from acformer.errors import UsageError
from acformer.training import lean as module
from acformer.training.lean import SHORT, lean, short_attention
from acformer.training.learner import in_float32
from acformer.training.lora import LoraSpec, add_adapters
from acformer.training.trainer import freeze


class Causal(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 3


def heads(length: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Queries of six heads, keys and values of two."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, number, length, 8) for number in (6, 2, 2)]
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def padding(length: int) -> torch.Tensor:
    """Causal, the last three of the second row left out: (2, 1, L, L)."""
    mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, ..., -3:] = False
    return mask


def results(attend, inputs, mask, **kwargs):
    output, _ = attend(Causal(), *inputs, mask, **kwargs)
    loss = (output.float() * torch.linspace(-1, 1, output.shape[-1])).square().sum()
    return output, *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_short_rows_attend_as_the_kernel_does(kind):
    inputs, mask = heads(11), None if kind == "none" else padding(11)
    if kind == "float":
        mask = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, torch.finfo(torch.bfloat16).min)
    single = mask.float() if kind == "float" else mask
    expected = results(sdpa_attention_forward, [x.detach().float().requires_grad_() for x in inputs], single)
    found = results(short_attention, inputs, mask, scaling=8**-0.5)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).norm() < 0.02 * other.norm()
    other = results(short_attention, inputs, mask, scaling=1.0)
    assert (other[0].float() - expected[0]).norm() > 0.1 * expected[0].norm()


@pytest.mark.parametrize("case", ["long", "float32", "dropout"])
def test_other_rows_are_the_kernels(case, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 4 if case == "long" else 64)
    monkeypatch.setattr(module, "sdpa_attention_forward", lambda *_, **told: (told, None))
    inputs = heads(9, torch.float32 if case == "float32" else torch.bfloat16)
    told, _ = short_attention(Causal(), *inputs, None, dropout=0.5 if case == "dropout" else 0.0, scaling=0.3)
    assert told == {"dropout": 0.5 if case == "dropout" else 0.0, "scaling": 0.3}


@pytest.fixture
def adapted():
    """A model in bfloat16 with adapters that say something, and a batch with labels."""
    model = tiny.model().to(torch.bfloat16)
    freeze(model, {"connector": 1.0, "language_model": 1.0})
    torch.manual_seed(0)
    add_adapters(model, LoraSpec(r=2, alpha=4, dropout=0.0))
    in_float32(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = tiny.inputs("USER: <image>\nred green blue", tiny.picture())
    return model, {**batch, "labels": batch["input_ids"].clone()}


def losses(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss.detach(), torch.autograd.grad(loss, learning, allow_unused=True)


def test_what_learns_is_in_float32_beside_a_model_in_bfloat16(adapted):
    model, _ = adapted
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_a_lean_step_is_the_same_step(adapted, monkeypatch):
    """Without the cast of the adapters' inputs to the bit; with the other attention within bfloat16."""
    model, batch = adapted
    loss, gradients = losses(model, batch)
    with monkeypatch.context() as patch:
        patch.setattr(module, "LONGEST", 0)
        with lean(model, torch.bfloat16):
            same, equal = losses(model, batch)
    assert torch.equal(loss, same)
    assert all(torch.equal(one, other) for one, other in zip(gradients, equal, strict=True) if one is not None)
    with lean(model, torch.bfloat16):
        close, near = losses(model, batch)
    assert torch.allclose(loss, close, rtol=2e-2)
    norms = [(one - other).norm() / one.norm() for one, other in zip(gradients, near, strict=True) if one is not None]
    assert max(norms) < 0.15


def test_a_model_is_as_it_was_afterwards(adapted, monkeypatch):
    model, _ = adapted
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    adapters = [part for part in model.modules() if hasattr(part, "cast_input_dtype_enabled")]
    language_model = model.model.language_model
    with lean(model, torch.bfloat16, compile_layers=True):
        assert language_model.config._attn_implementation == SHORT
        assert not any(part.cast_input_dtype_enabled for part in adapters)
        assert compiled == list(language_model.layers)
    assert language_model.config._attn_implementation == "sdpa"
    assert adapters
    assert all(part.cast_input_dtype_enabled for part in adapters)
    assert all(layer._compiled_call_impl is None for layer in language_model.layers)


def test_whoever_has_chosen_another_kernel_keeps_it(adapted):
    model, _ = adapted
    model.model.language_model.set_attn_implementation("eager")
    with lean(model, torch.bfloat16):
        assert model.model.language_model.config._attn_implementation == "eager"


def test_layers_of_another_name_are_told_of(adapted):
    model, _ = adapted
    del model.model.language_model.layers
    with (
        pytest.raises(UsageError, match="compile_layers: LlamaModel has no decoder layers"),
        lean(model, None, compile_layers=True),
    ):
        pass
