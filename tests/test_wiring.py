"""That what a recipe says arrives: each test fails for one change between recipe, trainer, collator and samplers."""

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_train import changed, data, recipe, weights  # noqa: F401 (fixtures)
from transformers import CLIPVisionModel, TrainingArguments

from acformer.data.collate import ConversationDataset
from acformer.data.datasets import DATASETS, Dataset, load_samples
from acformer.data.lengths import grouped_by_length
from acformer.data.mixture import MixtureSampler
from acformer.data.samples import Sample
from acformer.errors import DataError
from acformer.evaluate.families import Reply, family_scores
from acformer.evaluate.generate import answer, generation_options
from acformer.evaluate.report import as_reply, evaluate, score_replies
from acformer.evaluate.scorers import bootstrap
from acformer.hf.build import build_model, square_image_processor
from acformer.hf.checkpoints import write_manifest
from acformer.lab.paper import RECIPE
from acformer.training.arguments import training_arguments
from acformer.training.elastic import ElasticBudget
from acformer.training.learner import as_it_learns
from acformer.training.lora import LoraSpec, add_adapters
from acformer.training.recipe import load_recipe
from acformer.training.run_folder import samples_a_step
from acformer.training.stages import first_model, recipe_texts, stage_samples, train
from acformer.training.trainer import AcFormerTrainer

ONE = ["stage=finetune", "pretrain=null"]


@pytest.fixture
def batches(monkeypatch):
    """What every batch of a run holds, with the trainer and the model in it, as the loss is computed."""
    loss, seen = AcFormerTrainer.compute_loss, []

    def watched(self, model, inputs, *args, **kwargs):
        seen.append({"trainer": self, "model": model, **inputs})
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AcFormerTrainer, "compute_loss", watched)
    return seen


def log_of(folder) -> list[dict]:
    return json.loads((folder.parent / "log.json").read_text())


# The recipe


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["llava15-7b-acformer145", "llava15-7b-mlp577"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_papers_schedule_is_the_papers(tmp_path, name, stage):
    chosen, paper = load_recipe(name), RECIPE[stage]
    spec = getattr(chosen, stage)
    args = training_arguments(spec, tmp_path, chosen.seed, progress=False)
    assert args.lr_scheduler_type == paper.schedule
    assert args.get_warmup_steps(1000) == 1000 * paper.warmup
    assert args.num_train_epochs == paper.epochs
    assert args.max_steps == -1
    assert args.weight_decay == paper.weight_decay
    assert args.optim.startswith(paper.optimizer.lower())
    assert args.bf16 is (paper.dtype == "bfloat16")
    assert spec.max_length == paper.max_length
    assert (spec.template or chosen.model.template) == paper.template
    assert tuple(spec.learning_rates) == paper.trained


def test_learning_rates_follow_a_cosine_from_each_modules_own(recipe):  # noqa: F811
    folder = train(recipe(*ONE, "finetune.training.max_steps=8"), progress=False)
    rates = [entry["learning_rate"] for entry in log_of(folder) if "learning_rate" in entry]
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])


def test_a_seed_decides_the_new_weights_and_the_order(recipe, tmp_path, batches):  # noqa: F811
    def run(seed: int, folder: str) -> tuple[dict, list]:
        batches.clear()
        still = [f"finetune.learning_rates={{{name}: 1.0e-30}}" for name in ("connector",)]
        made = train(recipe(*ONE, *still, f"seed={seed}", f"output_dir={tmp_path}/{folder}"), progress=False)
        return weights(made), [batch["sample_ids"] for batch in batches]

    (first, order), (again, same_order), (other, other_order) = run(1, "a"), run(1, "b"), run(2, "c")
    assert changed(first, again) == set()
    assert order == same_order
    assert {"connector", "language_model"} <= changed(first, other)
    assert order != other_order


def test_every_default_of_ours_is_in_the_arguments(tmp_path):
    spec = load_recipe("tiny").finetune
    spec.training = {}
    args = training_arguments(spec, tmp_path, 5, progress=False)
    assert (args.lr_scheduler_type, args.optim, args.weight_decay) == ("cosine", "adamw_torch_fused", 0.0)
    assert (args.save_strategy, args.report_to, args.seed, args.disable_tqdm) == ("no", [], 5, True)
    assert (args.remove_unused_columns, args.logging_nan_inf_filter) == (False, False)
    assert args.learning_rate == max(spec.learning_rates.values())
    assert training_arguments(spec, tmp_path, 5, progress=True).disable_tqdm is False
    spec.training = {
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "disable_tqdm": False,
    }
    args = training_arguments(spec, tmp_path, 5, progress=False)
    assert {key: getattr(args, key) for key in spec.training} == spec.training, "a recipe's own go before"


# The trainer


@pytest.mark.parametrize("learns", [False, True])
def test_a_frozen_encoder_is_in_eval_mode_and_all_else_trains(recipe, monkeypatch, learns):  # noqa: F811
    modes, forward = set(), CLIPVisionModel.forward

    def watched(self, *args, **kwargs):
        modes.add(self.training)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CLIPVisionModel, "forward", watched)
    others, loss = set(), AcFormerTrainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        result = loss(self, model, *args, **kwargs)
        others.update((model.model.connector.training, model.model.language_model.training))
        return result

    monkeypatch.setattr(AcFormerTrainer, "compute_loss", compute_loss)
    rates = "finetune.learning_rates={vision_tower: 0.001, connector: 0.01}" if learns else "seed=0"
    train(recipe(*ONE, rates), progress=False)
    assert modes == {learns}
    assert others == {True}


def test_each_module_that_is_named_learns_and_no_other(recipe, tmp_path):  # noqa: F811
    still = "finetune.learning_rates={connector: 1.0e-30}"
    start = weights(train(recipe(*ONE, still, f"output_dir={tmp_path}/start"), progress=False))
    for module in ("vision_tower", "connector", "language_model"):
        rates = f"finetune.learning_rates={{{module}: 0.01}}"
        end = weights(train(recipe(*ONE, rates, f"output_dir={tmp_path}/{module}"), progress=False))
        moved = {name.split(".")[1] for name in end if (end[name] - start[name]).abs().max() > 1e-12}
        assert module in moved
        assert not moved & ({"vision_tower", "connector", "language_model"} - {module})


def test_what_stands_in_bfloat16_in_stage_one_learns_in_float32_in_stage_two(recipe):  # noqa: F811
    found = weights(train(recipe("pretrain.training.bf16=true", "finetune.training.bf16=true"), progress=False))
    learnt = {value.dtype for name, value in found.items() if name.startswith("model.language_model.")}
    assert learnt == {torch.float32}


def test_each_module_learns_at_its_own_rate(recipe, batches):  # noqa: F811
    train(recipe(*ONE), progress=False)
    groups = batches[0]["trainer"].optimizer.param_groups
    assert [group["initial_lr"] for group in groups] == [0.01, 0.002]
    connector = {id(p) for p in batches[0]["trainer"].model.model.connector.parameters()}
    assert {id(p) for p in groups[0]["params"]} == connector


def test_logits_are_made_of_what_is_learnt_alone(recipe, batches, monkeypatch):  # noqa: F811
    rows, forward = [], torch.nn.Linear.forward

    def watched(self, x):
        rows.append(x.shape[:-1]) if self.out_features > 250 else None  # the head
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    train(recipe(*ONE), progress=False)
    assert rows == [(1, int((batch["labels"][:, 1:] != -100).sum())) for batch in batches]


def test_a_group_stands_in_one_batch_and_its_image_is_there_once(recipe, data, batches):  # noqa: F811
    records = json.loads((data / "questions.json").read_text())
    twice = [{**record, "id": f"{record['id']}-{n}"} for n in range(2) for record in records]
    (data / "pairs.json").write_text(json.dumps(twice))
    train(recipe(*ONE, f"finetune.data={data}/pairs.json", "finetune.group=2", "cache_features=true"), progress=False)
    for batch in batches:
        names = [name.split("-")[0] for name in batch["sample_ids"]]
        assert names[::2] == names[1::2]
        assert len(names) == 8
        assert len(batch["vision_features"]["tokens"]) == 4


@pytest.mark.parametrize("seed", ["seed=3", "finetune.training.data_seed=3"])
def test_each_epoch_has_its_own_order_of_like_lengths(recipe, data, batches, seed):  # noqa: F811
    records = json.loads((data / "questions.json").read_text())
    for number, record in enumerate(records):
        record["conversations"][1]["value"] += " indeed" * (5 * number % 12)
    (data / "uneven.json").write_text(json.dumps(records))
    by_length = "finetune.training.train_sampling_strategy=group_by_length"
    steps = ["finetune.training.max_steps=9", f"finetune.data={data}/uneven.json"]
    train(recipe(*ONE, by_length, *steps, seed), progress=False)
    lengths = batches[0]["trainer"].train_dataset.lengths()
    for epoch in range(3):
        order = [int(name) for batch in batches[3 * epoch : 3 * epoch + 3] for name in batch["sample_ids"]]
        assert order == grouped_by_length(lengths, 4, f"3 {epoch}")


def test_a_step_of_several_batches_is_of_like_length(recipe, data, batches):  # noqa: F811
    both = ["train_sampling_strategy=group_by_length", "gradient_accumulation_steps=2", "per_device_train_batch_size=2"]
    train(recipe(*ONE, *[f"finetune.training.{key}" for key in both]), progress=False)
    assert batches[0]["trainer"].get_train_dataloader().batch_sampler.sampler.rows == 4


def test_a_step_of_several_processes_is_of_like_length(recipe, batches, monkeypatch):  # noqa: F811
    train(recipe(*ONE, "finetune.training.train_sampling_strategy=group_by_length"), progress=False)
    trainer = batches[0]["trainer"]
    monkeypatch.setattr(TrainingArguments, "world_size", 3)
    assert trainer._get_train_sampler().rows == 12
    assert samples_a_step({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 3) == 24


def test_a_stream_is_taken_as_it_comes(recipe, batches, monkeypatch):  # noqa: F811
    train(recipe(*ONE), progress=False)
    monkeypatch.setattr(ConversationDataset, "is_stream", True)
    assert [*batches[0]["trainer"]._get_train_sampler()] == [*range(12)]


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_mixture_is_in_the_order_of_seed_and_epoch(recipe, data, batches, strategy):  # noqa: F811
    mixed = f"finetune.data=[{data}/questions.json, {{path: {data}/captions.jsonl, weight: 0.5}}]"
    own = ["seed=3", "finetune.training.max_steps=10", f"finetune.training.train_sampling_strategy={strategy}"]
    train(recipe(*ONE, mixed, *own), progress=False)
    dataset = batches[0]["trainer"].train_dataset
    lengths = dataset.lengths() if strategy == "group_by_length" else None
    order = [
        place for epoch in range(2) for place in MixtureSampler([12, 12], [1.0, 0.5], 3, lambda e=epoch: e, lengths, 4)
    ]
    assert [name for batch in batches for name in batch["sample_ids"]] == [str(place % 12) for place in order]
    assert any(place >= 12 for place in order[:18])


def test_a_range_of_tokens_is_drawn_from_by_the_seed(recipe, batches):  # noqa: F811
    train(recipe(*ONE, "finetune.elastic=[2, 17]", "seed=3", "finetune.training.max_steps=6"), progress=False)
    budget = ElasticBudget(tuple(range(2, 18)), 3, None)
    assert [batch["num_visual_tokens"] for batch in batches] == [budget.sample(step) for step in range(6)]


@pytest.mark.slow
def test_what_is_drawn_while_training_goes_on_after_a_resume(recipe, tmp_path):  # noqa: F811
    drawn = ["model.connector_kwargs.stochastic_anchors=true", "finetune.training.save_strategy=steps"]
    drawn += ["finetune.training.save_steps=1", "finetune.training.max_steps=4"]
    whole = weights(train(recipe(*ONE, *drawn, f"output_dir={tmp_path}/whole"), progress=False))
    stopped = train(recipe(*ONE, *drawn, f"output_dir={tmp_path}/stopped"), progress=False)
    for name in ("model", "checkpoint-4", "checkpoint-3"):
        (stopped.parent / name / "model.safetensors").unlink()
    assert (
        changed(whole, weights(train(recipe(*ONE, *drawn, f"output_dir={tmp_path}/stopped"), progress=False))) == set()
    )


@pytest.mark.slow
def test_weights_of_a_checkpoint_without_a_tokenizer_are_gone_on_from(recipe, tmp_path):  # noqa: F811
    saved = [*ONE, "finetune.training.save_strategy=steps", "finetune.training.save_steps=1"]
    folder = train(recipe(*saved), progress=False)
    whole = weights(folder)
    shutil.rmtree(folder)
    shutil.rmtree(folder.parent / "checkpoint-3")
    (folder.parent / "checkpoint-2/tokenizer_config.json").unlink()
    write_manifest(folder.parent / "checkpoint-2")
    assert changed(whole, weights(train(recipe(*saved), progress=False))) == set()


def test_adapters_are_what_the_stage_says():
    pytest.importorskip("peft")
    model = tiny.model()
    add_adapters(model, LoraSpec(r=4, alpha=24, dropout=0.3, targets=["q_proj"]))
    options = model.peft_config["default"]
    assert (options.r, options.lora_alpha, options.lora_dropout) == (4, 24, 0.3)
    adapted = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    assert len(adapted) == 2, "one in each layer of the language model"
    assert all(name.startswith("model.language_model.") and ".q_proj." in name for name in adapted)


def test_adapters_start_by_the_seed_alone(recipe, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    spec = recipe(*ONE, "finetune.lora={r: 4}").finetune

    def adapters(seed: int, drawn_before: int) -> dict:
        model = tiny.model()
        torch.rand(drawn_before)
        as_it_learns(model, spec, training_arguments(spec, tmp_path, seed, progress=False), None)
        return {name: value for name, value in model.state_dict().items() if "lora_A" in name}

    first, again, other = adapters(1, 0), adapters(1, 7), adapters(2, 0)
    assert first
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not any(torch.equal(value, other[name]) for name, value in first.items())


def test_the_loss_of_accumulated_batches_is_that_of_one(recipe, tmp_path):  # noqa: F811
    def losses(folder: str, *settings: str) -> list[float]:
        overrides = [f"finetune.training.{key}" for key in (*settings, "train_sampling_strategy=sequential")]
        made = train(recipe(*ONE, *overrides, f"output_dir={tmp_path}/{folder}"), progress=False)
        return [entry["loss"] for entry in log_of(made) if "loss" in entry]

    accumulated = losses("two", "per_device_train_batch_size=1", "gradient_accumulation_steps=4")
    assert accumulated == pytest.approx(losses("one"), rel=1e-4)


@pytest.mark.parametrize(("key", "length"), [("max_samples", 5), ("template", 12)])
def test_what_a_stage_says_of_its_data_arrives(recipe, batches, key, length):  # noqa: F811
    value = {"max_samples": "5", "template": "bare"}[key]
    train(recipe(*ONE, f"finetune.{key}={value}", "model.template=vicuna_v1"), progress=False)
    dataset = batches[0]["trainer"].train_dataset
    assert len(dataset) == length
    text = dataset.processor.tokenizer.decode(batches[0]["input_ids"][0])
    assert ("ASSISTANT" in text) is (key == "max_samples")


def test_images_are_looked_for_where_the_stage_says(recipe, data, tmp_path, batches):  # noqa: F811
    shutil.copy(data / "questions.json", tmp_path / "elsewhere.json")
    own = [f"finetune.data={tmp_path}/elsewhere.json", f"finetune.image_root={data}"]
    train(recipe(*ONE, *own), progress=False)
    assert len(batches[0]["trainer"].train_dataset) == 12


def test_a_batch_of_damaged_images_alone_does_not_end_the_run(recipe, data, tmp_path, batches):  # noqa: F811
    shutil.copytree(data, own := tmp_path / "own")
    (own / "3.png").write_bytes(b"no image")
    one = ["finetune.training.per_device_train_batch_size=1", "finetune.training.max_steps=12"]
    train(recipe(*ONE, *one, f"finetune.data={own}/questions.json", "finetune.max_bad_fraction=0.2"), progress=False)
    names = [name for batch in batches for name in batch["sample_ids"]]
    assert sorted(names, key=int) == sorted(["0", *(str(number) for number in range(12) if number != 3)], key=int)


def test_a_new_tokenizer_learns_from_all_that_all_stages_say(recipe):  # noqa: F811
    texts = set(recipe_texts(recipe("finetune.max_samples=1", "stage=finetune")))
    assert {"Which colour?", "red", "green", "blue", "all red", "all blue"} <= {text.strip() for text in texts}


def test_a_tokenizer_is_that_of_a_checkpoint_without_whole_weights(recipe, tmp_path):  # noqa: F811
    chosen = recipe(*ONE)
    processor = tiny.processor()
    processor.save_pretrained(tmp_path / "checkpoint")
    _, found = first_model(chosen, "finetune", tmp_path / "checkpoint")
    assert found.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert found.tokenizer.get_vocab() != first_model(chosen, "finetune", None)[1].tokenizer.get_vocab()


def test_the_order_of_a_stream_is_that_of_the_seed(recipe, tmp_path, monkeypatch):  # noqa: F811
    seen = {}

    def stream(entries, **options):
        seen.update(options)
        raise DataError("seen")

    monkeypatch.setattr("acformer.data.datasets.Stream", stream)
    spec = recipe(*ONE, "finetune.data={path: a/b, streaming: true}").finetune
    with pytest.raises(DataError, match="seen"):
        stage_samples(spec, tmp_path, seed=7)
    assert seen == {"num_rows": 12, "seed": 7}


@pytest.mark.parametrize("connector", tiny.mostly_slow(["token_packer", "downsample"], "token_packer"))
def test_cached_features_are_what_the_connector_reads(recipe, tmp_path, connector):  # noqa: F811
    own = {"token_packer": "{hidden_layers: [1], scale: 2, num_heads: 2}", "downsample": "{num_tokens: 4}"}[connector]
    chosen = [f"model.connector={connector}", f"model.connector_kwargs={own}"]
    train(recipe(*ONE, "cache_features=true", f"output_dir={tmp_path}/another"), progress=False)  # fills the cache

    def losses(cache: str) -> list[float]:
        made = train(recipe(*ONE, *chosen, f"cache_features={cache}", f"output_dir={tmp_path}/{cache}"), progress=False)
        return [entry["loss"] for entry in log_of(made) if "loss" in entry]

    assert losses("true") == pytest.approx(losses("false"), rel=2e-2)


def test_a_sample_that_is_too_long_for_the_stage_is_left_out(recipe):  # noqa: F811
    with pytest.raises(DataError, match="max_length 8 cuts off"):
        train(recipe(*ONE, "finetune.max_length=8"), progress=False)


def test_the_model_learns_the_answers_and_nothing_else(recipe, batches):  # noqa: F811
    train(recipe(*ONE), progress=False)
    tokenizer = batches[0]["trainer"].train_dataset.processor.tokenizer
    for batch in batches:
        for labels in batch["labels"]:
            said = tokenizer.decode(labels[labels != -100])
            assert said.removesuffix("</s>").strip() in ("red", "green", "blue")
            assert said.endswith("</s>")


# The images


@pytest.mark.parametrize("size", [(40, 10), (10, 40)])
def test_nothing_of_an_image_that_is_not_square_is_cut_off(tmp_path, size):
    CLIPVisionModel(tiny.config().vision_config).save_pretrained(tmp_path)
    tiny.processor().image_processor.save_pretrained(tmp_path)
    processor = square_image_processor(str(tmp_path), 16)
    wide = size[0] > size[1]
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 0, 255), (size[0] // 2, 0, *size) if wide else (0, size[1] // 2, *size))
    (pixels,) = processor([image], return_tensors="pt")["pixel_values"]  # (3, 16, 16)
    middle = pixels[:, 8] if wide else pixels[:, :, 8]  # along the image
    assert middle[0, 0] > middle[2, 0], "red at one end"
    assert middle[0, -1] < middle[2, -1], "blue at the other"
    margin = pixels[:, 0] if wide else pixels[:, :, 0]
    assert torch.allclose(margin, torch.zeros(()), atol=0.05), "the mean colour beside it"


# The model


def test_what_is_said_of_parts_reaches_the_model(data, tmp_path):  # noqa: F811
    shutil.copytree(data / "vision", tmp_path / "vision")
    own = json.loads((tmp_path / "vision/preprocessor_config.json").read_text())
    own.update(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    (tmp_path / "vision/preprocessor_config.json").write_text(json.dumps(own))
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    given = {
        "connector_kwargs": {"num_anchors": 3, "depth": 1, "num_heads": 2, "head_dim": 8},
        "fusion": "gated_cross_attention",
        "fusion_kwargs": {"every": 2, "num_heads": 2, "head_dim": 8},
        "feature_layer": -1,
        "image_size": 24,
    }
    model, processor = build_model(
        str(tmp_path / "vision"), text, **given, dtype="bfloat16", template="bare", texts=["a"]
    )
    assert {key: getattr(model.config, key) for key in given} == given
    assert model.dtype == torch.bfloat16
    assert len(model.model.vision_tower.encoder.layers) == 2
    assert len(model.model.fusion.blocks) == 1
    images = processor.image_processor
    assert [*images.image_mean, *images.image_std] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert images.crop_size["height"] == 24
    assert (processor.num_placeholders, processor.fusion) == (1, "gated_cross_attention")
    assert "A:" in processor.chat_template


def test_scores_keep_their_dtype_in_a_model_of_half_precision():
    model = tiny.model().to(torch.bfloat16).model
    given = {"tokens": torch.zeros(1, 17, 32), "cls_attention": torch.rand(1, 4, 16)}
    features = model.as_features(given)
    assert features.tokens.dtype == torch.bfloat16
    assert torch.equal(features.cls_attention, given["cls_attention"])


# The evaluation


class Redder(Dataset):
    """All that is known beforehand is red; what is asked is blue."""

    def samples(self, part, *, limit, skipped):
        return [self.sample(str(n), "blue") for n in range(4)]

    def known_samples(self) -> Iterable[Sample]:
        return [self.sample(f"known-{n}", "red") for n in range(4)]

    def sample(self, name: str, answer: str) -> Sample:
        said = ({"role": "user", "content": "What colour?"}, {"role": "assistant", "content": answer})
        return Sample(name, said, answer=answer, file="x", record=1)


def test_blind_answers_are_not_learnt_from_the_tests_answers(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "redder", Redder())
    scores = evaluate((tiny.model(), tiny.processor()), "redder:test", tmp_path, max_new_tokens=2, progress=False)
    assert scores["blind_accuracy"] == 0
    assert scores["num_questions"] == 4


@pytest.fixture
def asked(tmp_path):
    """Four questions about two images, which lie in another folder than the file."""
    (tmp_path / "images").mkdir()
    records = []
    for number in range(4):
        tiny.picture(number // 2).save(tmp_path / f"images/{number // 2}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "yes"}]
        records.append(
            {"id": str(number), "image": f"{number // 2}.png", "conversations": turns, "kind": "exist-random"}
        )
    (tmp_path / "asked.json").write_text(json.dumps(records))
    return tmp_path / "asked.json"


@pytest.fixture
def answered(monkeypatch):
    """What `answer` was called with; every answer is yes."""
    calls = []

    def answer_yes(model, processor, samples, **options):
        calls.append({"samples": samples, **options})
        yield from ["yes"] * len(samples)

    monkeypatch.setattr("acformer.evaluate.report.answer", answer_yes)
    return calls


def test_what_is_asked_of_an_evaluation_reaches_the_answers(asked, answered, tmp_path):
    options = {"features": lambda path: {}, "num_visual_tokens": 3, "batch_size": 2, "max_new_tokens": 5}
    parts = tiny.model(), tiny.processor()
    scores = evaluate(parts, str(asked), tmp_path, image_root=tmp_path / "images", limit=3, progress=False, **options)
    (call,) = answered
    assert [sample.id for sample in call.pop("samples")] == ["0", "1", "2"]
    assert call == {**options, "progress": False}
    assert (scores["num_questions"], scores["num_images"], scores["num_image_tokens"]) == (3, 2, 3)
    assert scores["accuracy_by_kind"] == {"exist-random": 1.0}


def test_all_are_answered_from_the_features_that_are_known(asked, tmp_path):
    (model, processor), read = (tiny.model(), tiny.processor()), []

    @torch.no_grad()
    def features(path):
        read.append(path.name)
        pixels = processor.image_processor([Image.open(path)], return_tensors="pt")["pixel_values"]
        return {name: value[0] for name, value in model.get_vision_features(pixels).arrays.items()}

    samples = load_samples(str(asked), image_root=tmp_path / "images", limit=3)
    known = answer(model, processor, samples, features=features, batch_size=2, max_new_tokens=1, progress=False)
    assert len(list(known)) == 3
    assert set(read) == {"0.png", "1.png"}


def test_an_answer_ends_where_the_template_says(monkeypatch):
    monkeypatch.setattr("acformer.evaluate.generate.end_tokens", lambda processor: [7, 9])
    options = generation_options(tiny.processor(), 5)
    assert (options["eos_token_id"], options["max_new_tokens"], options["do_sample"]) == ([7, 9], 5, False)


def test_answers_of_another_model_or_to_other_questions_are_not_gone_on_from(asked, tmp_path, monkeypatch):
    found = []

    def resumed(path, settings, answers):
        found.append(settings)
        yield from ["yes"] * 4

    monkeypatch.setattr("acformer.evaluate.report.resumed", resumed)
    model, processor = tiny.model(), tiny.processor()

    def settings(**options) -> None:
        evaluate((model, processor), str(asked), tmp_path, image_root=tmp_path / "images", progress=False, **options)

    settings()
    settings(num_visual_tokens=3)
    settings(max_new_tokens=3)
    with torch.no_grad():
        next(model.model.connector.parameters()).add_(1)
    settings()
    processor.chat_template += "{# another #}"
    settings()
    asked.write_text(asked.read_text().replace("what?", "which?"))
    settings()
    assert all(one != other for number, one in enumerate(found) for other in found[:number])


def test_questions_about_one_image_stand_or_fall_together():
    replies = [Reply(str(n), f"{n // 5}.png", None, "?", "yes", "yes" if n < 10 else "no") for n in range(20)]
    apart = [Reply(reply.id, reply.id, *list(vars(reply).values())[2:6]) for reply in replies]
    together, alone = (score_replies("x.json", given)["interval"] for given in (replies, apart))
    assert together[1] - together[0] > 1.5 * (alone[1] - alone[0])
    said = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"})
    first, second = (as_reply(Sample(name, said, ("a.png",), answer="yes")) for name in "ab")
    assert first.image == second.image


def test_a_familys_interval_draws_its_images():
    right = [Reply(str(n), "b.png" if n == 3 else "a.png", "relate-side", "?", "left", "left") for n in range(4)]
    replies = [replace(reply, prediction="right") if reply.image == "b.png" else reply for reply in right]
    found = family_scores(replies, right)["families"]["relate"]
    assert found["interval"] == list(bootstrap(np.array([[3.0, 3], [0, 1]]), lambda sums: sums[..., 0] / sums[..., 1]))
    assert (found["score"], found["blind"]) == (0.75, 1)


# The commands


def test_what_the_command_says_reaches_the_evaluation(asked, tmp_path, monkeypatch):
    from acformer.cli import main

    seen = {}

    def evaluated(parts, data, out, **options):  # noqa: F811
        seen.update(options, data=data, out=out)
        return {"data": data, "accuracy": 1.0, "num_questions": 1}

    monkeypatch.setattr("acformer.evaluate.report.evaluate", evaluated)
    monkeypatch.setattr("acformer.commands.evaluate.load", lambda arguments: None)
    given = [
        "--limit",
        "3",
        "--tokens",
        "9",
        "--batch-size",
        "2",
        "--max-new-tokens",
        "5",
        "--root",
        "images",
        "--out",
        "o",
    ]
    assert main(["eval", "a/model", "--data", "a.json", "--quiet", *given]) == 0
    assert {key: str(value) for key, value in seen.items()} == {
        "data": "a.json",
        "out": "o",
        "image_root": "images",
        "limit": "3",
        "num_visual_tokens": "9",
        "batch_size": "2",
        "max_new_tokens": "5",
        "progress": "False",
    }


def test_what_the_command_says_reaches_the_run(tmp_path, monkeypatch):
    from acformer.cli import main

    seen = []
    monkeypatch.setattr("acformer.training.stages.train", lambda recipe, *, progress: seen.append((recipe, progress)))
    assert main(["train", "tiny", "seed=7", f"output_dir={tmp_path}", "--quiet"]) == 0
    ((recipe, progress),) = seen  # noqa: F811
    assert (recipe.seed, recipe.output, progress) == (7, tmp_path, False)


# The data set


def test_an_item_is_encoded_by_the_stages_processor():
    processor = tiny.processor(num_placeholders=9)
    content = [{"type": "image"}, {"type": "text", "text": "hi"}]
    said = ({"role": "user", "content": content}, {"role": "assistant", "content": "red"})
    ((item,),) = [ConversationDataset([Sample("1", said, ("a.png",))], processor)[0]]
    assert item["input_ids"].count(processor.image_token_id) == 9
