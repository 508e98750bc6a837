"""`acformer plan`: what it counts from a recipe and its configs, and what it says where something does not fit."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from acformer import cli
from acformer.errors import CheckpointError, UsageError
from acformer.lab.bench.presets import load_preset
from acformer.training.lora import add_adapters, lora_targets
from acformer.training.plan import GIB, RESERVE, Hardware, Texts, plan
from acformer.training.recipe import StageSpec, list_recipes, load_recipe
from acformer.training.sharding import SHARDINGS, Weights, named_sharding, standing
from acformer.training.skeleton import empty_model, geometries, model_config
from acformer.training.text_sizes import KNOWN, text_sizes
from acformer.training.trace import Precision
from acformer.vision.families import ENCODERS

MIXED = Precision(torch.float32, torch.bfloat16, torch.bfloat16)


@pytest.fixture
def parts(tmp_path) -> list[str]:
    """Overrides of `tiny` that name two folders with a config.json each."""
    config = tiny.config()
    config.vision_config.save_pretrained(tmp_path / "vision")
    config.text_config.save_pretrained(tmp_path / "text")
    return [
        f"model.vision={tmp_path}/vision",
        f"model.text={tmp_path}/text",
        "model.image_size=16",
        "model.connector=acformer",
        "model.connector_kwargs={num_anchors: 4, depth: 1}",
        "cache_features=false",
    ]


def small(parts, *overrides: str):
    return load_recipe("tiny", [*parts, "stage=finetune", "finetune.group=1", *overrides])


@pytest.mark.slow
def test_parameters_are_those_of_the_model(parts):
    recipe = load_recipe("tiny", parts)
    config = model_config(recipe)
    real = tiny.AcFormerForConditionalGeneration(config)
    made = plan(recipe, Hardware(), Texts(mean=8, longest=8))
    assert sum(made.parameters.values()) == sum(p.numel() for p in real.parameters())
    assert config.text_config.vocab_size % 64 == 0
    assert config.text_config.vocab_size > tiny.config().text_config.vocab_size
    for stage in made.stages:
        counts = {**stage.trained, **stage.frozen}
        assert counts == made.parameters
    assert set(made.stages[0].frozen) == {"vision_tower"}


def test_a_head_that_shares_the_embedding_counts_once(parts):
    config = model_config(load_recipe("tiny", parts))
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    real = tiny.AcFormerForConditionalGeneration(config)
    assert empty_model(config).num_parameters() == real.num_parameters()
    assert real.lm_head.weight is real.model.language_model.embed_tokens.weight


@pytest.mark.slow
def test_bytes_of_one_gpu(parts):
    (stage,) = plan(small(parts, "finetune.learning_rates={connector: 1.0e-3}"), Hardware()).stages
    trained, frozen = sum(stage.trained.values()), sum(stage.frozen.values())
    assert stage.weights == 4 * (trained + frozen)
    assert stage.gradients == 4 * trained
    assert stage.optimizer == 8 * trained
    assert stage.working == 0
    assert stage.total == stage.weights + stage.gradients + stage.optimizer + stage.activations
    assert stage.activations > stage.logits > 0


@pytest.mark.slow
def test_frozen_weights_are_in_the_dtype_of_the_arithmetic(parts):
    rates = "finetune.learning_rates={connector: 1.0e-3}"
    (stage,) = plan(small(parts, rates, "finetune.training.bf16=true"), Hardware()).stages
    assert stage.weights == 4 * sum(stage.trained.values()) + 2 * sum(stage.frozen.values())


@pytest.mark.slow
def test_checkpointing_is_read_under_both_names(parts):
    texts = Texts(mean=100, longest=200)
    wide = ["finetune.training.per_device_train_batch_size=4"]
    (without,) = plan(small(parts, *wide), Hardware(), texts).stages
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        (stage,) = plan(small(parts, *wide, f"finetune.training.{name}=true"), Hardware(), texts).stages
        assert stage.activations < without.activations
        assert stage.flops_a_step == without.flops_a_step  # what is computed again is not the model's


@pytest.mark.slow
def test_whether_it_fits(parts):
    recipe = small(parts)
    (stage,) = plan(recipe, Hardware()).stages
    needed = stage.total / GIB + RESERVE
    assert plan(recipe, Hardware(memory=needed + 1e-6)).fits
    tight = plan(recipe, Hardware(memory=needed - 1e-6))
    assert not tight.fits
    assert tight.stages[0].other_shardings == {}  # on one GPU there is no other
    shared = plan(recipe, Hardware(gpus=8, memory=needed - 1e-6)).stages[0]
    assert set(shared.other_shardings) == {"zero2", "zero3", "fsdp"}
    assert shared.other_shardings["fsdp"] < shared.total


def test_steps_tokens_and_hours(parts):
    training = "finetune.training={per_device_train_batch_size: 4, gradient_accumulation_steps: 2, num_train_epochs: 3}"
    recipe = small(parts, training, "finetune.max_samples=1000")
    (stage,) = plan(recipe, Hardware(gpus=2, mfu=0.5, tflops=1.0), Texts(mean=20, longest=40)).stages
    assert stage.samples_a_step == 16
    assert stage.tokens_a_step == 16 * (5 + 20)
    assert stage.longest_row == 45
    assert stage.steps == 3 * 63
    assert stage.hours == pytest.approx(stage.flops_a_step * stage.steps / (0.5 * 1e12 * 2) / 3600)
    one = plan(recipe, Hardware(), Texts(mean=20, longest=40)).stages[0]
    assert 2 * one.flops_a_step == stage.flops_a_step


@pytest.mark.slow
def test_max_length_cuts_the_text(parts):
    (stage,) = plan(small(parts, "finetune.max_length=30"), Hardware(), Texts(mean=20, longest=400)).stages
    assert stage.longest_row == 30


@pytest.mark.slow
def test_packed_rows_are_full(parts):
    recipe = small(parts, "finetune.max_length=100", "finetune.training.per_device_train_batch_size=2")
    (stage,) = plan(recipe, Hardware(), Texts(mean=20, packing=True)).stages
    assert stage.longest_row == 100
    assert stage.tokens_a_step == 200
    assert stage.samples_a_step == 2 * (100 // 25)


@pytest.mark.slow
def test_the_features_of_all_images(parts):
    recipe = small(parts, "cache_features=true", "finetune.max_samples=50", "finetune.group=5")
    (stage,) = plan(recipe, Hardware(), Texts(mean=20)).stages
    assert stage.features_bytes == 10 * (2 * 17 * 32 + 4 * 4 * 16)  # 17 tokens of width 32, 4 heads' scores of 16
    assert stage.encoding_hours > 0
    assert plan(small(parts), Hardware(), Texts(mean=20)).stages[0].features_bytes is None


@pytest.mark.slow
def test_an_elastic_stage_is_planned_at_its_largest(parts):
    (fixed,) = plan(small(parts), Hardware(), Texts(mean=20, longest=20)).stages
    (stage,) = plan(small(parts, "finetune.elastic=[3, 11]"), Hardware(), Texts(mean=20, longest=20)).stages
    assert stage.longest_row == 31
    assert stage.visual_tokens == 7
    assert stage.activations > fixed.activations


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_that_ship_need_no_network(name):
    """Their parts' sizes come with the package; their connectors stand between them."""
    recipe = load_recipe(name)
    for part in (recipe.model.vision, recipe.model.text):
        assert isinstance(part, dict) or part in geometries()
    kind = geometries()[recipe.model.vision]["model_type"]
    if kind not in ENCODERS:
        pytest.skip(f"encoders of type {kind} are not known yet")
    assert empty_model(model_config(recipe)).num_parameters() > 10**6


@pytest.mark.parametrize("preset", ["smol", "llava15-7b"])
def test_the_sizes_are_those_of_the_bench(preset):
    bench = load_preset(preset)
    recipe = load_recipe("smol" if preset == "smol" else "llava15-7b-acformer145")
    config = model_config(recipe)
    ignored = {"architectures", "transformers_version", "vocab_size", "dtype", "_name_or_path"}
    for part in ("vision_config", "text_config"):
        ours, theirs = (getattr(of, part).to_dict() for of in (config, bench.config))
        assert {key for key in ours if ours[key] != theirs[key]} <= ignored
    assert config.text_config.vocab_size == bench.config.text_config.vocab_size


def test_a_config_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = load_recipe("tiny", [f"model.vision={tmp_path}/none"])
    with pytest.raises(CheckpointError, match=r"give model\.vision=FOLDER, a folder with its config\.json"):
        model_config(recipe)


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_model(tmp_path, parts):
    tiny.model().save_pretrained(tmp_path / "model")
    recipe = small(parts, f"from_model={tmp_path}/model")
    (stage,) = plan(recipe, Hardware(), Texts(mean=8)).stages
    assert sum({**stage.trained, **stage.frozen}.values()) == tiny.model().num_parameters()


# sharding

WEIGHTS = st.builds(
    Weights,
    trained=st.integers(0, 10**9),
    frozen=st.integers(0, 10**9),
    frozen_bytes=st.integers(0, 10**10).map(float),
    root=st.integers(0, 10**8),
    block=st.integers(0, 10**8),
    block_learns=st.booleans(),
)


@given(WEIGHTS, st.sampled_from(SHARDINGS), st.integers(1, 64))
def test_more_gpus_never_need_more_of_one(weights, sharding, gpus):
    few, many = (standing(sharding, number, weights, MIXED, 2.0) for number in (gpus, 2 * gpus))
    assert many.weights <= few.weights
    assert many.gradients <= few.gradients
    assert many.optimizer <= few.optimizer
    assert min(vars(many).values()) >= 0


def test_who_shards_what():
    weights = Weights(trained=1000, frozen=500, frozen_bytes=1000.0, root=100, block=200, block_learns=True)
    found = {name: standing(name, 4, weights, MIXED, 2.0) for name in SHARDINGS}
    assert [vars(found["ddp"])[key] for key in ("weights", "gradients", "optimizer", "working")] == [
        5000,
        4000,
        8000,
        4000,
    ]
    assert standing("ddp", 1, weights, MIXED, 2.0).working == 0
    assert found["zero2"].weights == 2 * 1000 + 1000  # all of them, in half precision
    assert found["zero2"].optimizer == 12 * 1000 / 4  # two states and the float32 weights
    assert found["zero3"].weights == found["zero2"].weights / 4
    assert found["fsdp"].weights == (4 * 1000 + 1000) / 4
    assert found["fsdp"].working == 2 * 100 + 2 * 2 * 200 * 2  # root, two blocks and their gradients, in half precision


def test_sharding_as_the_recipe_says(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert named_sharding({}) == "ddp"
    assert named_sharding({"fsdp": "full_shard"}) == "fsdp"
    assert named_sharding({"deepspeed": str(tmp_path / "ds.json")}) == "zero3"
    assert named_sharding({"deepspeed": {"zero_optimization": {"stage": 2}}}) == "zero2"
    with pytest.raises(UsageError, match="ZeRO stages 2 and 3, got 1"):
        named_sharding({"deepspeed": {"zero_optimization": {"stage": 1}}})
    with pytest.raises(UsageError, match=r"cannot read .*none\.json"):
        named_sharding({"deepspeed": str(tmp_path / "none.json")})


# adapters and few bits


@pytest.mark.slow
def test_adapters_and_the_connector_learn(parts):
    recipe = small(parts, "finetune.lora={r: 4}")
    (stage,) = plan(recipe, Hardware()).stages
    model = empty_model(model_config(recipe))
    inside = [module for name, module in model.named_modules() if name in lora_targets(model, "language_model")]
    assert stage.trained["language_model"] == sum(4 * (layer.in_features + layer.out_features) for layer in inside)
    assert stage.trained["connector"] == sum(p.numel() for p in model.model.connector.parameters())
    (whole,) = plan(small(parts), Hardware()).stages
    assert stage.optimizer < whole.optimizer
    assert stage.frozen["language_model"] == whole.trained["language_model"]


def test_adapters_of_some_layers_and_of_none(parts):
    recipe = small(parts)
    model = empty_model(model_config(recipe))
    assert len(lora_targets(model, ["q_proj", "v_proj"])) == 2 * 2
    assert not any("vision" in name for name in lora_targets(model, "language_model"))
    with pytest.raises(UsageError, match=r"under lora.targets 'q_prj'; did you mean 'q_proj'"):
        lora_targets(model, ["q_prj"])


def test_adapters_without_peft(monkeypatch, parts):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    recipe = small(parts, "finetune.lora={}")
    with pytest.raises(UsageError, match=r"pip install 'acformer\[peft\]'"):
        add_adapters(empty_model(model_config(recipe)), recipe.finetune.lora)


@pytest.mark.parametrize(("kind", "nbytes"), [("nf4", 0.5625), ("int8", 1.0)])
@pytest.mark.slow
def test_few_bits(parts, kind, nbytes):
    overrides = ["finetune.lora={r: 4}", "finetune.training.bf16=true"]
    recipe = small(parts, *overrides)
    (plain,) = plan(recipe, Hardware()).stages
    (stage,) = plan(small(parts, *overrides, f"finetune.quantize={kind}"), Hardware()).stages
    model = empty_model(model_config(recipe))
    names = lora_targets(model, "language_model")
    matrices = sum(module.weight.numel() for name, module in model.named_modules() if name in names)
    assert plain.weights - stage.weights == round(matrices * (2 - nbytes))
    assert stage.working == 2 * 64 * 32  # one matrix at a time in the dtype of the arithmetic


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["finetune.lora={rank: 4}"], "unknown recipe key 'finetune.lora.rank'"),
        (["finetune.lora={r: 0}"], "finetune.lora.r must be at least 1"),
        (["finetune.lora={alpha: -1}"], "finetune.lora.alpha must be at least 1"),
        (["finetune.lora={dropout: 1}"], r"finetune.lora.dropout must be in 0\.\.1"),
        (["finetune.lora={targets: []}"], "finetune.lora.targets must be language_model or a list"),
        (["finetune.lora={targets: [1]}"], "finetune.lora.targets must be language_model or a list"),
        (
            ["finetune.lora={}", "finetune.learning_rates={connector: 0.1}"],
            "give finetune.learning_rates.language_model",
        ),
        (["finetune.quantize=nf8"], "unknown finetune.quantize 'nf8'; did you mean 'nf4'"),
        (["finetune.quantize=nf4"], "nf4 weights cannot be trained; add finetune.lora={}"),
    ],
)
def test_adapters_that_cannot_be(overrides, message):
    with pytest.raises(UsageError, match=message):
        load_recipe("tiny", overrides)


def test_a_recipe_with_adapters_and_its_record_say_the_same(tmp_path):
    recipe = load_recipe("tiny", ["finetune.lora={targets: [q_proj]}", "finetune.quantize=int8"])
    (tmp_path / "record.yaml").write_text(recipe.to_yaml())
    assert load_recipe(str(tmp_path / "record.yaml")) == replace(recipe)


# lengths of the texts


def write(path, count: int, answer: str = "red " * 10) -> StageSpec:
    tiny.picture().save(path.parent / "0.png")
    turns = [{"from": "human", "value": "<image>\nwhat color?"}, {"from": "gpt", "value": answer}]
    path.write_text(json.dumps([{"id": n, "image": "0.png", "conversations": turns} for n in range(count)]))
    return StageSpec(data=str(path), learning_rates={"connector": 1.0})


def test_lengths_and_number_from_the_data(tmp_path):
    found = text_sizes(write(tmp_path / "few.json", 20), "vicuna_v1")
    assert (found.samples, found.supervised) == (20, 14)
    assert found.mean == found.longest == 14 + 6  # 11 bytes of question and a turn's frame
    assert "20 samples of" in found.source
    assert text_sizes(write(tmp_path / "few.json", 20), "plain").mean == 14  # `plain` renders no question


def test_more_records_than_are_read_are_counted(tmp_path):
    spec = write(tmp_path / "many.json", 1203)
    assert text_sizes(spec, "vicuna_v1").samples == 1203
    assert text_sizes(replace(spec, max_samples=1100), "vicuna_v1").samples == 1100
    assert text_sizes(replace(spec, max_samples=7), "vicuna_v1").samples == 7


@pytest.mark.parametrize("name", KNOWN)
def test_llavas_files_are_known_by_their_names(name, tmp_path):
    spec = StageSpec(data=str(tmp_path / name), learning_rates={"connector": 1.0})
    assert text_sizes(spec, "plain") == KNOWN[name]
    assert text_sizes(replace(spec, max_samples=100), "plain").samples == 100


def test_what_is_not_known_is_said_to_be_assumed(tmp_path, parts):
    spec = StageSpec(data=str(tmp_path / "none.json"), learning_rates={"connector": 1.0})
    assert text_sizes(spec, "vicuna_v1").samples is None
    assert text_sizes(spec, "plain").source == "assumed: captions"
    recipe = small(parts, f"finetune.data={tmp_path}/none.json", "finetune.max_samples=null", "finetune.training={}")
    (stage,) = plan(recipe, Hardware()).stages
    assert stage.steps is None
    assert stage.hours is None


# the command


def test_the_table(parts, capsys):
    assert cli.main(["plan", "tiny", *parts, "--gpus", "2", "--text", "20", "--longest", "30"]) == 0
    said = capsys.readouterr().out
    for word in ("pretrain", "finetune", "2 GPUs of 80 GiB", "FLOP a step", "fits", "yes", "5 visual + 20 of text"):
        assert word in said


@pytest.mark.slow
def test_what_would_fit_is_said(parts, capsys):
    arguments = ["plan", "tiny", *parts, "stage=finetune", "--text", "20", "--longest", "20", "--memory"]
    assert cli.main([*arguments, "1"]) == 0
    assert "no; take fewer rows with more passes" in capsys.readouterr().out


@pytest.mark.slow
def test_json(parts, capsys):
    assert cli.main(["plan", "tiny", *parts, "stage=finetune", "--text", "20", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] is True
    assert said["stages"][0]["stage"] == "finetune"
    assert said["hardware"]["mfu"] == 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mfu", "2"], "at most 1, got 2.0"),
        (["--memory", "-1"], "memory must be a positive number"),
        (["--sharding", "fdsp"], "unknown sharding 'fdsp'; did you mean 'fsdp'"),
        (["finetune.training.optim=adamw_tourch"], "unknown optimizer to plan for 'adamw_tourch'; did you mean"),
        (["finetune.training.bf61=true"], "unknown training argument 'bf61'; did you mean 'bf16'"),
        (["model.dtype=float8"], "unknown dtype 'float8'"),
    ],
)
def test_what_is_wrong_is_one_line(parts, arguments, message, capsys):
    assert cli.main(["plan", "tiny", *parts, "stage=finetune", "--text", "8", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
