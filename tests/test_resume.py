"""A run goes on as what it was, or says in one line why not; what is not worth saving is not saved."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from test_train import data, recipe, weights  # noqa: F401 (fixtures)

from acformer.data.samples import Sample
from acformer.errors import CheckpointError, DataError, DivergedError, UsageError
from acformer.hf.checkpoints import load_model, verify_folder, write_manifest
from acformer.training.run_folder import TRAINED_ON, trained_on
from acformer.training.stages import train

ONE = ["stage=finetune", "pretrain=null"]
SAVE = ["finetune.training.save_strategy=steps", "finetune.training.save_steps=2", "finetune.training.max_steps=4"]


@pytest.fixture
def own_data(data, tmp_path) -> Path:  # noqa: F811
    """Questions that a test may change."""
    records = json.loads((data / "questions.json").read_text())
    for record in records:
        record["image"] = str(data / record["image"])
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def stopped(recipe, data, own_data, tmp_path):  # noqa: F811
    """A function: a run that has been stopped after step 2 of 4, with further overrides; how it is called again."""

    def make(*overrides: str) -> tuple[list[str], Path]:
        again = [*ONE, *SAVE, f"finetune.data={own_data}", f"finetune.image_root={data}", *overrides]
        folder = train(recipe(*again), progress=False)
        for name in ("model", "checkpoint-4"):
            (folder.parent / name / "model.safetensors").unlink()
        return again, folder.parent / "checkpoint-2"

    return make


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What is trained on


def test_data_that_was_changed_in_place_is_noticed(stopped, recipe, own_data):  # noqa: F811
    again, checkpoint = stopped()
    moved = own_data.rename(own_data.with_name("moved.json"))  # the same file elsewhere is the same data
    own_data.write_bytes(moved.read_bytes())
    train(recipe(*again), progress=False)
    (checkpoint.parent / "model/model.safetensors").unlink()
    (checkpoint.parent / "checkpoint-4/model.safetensors").unlink()
    records = json.loads(own_data.read_text())
    records[7]["conversations"][1]["value"] = "purple"
    own_data.write_text(json.dumps(records))
    before = sorted(checkpoint.parent.iterdir())
    with pytest.raises(UsageError, match=r"checkpoint-2 was trained on other data than .*json is now \(12 sam"):
        train(recipe(*again), progress=False)
    assert sorted(checkpoint.parent.iterdir()) == before
    train(recipe(*again, "resume=false"), progress=False)


@pytest.mark.parametrize("change", ["fewer", "order", "image"])
def test_what_counts_as_other_data(change):
    def sample(number: int, image: str) -> Sample:
        return Sample(str(number), ({"role": "user", "content": "hi"},), (Path(image),), record=number)

    before = [sample(1, "/data/a/1.png"), sample(2, "/data/b/2.png")]
    moved = [sample(1, "/elsewhere/a/1.png"), sample(2, "/elsewhere/b/2.png")]
    after = {
        "fewer": before[:1],
        "order": before[::-1],
        "image": [sample(1, "/data/a/1.png"), sample(2, "/data/b/3.png")],
    }[change]
    assert trained_on(moved, 1) == trained_on(before, 1)
    assert trained_on(after, 1)["samples"] != trained_on(before, 1)["samples"]


def test_another_number_of_processes_is_noticed(stopped, recipe):  # noqa: F811
    again, checkpoint = stopped()
    then = json.loads((checkpoint / TRAINED_ON).read_text())
    assert then["num_processes"] == 1
    assert then["samples_a_step"] == 4
    (checkpoint / TRAINED_ON).write_text(json.dumps({**then, "num_processes": 2, "samples_a_step": 8}))
    write_manifest(checkpoint)
    with pytest.raises(UsageError, match="of a run with 2 processes and 8 samples a step, and this one has 1 and 4"):
        train(recipe(*again), progress=False)


@pytest.mark.slow
def test_a_new_tokenizer_is_not_learnt_again(recipe, own_data, data, tmp_path):  # noqa: F811
    """It has learnt from the data of both stages; that of the other one changes while the first is stopped."""
    two = [f"finetune.data={own_data}", f"finetune.image_root={data}"]
    two += [*(key.replace("finetune", "pretrain") for key in SAVE), "stage=pretrain"]
    whole = weights(train(recipe(*two, f"output_dir={tmp_path}/whole"), progress=False))
    _, tokenizer = load_model(str(tmp_path / "whole/pretrain/model"))
    folder = train(recipe(*two), progress=False)
    for name in ("model", "checkpoint-4"):
        (folder.parent / name / "model.safetensors").unlink()
    own_data.write_text(own_data.read_text().replace("Which colour", "Zwölf Boxkämpfer jagen Viktor"))
    again = train(recipe(*two), progress=False)
    assert same(weights(again), whole)
    assert load_model(str(again))[1].tokenizer.get_vocab() == tokenizer.tokenizer.get_vocab()


@pytest.mark.slow
def test_a_checkpoint_of_an_older_version_is_gone_on_from(stopped, recipe, tmp_path):  # noqa: F811
    again, checkpoint = stopped()
    whole = weights(train(recipe(*again, f"output_dir={tmp_path}/whole"), progress=False))
    for name in (TRAINED_ON, "tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        (checkpoint / name).unlink()
    write_manifest(checkpoint)
    assert same(weights(train(recipe(*again), progress=False)), whole)


def test_no_step_is_taken_after_the_last(recipe, tmp_path):  # noqa: F811
    """Stopped between its last checkpoint and the model; the last step is in the midst of an epoch."""
    again = [*ONE, *SAVE]
    folder = train(recipe(*again), progress=False)
    whole = weights(folder)
    log = json.loads((folder.parent / "log.json").read_text())
    (folder / "model.safetensors").unlink()
    after = weights(train(recipe(*again), progress=False))
    assert same(after, whole)
    steps = [entry["step"] for entry in json.loads((folder.parent / "log.json").read_text())]
    assert steps == [entry["step"] for entry in log][: len(steps)]


# Checkpoints that are whole, but not ours


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def tampered(state: dict, change: str):
    if change == "shape":
        state["state"][0]["exp_avg"] = torch.zeros(3)
    elif change == "groups":
        state["param_groups"] = []
    elif change == "list":
        return [1]
    return state


@pytest.mark.parametrize("change", ["shape", "groups", "list", "hostile", "text", "empty"])
@pytest.mark.slow
def test_an_optimizer_that_cannot_be_loaded(stopped, recipe, change, monkeypatch, tmp_path):  # noqa: F811
    again, checkpoint = stopped()
    path = checkpoint / "optimizer.pt"
    if change in ("hostile", "text", "empty"):
        path.write_bytes({"hostile": pickle.dumps(Hostile()), "text": b"hello", "empty": b""}[change])
    else:
        torch.save(tampered(torch.load(path, weights_only=True), change), path)
    write_manifest(checkpoint)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"cannot go on from .*checkpoint-2 \(remove it, or give resume=f"
    ) as caught:
        train(recipe(*again), progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    train(recipe(*again, "resume=false"), progress=False)


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state.pth", "trainer_state.json", TRAINED_ON])
@pytest.mark.parametrize("content", [b"", b"[1]", b'{"global_step": "x"}'])
@pytest.mark.slow
def test_files_of_a_checkpoint_that_are_odd(stopped, recipe, name, content):  # noqa: F811
    again, checkpoint = stopped()
    (checkpoint / name).write_bytes(content)
    write_manifest(checkpoint)
    with pytest.raises((CheckpointError, UsageError)) as caught:
        train(recipe(*again), progress=False)
    assert "\n" not in str(caught.value)
    assert str(checkpoint) in str(caught.value)


# What is not worth saving


def test_a_last_step_that_makes_weights_infinite_saves_no_model(recipe, tmp_path):  # noqa: F811
    last = ["finetune.training.max_steps=1", "finetune.learning_rates={connector: 1.0e+38}"]
    decay = ["finetune.training.weight_decay=10.0", "finetune.training.save_strategy=steps"]
    with pytest.raises(DivergedError, match="a weight of connector is not finite after step 1") as caught:
        train(recipe(*ONE, *last, *decay, "finetune.training.save_steps=1"), progress=False)
    assert caught.value.exit_code == 5
    assert not list((tmp_path / "run/finetune").glob("*/model.safetensors"))
    with pytest.raises(DivergedError, match="a weight of connector is not finite after step 1"):
        train(recipe(*ONE, *last, decay[0], "resume=false"), progress=False)
    assert not (tmp_path / "run/finetune/model").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_item_that_raises_stop_iteration_does_not_end_the_epoch(recipe, monkeypatch, tmp_path, num_workers):  # noqa: F811
    from acformer.data import collate

    encode = collate.encode_conversation

    def exhausted(processor, messages, **kwargs):
        return next(iter(())) if "blue" in str(messages) else encode(processor, messages, **kwargs)

    monkeypatch.setattr(collate, "encode_conversation", exhausted)
    with pytest.raises(DataError, match="StopIteration"):
        train(recipe(*ONE, f"finetune.training.dataloader_num_workers={num_workers}"), progress=False)
    assert not (tmp_path / "run/finetune/model").exists()


# The folder


@pytest.mark.slow
def test_a_recipe_of_the_users_own_is_not_written_over(recipe, tmp_path):  # noqa: F811
    own = tmp_path / "mine/recipe.yaml"
    own.parent.mkdir()
    text = (tmp_path / "two.yaml").read_text() + "# my notes\n"
    own.write_text(text)
    for resume in ("true", "false"):
        with pytest.raises(UsageError, match=r"mine/recipe.yaml is not a record of a run"):
            train(recipe(f"output_dir={own.parent}", f"resume={resume}"), progress=False)
    assert own.read_text() == text
    assert list(own.parent.iterdir()) == [own]


@pytest.mark.slow
def test_the_record_of_a_run_is_a_recipe_to_go_on_with(recipe, tmp_path):  # noqa: F811
    from acformer.training.recipe import load_recipe

    train(recipe("stage=pretrain"), progress=False)
    record = tmp_path / "run/recipe.yaml"
    train(load_recipe(str(record), ["finetune.learning_rates.connector=0.02"]), progress=False)
    assert verify_folder(tmp_path / "run/finetune/model") is None
    assert load_recipe(str(record)).finetune.learning_rates["connector"] == 0.02


# Room


@pytest.mark.slow
def test_room_is_looked_for_before_anything_is_written(recipe, tmp_path, monkeypatch):  # noqa: F811
    import shutil
    from collections import namedtuple

    size = (train(recipe(*ONE), progress=False) / "model.safetensors").stat().st_size
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1.9 * size))
    with pytest.raises(CheckpointError, match=rf"no room in {tmp_path}/second: the run writes at least 0.5 MB"):
        train(recipe(f"output_dir={tmp_path}/second"), progress=False)  # two models
    assert not (tmp_path / "second").exists()
    train(recipe(*ONE, f"output_dir={tmp_path}/third"), progress=False)
    with pytest.raises(CheckpointError, match="no room"):
        train(recipe(*ONE, *SAVE, f"output_dir={tmp_path}/fourth"), progress=False)


def test_a_disk_that_fills_up_is_one_line_with_the_path(recipe, tmp_path, monkeypatch):  # noqa: F811
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"cannot save .*/run/finetune/checkpoint-2: .*No space left on device"):
        train(recipe(*ONE, *SAVE), progress=False)
    assert "no manifest" in verify_folder(tmp_path / "run/finetune/checkpoint-2")


def test_a_model_that_cannot_be_saved_leaves_no_half_of_one(recipe, tmp_path, monkeypatch):  # noqa: F811
    """The tokenizer's library raises a bare Exception."""
    from acformer.hf import AcFormerProcessor

    def full(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(AcFormerProcessor, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"cannot save .*/run/finetune/model: No space left on device") as caught:
        train(recipe(*ONE), progress=False)
    assert caught.value.exit_code == 4
    assert [path.name for path in (tmp_path / "run/finetune").iterdir()] == ["log.json"]
