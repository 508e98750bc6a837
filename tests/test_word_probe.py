"""A probe by a language model's words: what it scores by, what it draws tokens to, where it can stand."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from acformer.errors import UsageError
from acformer.lab.reproduce.plans import WORD_PROBE, plan_for, table_recipe
from acformer.lab.reproduce.probe_pretraining import probe_words
from acformer.lab.reproduce.train_probe import train_probe
from acformer.lab.scenes.difficulty import DIFFICULTIES
from acformer.lab.scenes.layout import make_scene
from acformer.lab.scenes.targets import class_names, targets_of
from acformer.lab.scenes.word_probe import WordProbe
from acformer.training.recipe import ModelSpec

SMALL = DIFFICULTIES["openmoji-scenes-small"]
NAMES = class_names(SMALL)


@pytest.fixture
def words():
    return torch.randn(len(NAMES), 32, generator=torch.Generator().manual_seed(0)) + 1.0


@pytest.fixture
def probe(words):
    torch.manual_seed(0)
    return WordProbe(SMALL, 4, words)


def test_a_token_that_is_a_word_is_named(probe, words):
    """Two tokens are embeddings of nouns, two of nothing: with no training at all these nouns have the best scores."""
    nothing = words.mean(0)
    tokens = torch.stack([words[5], nothing, words[11], nothing])[None]  # (1, T, E)
    best = probe(tokens)["present"][0].topk(2).indices
    assert set(best.tolist()) == {5, 11}


def test_tokens_are_drawn_to_the_words_of_what_is_there(probe, words):
    scene = make_scene(SMALL, "train", 0)
    targets = targets_of([scene])
    there = targets.counts[0] > 0
    exact = words.clone()[None]  # as if each class had seen its own word
    predictions = probe(torch.randn(1, 4, 32))
    base = probe.loss({**predictions, "seen": exact}, targets)
    absent, present = exact.clone(), exact.clone()
    absent[0, ~there] += 7
    present[0, there] += 7
    assert torch.equal(probe.loss({**predictions, "seen": absent}, targets), base)
    far = (49.0 * words.shape[-1] / words[there].square().sum(-1)).mean()  # squared, relative to the word's own length
    torch.testing.assert_close(probe.loss({**predictions, "seen": present}, targets) - base, far)


def test_the_tokens_learn_and_the_words_do_not(probe, words):
    tokens = torch.randn(1, 4, 32, requires_grad=True)
    probe.loss(probe(tokens), targets_of([make_scene(SMALL, "train", 1)])).backward()
    assert tokens.grad.abs().sum() > 0
    learning = {name for name, parameter in probe.named_parameters() if parameter.grad is not None}
    assert {"score.scale", "score.bias"} <= learning
    assert not any("words" in name or "directions" in name for name, _ in probe.named_parameters())
    assert torch.equal(probe.words, words)


def test_the_words_are_the_language_models(tmp_path):
    """The mean of the embeddings of a name's tokens, with the space that stands before it in a sentence."""
    language_model = AutoModelForCausalLM.from_config(tiny.config().text_config)
    language_model.save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    recipe = table_recipe("scenes-cpu-words")
    found = probe_words(recipe, ModelSpec("-", str(tmp_path)))
    ids = tokenizer(f" {NAMES[3]}", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert found.shape == (len(NAMES), language_model.config.hidden_size)
    torch.testing.assert_close(found[3], language_model.get_input_embeddings().weight[ids].mean(0).detach())
    assert probe_words(table_recipe("scenes-cpu"), ModelSpec("-", str(tmp_path))) is None
    with pytest.raises(UsageError, match="needs the words of a pre-trained language model"):
        probe_words(recipe, ModelSpec("-", {"hidden_size": 32}))


def test_alone_it_is_refused(monkeypatch):
    monkeypatch.setattr(
        "acformer.lab.reproduce.train_probe.load_vision_encoder", lambda *_, **__: pytest.fail("loaded")
    )
    recipe = table_recipe("scenes-cpu-words")
    assert recipe.model.text == WORD_PROBE
    with pytest.raises(UsageError, match="take it as a scale's probe"):
        train_probe(recipe)


@pytest.mark.parametrize("scale", ["cpu-smollm2", "cpu-smollm2-hard"])
def test_the_scale_teaches_by_words_what_smollm2_reads(scale):
    scale = plan_for("successor", scale).scale
    recipe, probe = scale.load_recipe(), table_recipe(scale.probe)
    assert probe.model.text == WORD_PROBE
    assert (recipe.model.text, recipe.model.dtype) == ("embedded:smollm2-135m", "bfloat16")
    assert recipe.finetune.lora is not None
    for key in ("vision", "image_size", "connector_kwargs", "dtype"):  # the connector that the probe leaves behind fits
        assert getattr(recipe.model, key) == getattr(probe.model, key)
