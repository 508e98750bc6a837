"""`acformer train --dry-run`: everything is checked, a batch is shown as it is learned, nothing is left behind."""

import pytest
from test_train import TOLD_FIRST, data, recipe  # noqa: F401 (fixtures)

from acformer import cli
from acformer.errors import AcFormerError
from acformer.training.dry_run import dry_run
from acformer.training.stages import train
from acformer.training.trainer import AcFormerTrainer


@pytest.fixture(autouse=True)
def no_step(monkeypatch):
    """A function: from now on, a trained step fails the test."""

    def forbid():
        monkeypatch.setattr(AcFormerTrainer, "training_step", lambda *args, **kwargs: pytest.fail("it trains"))

    return forbid


def test_each_stage_is_shown_as_it_would_begin(recipe, tmp_path, no_step):  # noqa: F811
    no_step()
    before = sorted(tmp_path.rglob("*"))
    own = ["finetune.lora={r: 4}", "finetune.training.gradient_accumulation_steps=2", "finetune.training.max_steps=7"]
    shown = dry_run(recipe(*own))
    assert sorted(tmp_path.rglob("*")) == before
    first, second, last = shown.split("\n\n")
    assert "stage pretrain: 12 records, 0 skipped; 3 steps of 4 (4 x 1 passes x 1 processes)" in first
    assert "language_model       0.03 M  frozen" in first or "frozen" in first
    assert "saved: model" in first
    assert "<image x 5>[[all " in first
    assert "stage finetune: 12 records, 0 skipped; 7 steps of 8 (4 x 2 passes x 1 processes)" in second
    assert "of which" in second
    assert "saved: adapters and connector" in second
    assert "pixel_values (4, 3, 16, 16) float32" in second
    assert "USER: <image x 5>\\nWhich colour? ASSISTANT: [[" in second or "[[" in second.split("ASSISTANT:")[1]
    assert "</s>]]" in second
    assert last == "nothing was trained, nothing written"


def test_the_batch_is_the_one_that_is_trained(recipe, monkeypatch):  # noqa: F811
    one = recipe("stage=finetune", "pretrain=null", "finetune.training.train_sampling_strategy=sequential")
    shown = dry_run(one)
    loss, seen = AcFormerTrainer.compute_loss, []

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(inputs["sample_ids"])
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AcFormerTrainer, "compute_loss", watched)
    train(one, progress=False)
    assert [line.split("sample ")[1].strip(":") for line in shown.splitlines() if line.startswith("  row")] == seen[0][
        :3
    ]


def test_a_second_stage_goes_on_from_what_is_there(recipe, tmp_path, no_step):  # noqa: F811
    train(recipe("stage=pretrain", "cache_features=true"), progress=False)
    no_step()
    before = sorted(tmp_path.rglob("*"))
    shown = dry_run(recipe("finetune.training.bf16=true", "finetune.elastic=[3, 5]", "cache_features=true"))
    assert sorted(tmp_path.rglob("*")) == before
    assert "stage pretrain" not in shown
    assert "num_visual_tokens " in shown


def test_nothing_is_left_to_do(recipe):  # noqa: F811
    train(recipe(), progress=False)
    assert dry_run(recipe()).startswith("every stage is done")


@pytest.mark.parametrize(("mistake", "kind", "message"), TOLD_FIRST[:3] + TOLD_FIRST[-5:])
def test_mistakes_are_told_as_in_training(recipe, tmp_path, mistake, kind, message):  # noqa: F811
    with pytest.raises(AcFormerError, match=message) as caught:
        dry_run(recipe(mistake))
    assert isinstance(caught.value, kind)
    assert not (tmp_path / "run").exists()


def test_the_command(recipe, tmp_path, capsys):  # noqa: F811
    recipe()
    assert cli.main(["train", str(tmp_path / "two.yaml"), "--dry-run", "stage=pretrain", "--quiet"]) == 0
    assert capsys.readouterr().out.endswith("nothing was trained, nothing written\n")
    assert not (tmp_path / "run").exists()
