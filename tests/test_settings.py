"""Every field of `TrainingArguments` is known, and what would train, order or resume wrongly is refused beforehand."""

import json
from dataclasses import fields

import pytest
import tiny
import torch
from test_train import data, recipe, weights  # noqa: F401 (fixtures)
from transformers import TrainingArguments

from acformer.errors import UsageError
from acformer.training.arguments import check_arguments, training_arguments
from acformer.training.recipe import RESERVED, StageSpec
from acformer.training.settings import ALLOWED, REFUSED, REFUSED_VALUES
from acformer.training.stages import train
from acformer.training.trainer import AcFormerTrainer

TABLES = {"allowed": ALLOWED, "refused": REFUSED.keys(), "set by the recipe": RESERVED.keys()}


@pytest.mark.parametrize("field", [field.name for field in fields(TrainingArguments)])
def test_every_field_is_in_one_table(field):
    """A field that a later transformers brings fails here: find out what it does to loss, order and resume."""
    assert len([name for name, table in TABLES.items() if field in table]) == 1


def test_values_are_refused_of_allowed_fields_alone():
    assert REFUSED_VALUES.keys() <= ALLOWED


def stage(**training) -> StageSpec:
    return StageSpec("data.json", {"connector": 0.1}, training)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor 0.1: the Trainer shifts labels for models"),
        ({"label_names": ["labels"]}, "nothing is evaluated"),
        ({"eval_strategy": "steps"}, "nothing is evaluated"),
        ({"load_best_model_at_end": True}, "nothing is evaluated"),
        ({"bf16_full_eval": True}, "nothing is evaluated"),
        ({"do_eval": True}, "nothing is evaluated"),
        ({"save_strategy": "best"}, "nothing is evaluated"),
        ({"save_only_model": True}, "could not go on from its checkpoints as if"),
        ({"ignore_data_skip": True}, "could not go on"),
        ({"restore_callback_states_from_checkpoint": True}, "could not go on"),
        ({"dataloader_in_order": False}, "dataloader_in_order False: the run could not go on"),
        ({"lr_scheduler_type": "greedy"}, "a loss that nobody measures"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "a loss that nobody measures"),
        ({"train_sampling_strategy": "batch_rebalance"}, "take group_by_length"),
        ({"auto_find_batch_size": True}, "from weights that have moved"),
        ({"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}, "groups of its own"),
        ({"optim": "apollo_adamw"}, "groups of its own"),
        ({"optim_target_modules": "all-linear"}, "grouped by learning_rates"),
        ({"optim": "lomo"}, "before anyone has seen that they are finite"),
        ({"optim": "schedule_free_adamw"}, "not those to be saved"),
        ({"optim_args": "rank=3"}, "optim_args is not read by this optim"),
        ({"length_column_name": "words"}, "lengths are estimated"),
        ({"use_cache": True}, "keys and values are of no use"),
        ({"use_liger_kernel": True}, "there are no Liger kernels"),
        ({"liger_kernel_config": {"rope": True}}, "there are no Liger kernels"),
        ({"enable_jit_checkpoint": True}, "would have no manifest"),
        ({"save_on_each_node": True}, "one process writes"),
        ({"local_rank": 1}, "torchrun and accelerate"),
        ({"debug": "underflow_overflow"}, "its hooks cannot read masks"),
        ({"parallelism_config": {"sp_size": 2}}, "a sequence is not split"),
        ({"push_to_hub": True}, "push_to_hub True: nothing is uploaded while a run goes on"),
        ({"hub_model_id": "me/mine"}, "nothing is uploaded"),
        ({"hub_strategy": "all_checkpoints"}, "nothing is uploaded"),
        ({"hub_private_repo": True}, "nothing is uploaded"),
        ({"accelerator_config": {"split_batches": True}}, "of its keys only non_blocking"),
        ({"accelerator_config": {"dispatch_batches": True}}, "of its keys only non_blocking"),
        ({"accelerator_config": {"even_batches": False}}, "of its keys only non_blocking"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "of its keys only non_blocking"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}}, "of its keys only non_blocking"),
        ({"fp16": True}, "fp16 does nothing on a CPU"),
        ({"num_train_epochs": 0}, "num_train_epochs must be more than 0"),
        ({"num_train_epochs": -1}, "num_train_epochs must be more than 0"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs must be more than 0"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs must be a number, got nan"),
        ({"adam_epsilon": float("nan")}, "adam_epsilon must be a number, got nan"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"max_steps": -7}, "max_steps must be at least 1"),
        ({"save_strategy": "steps", "save_steps": 0}, "save_steps must be more than 0"),
        ({"optim": "sgd", "optim_args": "momentum"}, "training arguments do not fit"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_wrong_is_refused(training, message):
    with pytest.raises(UsageError, match=message):
        check_arguments(stage(**training), 0)


def test_a_field_that_is_in_no_table_is_refused(monkeypatch):
    monkeypatch.setattr("acformer.training.settings.ALLOWED", ALLOWED - {"tf32"})
    with pytest.raises(UsageError, match=r"training\.tf32 is newer than this version of acformer"):
        check_arguments(stage(tf32=False), 0)


def test_what_has_its_default_is_not_refused(tmp_path):
    training = {"eval_strategy": "no", "push_to_hub": False, "do_eval": False, "hub_token": None, "num_train_epochs": 2}
    assert training_arguments(stage(**training), tmp_path, 0, progress=False).num_train_epochs == 2
    check_arguments(stage(max_steps=3, num_train_epochs=0), 0)
    check_arguments(stage(accelerator_config={"non_blocking": True}), 0)


def test_a_token_is_never_shown_nor_written(recipe, tmp_path, caplog):  # noqa: F811
    secret = "hf_" + "x" * 34
    with pytest.raises(UsageError) as caught:
        train(recipe(f"finetune.training.hub_token={secret}"), progress=False)
    assert str(caught.value) == (
        "finetune: training.hub_token: nothing is uploaded while a run goes on, and no token is kept; upload the "
        "finished model's folder"
    )
    assert secret not in caplog.text
    assert not (tmp_path / "run").exists()


def test_no_pickle_of_the_arguments_is_left(recipe, tmp_path):  # noqa: F811
    save = ["finetune.training.save_strategy=steps", "finetune.training.save_steps=2"]
    train(recipe("stage=finetune", "pretrain=null", *save), progress=False)
    assert (tmp_path / "run/finetune/checkpoint-2/optimizer.pt").exists()
    assert not list((tmp_path / "run").rglob("training_args.bin"))


@pytest.mark.parametrize("wrong", [{"label_smoothing_factor": 0.1}, {"ignore_data_skip": True}, {"max_steps": 0}])
def test_the_trainer_itself_refuses_them_too(tmp_path, wrong):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **wrong)
    with pytest.raises(UsageError, match=next(iter(wrong))):
        AcFormerTrainer(model=tiny.model(), args=args, learning_rates={"connector": 0.1})


def test_drop_last_with_fewer_samples_than_a_batch(recipe, tmp_path):  # noqa: F811
    drop = ["finetune.training.dataloader_drop_last=true", "finetune.training.per_device_train_batch_size=13"]
    message = "finetune: training.dataloader_drop_last would drop all there is: 12 samples do not fill a batch of 13"
    with pytest.raises(UsageError, match=message):
        train(recipe(*drop), progress=False)
    assert not (tmp_path / "run").exists(), "told before stage 1 trains"
    with pytest.raises(UsageError, match="2 samples do not fill a batch of 4"):
        train(recipe(drop[0], "finetune.max_samples=2"), progress=False)


def losses(folder) -> list[float]:
    log = json.loads((folder.parent / "log.json").read_text())
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's compiler
@pytest.mark.parametrize(
    "training",
    [
        {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "spawn"},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": "true", "dataloader_prefetch_factor": 3},
        {"activation_checkpointing": "true"},
        {"torch_compile": "true", "torch_compile_backend": "eager"},
        {"full_determinism": "true"},
        {"torch_empty_cache_steps": 1},
        {"include_num_input_tokens_seen": "all"},
    ],
    ids=lambda value: next(iter(value)),
)
@pytest.mark.slow
def test_what_is_allowed_and_must_not_change_the_loss(recipe, training):  # noqa: F811
    one = ["stage=finetune", "pretrain=null", "resume=false"]
    expected = losses(train(recipe(*one), progress=False))
    settings = [f"finetune.training.{key}={value}" for key, value in training.items()]
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        assert losses(train(recipe(*one, *settings), progress=False)) == pytest.approx(expected, rel=1e-5)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def test_tokens_seen_are_those_of_the_elastic_budget(recipe, monkeypatch):  # noqa: F811
    from acformer.hf import AcFormerForConditionalGeneration

    forward, read = AcFormerForConditionalGeneration.forward, []

    def watched(self, *args, **kwargs):
        read.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(AcFormerForConditionalGeneration, "forward", watched)
    one = ["stage=finetune", "pretrain=null", "finetune.elastic=[2, 17]"]
    folder = train(recipe(*one, "finetune.training.include_num_input_tokens_seen=all"), progress=False)
    log = json.loads((folder.parent / "log.json").read_text())
    assert log[-2]["num_input_tokens_seen"] == sum(read)
