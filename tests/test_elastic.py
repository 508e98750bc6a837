"""The elastic budget: what a step draws, what a batch loses by it, and one checkpoint that answers at every budget."""

import functools
import json
from collections import Counter

import pytest
import tiny
import torch
from test_train import data, recipe, weights  # noqa: F401 (fixtures)

from acformer.anchors.selectors import SELECTORS
from acformer.connectors import Geometry, build_connector
from acformer.data.collate import Collator, ConversationDataset
from acformer.data.conversation import IGNORE
from acformer.data.datasets import load_samples
from acformer.data.samples import Sample
from acformer.errors import UsageError
from acformer.evaluate.generate import answer
from acformer.hf import AcFormerForConditionalGeneration
from acformer.hf.checkpoints import load_model
from acformer.training.elastic import ElasticBudget, drop_positions, elastic_choices
from acformer.training.stages import train

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
SMALL = tiny.CONNECTORS["acformer"]
CLIP = Geometry(32, 24, (4, 4), 1)


@pytest.fixture
def batch(tmp_path):
    """Rows with two, no and one images, each image with 9 image tokens, as the collator gives them."""
    samples = []
    for number, count in enumerate((2, 0, 1)):
        paths = tuple(tmp_path / f"{number}{image}.png" for image in range(count))
        for path in paths:
            tiny.picture(number).save(path)
        parts = [*[{"type": "image"}] * count, {"type": "text", "text": "What is it?"}]
        messages = ({"role": "user", "content": parts}, {"role": "assistant", "content": "red " * (number + 1)})
        samples.append(Sample(str(number), messages, paths, file="x", record=number))

    def make(num_placeholders: int) -> dict:
        processor = tiny.processor(num_placeholders)
        dataset = ConversationDataset(samples, processor)
        return Collator(processor)([dataset[index] for index in range(len(dataset))])

    return make


# The draw


def test_a_step_draws_its_own_number_and_always_the_same():
    budget = ElasticBudget(tuple(range(2, 18)), 0, None)
    drawn = [budget.sample(step) for step in range(3200)]
    assert drawn == [ElasticBudget(tuple(range(2, 18)), 0, None).sample(step) for step in range(3200)]
    assert drawn[:20] != [ElasticBudget(tuple(range(2, 18)), 1, None).sample(step) for step in range(20)]
    counts = Counter(drawn)
    assert set(counts) == set(range(2, 18))
    # 200 of each are expected, 13.7 is one sigma; the draw is fixed, so this holds always or never.
    assert all(140 < count < 260 for count in counts.values())


@pytest.mark.parametrize("selector", [*SELECTORS, *SELECTORS.aliases])
def test_the_range_must_fit_the_connector(selector):
    acformer = build_connector("acformer", CLIP, **{**SMALL, "selector": selector})
    assert elastic_choices(acformer, 2, 17) == tuple(range(2, 18))
    with pytest.raises(UsageError, match=r"elastic range 2\.\.18: 18 tokens do not fit: num_anchors must be in 1\.\."):
        elastic_choices(acformer, 2, 18)
    with pytest.raises(UsageError, match=r"elastic range 1\.\.5: 1 tokens do not fit"):
        elastic_choices(acformer, 1, 5)
    with pytest.raises(UsageError, match="MLPConnector always gives 16 tokens; take an elastic connector"):
        elastic_choices(build_connector("mlp", CLIP), 2, 5)


def test_numbers_in_between_that_do_not_fit_are_not_drawn():
    """[CLS] and 4 .. 9 pooled tokens of 4 x 4 patches: there is no grid of 5 or 7."""
    pooling = build_connector("pooling", CLIP, num_tokens=4)
    assert elastic_choices(pooling, 5, 10) == (5, 7, 9, 10)


# The cut


@pytest.mark.parametrize("wanted", [2, 5, 9])
def test_a_cut_batch_is_the_batch_of_that_budget(batch, wanted):
    budget = ElasticBudget((wanted, 9) if wanted < 9 else (9,), 0, tiny.processor())
    step = next(step for step in range(99) if budget.sample(step) == wanted)
    cut, expected = budget(batch(9), step), batch(wanted)
    assert cut.pop("num_visual_tokens") == wanted
    assert cut.keys() == expected.keys()
    for key in ("input_ids", "attention_mask", "labels", "pixel_values"):
        assert torch.equal(cut[key], expected[key]), key


def test_positions_are_dropped_and_rows_closed_up():
    text = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
    }
    dropped = torch.tensor([[False, True, False, True], [False] * 4])
    left = drop_positions(dropped, text, {"input_ids": 9, "attention_mask": 0})
    assert left["input_ids"].tolist() == [[1, 3], [5, 6]]
    assert left["attention_mask"].tolist() == [[1, 1], [1, 1]]
    left = drop_positions(~dropped, text, {"input_ids": 9, "attention_mask": 0})
    assert left["input_ids"].tolist() == [[2, 4], [9, 9]]
    assert left["attention_mask"].tolist() == [[1, 1], [0, 0]]


def test_labels_of_a_cut_batch_give_the_loss_of_its_budget(batch):
    model, labels = tiny.model(), batch(9)["labels"]
    cut = ElasticBudget((3,), 0, tiny.processor())  # the largest is what the samples were encoded with: nothing to cut
    assert torch.equal(cut(batch(3), 0)["labels"], batch(3)["labels"])
    budget = ElasticBudget((3, 9), 0, tiny.processor())
    step = next(step for step in range(99) if budget.sample(step) == 3)
    given, own = budget(batch(9), step), batch(3)
    for inputs in (given, own):
        inputs.pop("sample_ids")
    assert torch.equal(model(**given).loss, model(**own, num_visual_tokens=3).loss)
    assert (given["labels"] != IGNORE).sum() == (labels != IGNORE).sum()


# A whole run


def answers(folder, data, tokens: int | None) -> list[str]:  # noqa: F811
    model, processor = load_model(str(folder))
    samples = load_samples(str(data / "questions.json"))
    return list(answer(model, processor, samples, num_visual_tokens=tokens, max_new_tokens=6, progress=False))


def test_one_checkpoint_serves_any_budget(recipe, data, monkeypatch):  # noqa: F811
    seen = []
    whole = AcFormerForConditionalGeneration.forward

    @functools.wraps(whole)  # generate() looks at the signature
    def watched(self, *args, **kwargs):
        output = whole(self, *args, **kwargs)
        if self.training:
            seen.append((kwargs["num_visual_tokens"], len(output.image_hidden_states) // 4, kwargs["input_ids"].shape))
        return output

    monkeypatch.setattr(AcFormerForConditionalGeneration, "forward", watched)
    steps = "finetune.training.max_steps=12"
    folder = train(recipe("stage=finetune", "pretrain=null", "finetune.elastic=[2, 17]", steps), progress=False)
    budget = ElasticBudget(tuple(range(2, 18)), 0, None)
    assert [tokens for tokens, _, _ in seen] == [budget.sample(step) for step in range(12)]
    assert len({tokens for tokens, _, _ in seen}) > 6
    assert all(asked == given for asked, given, _ in seen)
    lengths = {tokens: shape[1] for tokens, _, shape in seen}
    assert all(lengths[a] - lengths[b] == a - b for a in lengths for b in lengths), "a smaller budget is a shorter row"
    _, processor = load_model(str(folder))
    assert processor.num_placeholders == 5, "the connector's own number is what it is saved with"
    said = {tokens: answers(folder, data, tokens) for tokens in (2, 5, 17)}
    assert {len(answers) for answers in said.values()} == {12}
    assert said[5] == answers(folder, data, None)
    log = json.loads((folder.parent / "log.json").read_text())
    assert all(0 < entry["loss"] < 100 for entry in log if "loss" in entry)


@pytest.mark.slow
def test_resume_goes_on_with_the_same_draws(recipe, tmp_path):  # noqa: F811
    save = [
        "stage=finetune",
        "pretrain=null",
        "finetune.elastic=[2, 17]",
        "finetune.training.max_steps=4",
        "finetune.training.save_strategy=steps",
        "finetune.training.save_steps=1",
    ]
    expected = weights(train(recipe(*save, f"output_dir={tmp_path}/whole"), progress=False))
    stopped = train(recipe(*save, f"output_dir={tmp_path}/stopped"), progress=False)
    for name in ("model", "checkpoint-4", "checkpoint-3"):
        (stopped.parent / name / "model.safetensors").unlink()
    after = weights(train(recipe(*save, f"output_dir={tmp_path}/stopped"), progress=False))
    assert all(torch.equal(after[name], value) for name, value in expected.items())


def test_it_works_with_cached_features_groups_and_a_loaders_workers(recipe):  # noqa: F811
    one = ["stage=finetune", "pretrain=null", "finetune.elastic=[2, 9]", "cache_features=true", "finetune.group=2"]
    plain = weights(train(recipe(*one), progress=False))
    workers = ["finetune.training.dataloader_num_workers=2", "resume=false"]
    again = weights(train(recipe(*one, *workers), progress=False))
    assert all(torch.equal(again[name], value) for name, value in plain.items())


def test_with_gated_cross_attention_the_prompt_stays_as_it_is(recipe):  # noqa: F811
    gated = ["model.fusion=gated_cross_attention", "finetune.learning_rates.fusion=0.01"]
    folder = train(recipe("stage=finetune", "pretrain=null", "finetune.elastic=[2, 9]", *gated), progress=False)
    assert load_model(str(folder))[1].num_placeholders == 1


# What is wrong


@pytest.mark.parametrize("elastic", ["[5]", "[1, 2, 3]", "[0, 4]", "[9, 4]", "[2.5, 4]", "[true, 4]", "[a, b]", "[]"])
def test_ranges_that_are_none(recipe, elastic):  # noqa: F811
    with pytest.raises(UsageError, match=r"finetune\.elastic must be \[low, high\]"):
        recipe(f"finetune.elastic={elastic}")
    with pytest.raises(UsageError, match=r"finetune\.elastic must be list or nothing"):
        recipe("finetune.elastic=5")


def test_connectors_and_ranges_that_do_not_fit_stop_the_run(recipe):  # noqa: F811
    one = ["stage=finetune", "pretrain=null"]
    with pytest.raises(UsageError, match=r"elastic range 2\.\.40: 40 tokens do not fit"):
        train(recipe(*one, "finetune.elastic=[2, 40]"), progress=False)
    with pytest.raises(UsageError, match="MLPConnector always gives 16 tokens"):
        train(recipe(*one, "finetune.elastic=[2, 9]", "model.connector=mlp"), progress=False)
