"""Two-stage training on a few pictures with models of a few thousand weights, built from ordinary local folders."""

import json
import logging
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionModel

from acformer.errors import CheckpointError, DataError, DivergedError, UsageError
from acformer.hf.checkpoints import keep_newest, latest_valid_checkpoint, load_model, verify_folder, write_manifest
from acformer.training.recipe import Recipe, load_recipe
from acformer.training.stages import train
from acformer.training.trainer import AcFormerTrainer, freeze, module_parameters

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twelve pictures of one colour, a question and a caption for each, and a vision tower in a folder."""
    folder = tmp_path_factory.mktemp("data")
    questions, captions = [], []
    for number in range(12):
        name = list(COLOURS)[number % 3]
        Image.new("RGB", (20, 14), tuple(min(255, c + number) for c in COLOURS[name])).save(folder / f"{number}.png")
        record = {"id": str(number), "image": f"{number}.png"}
        turns = ("<image>\nWhich colour?", name), ("<image>", f"all {name}")
        for records, (human, gpt) in zip((questions, captions), turns, strict=True):
            said = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
            records.append({**record, "conversations": said, "kind": "colour"})
    (folder / "questions.json").write_text(json.dumps(questions))
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(record) for record in captions))
    CLIPVisionModel(tiny.config().vision_config).save_pretrained(folder / "vision")
    tiny.processor().image_processor.save_pretrained(folder / "vision")
    return folder


def two_stages(data: Path, folder: Path) -> Path:
    """The two-stage recipe, in `folder`."""
    path = folder / "two.yaml"
    training = "{max_steps: 3, per_device_train_batch_size: 4, logging_steps: 1}"
    path.write_text(f"""
model:
  vision: {data}/vision
  text: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
         num_key_value_heads: 2, max_position_embeddings: 256}}
  connector: acformer
  connector_kwargs: {{num_anchors: 4, depth: 1, num_heads: 2, head_dim: 8}}
output_dir: {folder}/run
pretrain:
  data: {data}/captions.jsonl
  template: plain
  learning_rates: {{connector: 0.01}}
  training: {training}
finetune:
  data: {data}/questions.json
  learning_rates: {{connector: 0.01, language_model: 0.002}}
  training: {training}
""")
    return path


@pytest.fixture
def recipe(data, tmp_path, monkeypatch):
    """A function that makes the two-stage recipe, with overrides."""
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    path = two_stages(data, tmp_path)

    def make(*overrides: str) -> Recipe:
        return load_recipe(str(path), overrides)

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: dict, after: dict) -> set[str]:
    """Modules of which a weight differs."""
    return {name.split(".")[1] for name, value in after.items() if not torch.equal(value, before[name])}


def test_two_stages_each_train_what_the_recipe_names(recipe, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="acformer"):
        folder = train(recipe(), progress=False)
    assert folder == tmp_path / "run/finetune/model"
    first, last = weights(tmp_path / "run/pretrain/model"), weights(folder)
    assert changed(first, last) == {"connector", "language_model"} | ({"weight"} & changed(first, last))
    assert "vision_tower" in caplog.text
    assert "frozen" in caplog.text
    assert "lr 0.002" in caplog.text
    _, processor = load_model(str(tmp_path / "run"))
    assert processor.chat_template.count("ASSISTANT") > 0  # the model's template, not stage 1's
    log = json.loads((tmp_path / "run/finetune/log.json").read_text())
    assert all(0 < entry["loss"] < 100 for entry in log if "loss" in entry)


def test_stage_one_leaves_the_language_model_alone(recipe, data):
    from acformer.hf.build import build_model
    from acformer.training.stages import recipe_texts, set_seed

    chosen = recipe("stage=pretrain")
    set_seed(chosen.seed)
    fresh, _ = build_model(**asdict(chosen.model), texts=recipe_texts(chosen))
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    after = weights(train(chosen, progress=False))
    assert changed(before, after) == {"connector"}
    tower = load_file(data / "vision/model.safetensors")
    kept = [name for name in tower if f"model.vision_tower.{name}" in after]
    assert len(kept) == sum(name.startswith("model.vision_tower.") for name in after)
    assert all(torch.equal(after[f"model.vision_tower.{name}"], tower[name]) for name in kept)


def test_cached_features_train_the_same_model(recipe, tmp_path):
    losses = {}
    for name, cache in (("live", "false"), ("cached", "true")):
        train(recipe(f"output_dir={tmp_path}/{name}", f"cache_features={cache}"), progress=False)
        log = json.loads((tmp_path / name / "finetune/log.json").read_text())
        losses[name] = [entry["loss"] for entry in log if "loss" in entry]
    assert list((tmp_path / "cache/features").glob("*/tokens.bin"))
    # Tokens are stored in float16: features rounded by 5e-4 of their size, then six steps of AdamW.
    assert losses["cached"] == pytest.approx(losses["live"], rel=2e-2)


def test_weights_in_float16_are_refused(recipe):
    with pytest.raises(UsageError, match=r"weights in float16 cannot be trained.*model.dtype float32"):
        train(recipe("model.dtype=float16"), progress=False)


def test_samples_are_cut_at_the_language_models_context(recipe, caplog, monkeypatch):
    from acformer.training import stages

    lengths = []

    class Watched(stages.ConversationDataset):
        def __init__(self, *args, max_length, **options):
            lengths.append(max_length)
            super().__init__(*args, max_length=max_length, **options)

    monkeypatch.setattr(stages, "ConversationDataset", Watched)
    train(recipe("finetune.max_length=200"), progress=False)
    assert lengths == [256, 200]
    assert "samples are cut" not in caplog.text
    train(recipe("finetune.max_length=1000", "resume=false", "stage=finetune"), progress=False)
    assert lengths == [256, 200, 256]
    assert "stage finetune: samples are cut at the language model's context of 256 tokens, not at max" in caplog.text


def test_a_group_asks_several_questions_about_a_picture_encoded_once(recipe, data, tmp_path):
    records = json.loads((data / "questions.json").read_text())
    (data / "twice.json").write_text(json.dumps(records + records))
    folder = train(
        recipe(
            "stage=finetune",
            "pretrain=null",
            f"finetune.data={data}/twice.json",
            "finetune.group=2",
            "cache_features=true",
        ),
        progress=False,
    )
    assert verify_folder(folder) is None


def test_learning_rates_reach_the_optimizer():
    model = tiny.model()
    rates = {"connector": 0.1, "language_model": 0.2}
    table = freeze(model, rates)
    assert [line.split()[0] for line in table.splitlines()] == ["vision_tower", "connector", "language_model"]
    groups = module_parameters(model)
    assert sum(p.numel() for g in groups.values() for p in g) == sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in groups["vision_tower"])
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir="unused", weight_decay=0.1, report_to=[], use_cpu=True)
    trainer = AcFormerTrainer(model=model, args=args, learning_rates=rates)
    seen = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            seen[id(parameter)] = (group["lr"], group["weight_decay"], parameter.ndim)
    assert len(seen) == len(groups["connector"]) + len(groups["language_model"])
    assert {seen[id(p)][0] for p in groups["connector"]} == {0.1}
    assert {seen[id(p)][0] for p in groups["language_model"]} == {0.2}
    assert {decay for _, decay, ndim in seen.values() if ndim > 1} == {0.1}
    assert {decay for _, decay, ndim in seen.values() if ndim == 1} == {0.0}


@pytest.mark.slow
def test_a_second_run_trains_nothing_and_another_recipe_is_refused(recipe, tmp_path, caplog):
    folder = train(recipe(), progress=False)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, logger="acformer"):
        train(recipe(), progress=False)
    assert "stage finetune is done" in caplog.text
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match="holds a run of another recipe"):
        train(recipe("seed=7"), progress=False)
    train(recipe("seed=7", "resume=false"), progress=False)
    assert (folder / "model.safetensors").stat().st_mtime_ns != stamp


TOLD_FIRST = [
    ("finetune.training.warmup_ratio=0.03", UsageError, "finetune: unknown training argument 'warmup_ratio'"),
    (
        "finetune.training.eval_strategy=steps",
        UsageError,
        "finetune: training.eval_strategy steps: nothing is evaluated",
    ),
    ("finetune.training.eval_on_start=true", UsageError, "training.eval_on_start True: nothing is evaluated"),
    ("finetune.training.save_strategy=best", UsageError, "training.save_strategy best: nothing is evaluated"),
    ("finetune.training.enable_jit_checkpoint=true", UsageError, "enable_jit_checkpoint True: such a checkpoint"),
    ("finetune.training.use_liger_kernel=true", UsageError, "training.use_liger_kernel True: there are no Liger"),
    ("finetune.training.per_device_train_batch_size=0", UsageError, "per_device_train_batch_size must be at least 1"),
    ("finetune.training.gradient_accumulation_steps=0", UsageError, "gradient_accumulation_steps must be at least 1"),
    ("finetune.training.dataloader_num_workers=-1", UsageError, "finetune: training arguments do not fit: num_workers"),
    ("finetune.training.fsdp=full_shard", UsageError, "do not fit: Using fsdp only works in distributed training"),
    ("finetune.training.report_to=nowhere", UsageError, "do not fit: nowhere is not supported"),
    ("finetune.training.lr_scheduler_type=cosine_with_min_lr", UsageError, "do not fit: One of min_lr"),
    ("finetune.training.deepspeed=/no/where.json", UsageError, "finetune: training arguments do not fit: .*"),
    (
        "finetune.learning_rates.fusion=0.1",
        UsageError,
        "finetune: learning_rates.fusion: this model has no weights there",
    ),
    ("finetune.template=nothing", UsageError, "finetune: unknown chat template 'nothing'"),
    ("finetune.elastic=[4, 99]", UsageError, "finetune: elastic range 4..99: 99 tokens do not fit"),
    ("finetune.data=/no/where.json", DataError, "cannot read /no/where.json"),
] + [
    pytest.param(
        setting, UsageError, package, marks=pytest.mark.skipif(find_spec(package) is not None, reason="it is installed")
    )
    for setting, package in (
        ("finetune.training.report_to=wandb", "wandb"),
        ("finetune.training.optim=adamw_bnb_8bit", "bitsandbytes"),
    )
]


@pytest.mark.parametrize(("mistake", "kind", "message"), TOLD_FIRST)
def test_a_mistake_in_stage_two_is_told_before_stage_one_trains(recipe, tmp_path, mistake, kind, message):
    with pytest.raises(kind, match=message):
        train(recipe(mistake), progress=False)
    assert not list((tmp_path / "run").glob("*"))


def test_a_data_set_of_stage_two_that_is_gone_is_told_before_a_given_model_trains(recipe, tmp_path):
    """Without a tokenizer to be made, nothing else would look at it."""
    folder = train(recipe("stage=pretrain"), progress=False)
    again = [f"from_model={folder}", f"output_dir={tmp_path}/second", "finetune.data=/no/where.json"]
    with pytest.raises(DataError, match=r"cannot read /no/where.json"):
        train(recipe(*again), progress=False)
    assert not (tmp_path / "second").exists()


def test_a_corrected_stage_two_goes_on_from_stage_one(recipe, tmp_path, data):
    train(recipe("stage=pretrain"), progress=False)
    stage_one = tmp_path / "run/pretrain/model/model.safetensors"
    stamp = stage_one.stat().st_mtime_ns
    (data / "others.json").write_text((data / "questions.json").read_text())
    with pytest.raises(UsageError, match=r"recipe.yaml; not the same: finetune.data\)"):  # the tokenizer read the first
        train(recipe(f"finetune.data={data}/others.json"), progress=False)
    corrected = "finetune.learning_rates.connector=0.02"
    train(recipe(corrected), progress=False)
    assert stage_one.stat().st_mtime_ns == stamp
    assert load_recipe(str(tmp_path / "run/recipe.yaml")) == recipe(corrected)
    with pytest.raises(
        UsageError, match=r"not the same: finetune\); choose .* or stage=finetune resume=false to write"
    ):
        train(recipe(), progress=False)
    train(recipe("stage=finetune", "resume=false"), progress=False)
    assert stage_one.stat().st_mtime_ns == stamp


def test_older_checkpoints_go_when_the_new_one_is_whole(recipe, tmp_path, monkeypatch):
    """A kill at any moment leaves one to go on from, though only one is kept."""
    folder = tmp_path / "run/finetune"
    before, after = [], []

    def watched(checkpoint):
        if checkpoint.parent == folder:
            before.append(latest_valid_checkpoint(folder, lambda text: None))
        write_manifest(checkpoint)
        if checkpoint.parent == folder:
            after.append(latest_valid_checkpoint(folder, lambda text: None))

    monkeypatch.setattr("acformer.training.trainer.write_manifest", watched)
    keep = [f"finetune.training.{key}" for key in ("save_strategy=steps", "save_steps=1", "save_total_limit=1")]
    train(recipe("stage=finetune", "pretrain=null", *keep), progress=False)
    one, two, three = (folder / f"checkpoint-{step}" for step in (1, 2, 3))
    assert before == [None, one, two]
    assert after == [one, two, three]
    assert list(folder.glob("checkpoint-*")) == [three]


def test_as_many_checkpoints_are_kept_as_asked_and_none_that_was_passed_over(tmp_path):
    def left(limit, step):
        for number in (2, 10, 12, 30):
            (tmp_path / f"checkpoint-{number}").mkdir(exist_ok=True)
        keep_newest(tmp_path, limit, step)
        return {int(path.name.partition("-")[2]) for path in tmp_path.iterdir()}

    assert left(None, 30) == left(0, 30) == {2, 10, 12, 30}
    assert left(2, 30) == {12, 30}
    assert left(1, 12) == {12}  # the run went on from 10, since 30 was damaged


def test_resume_equals_never_stopped_and_passes_over_a_torn_checkpoint(recipe, tmp_path, caplog):
    save = [
        "stage=finetune",
        "pretrain=null",
        "finetune.training.max_steps=4",
        "finetune.training.save_strategy=steps",
        "finetune.training.save_steps=1",
    ]
    whole = train(recipe(*save, f"output_dir={tmp_path}/whole"), progress=False)
    stopped = train(recipe(*save, f"output_dir={tmp_path}/stopped"), progress=False)
    expected = weights(whole)
    run = stopped.parent
    for name in ("model", "checkpoint-4"):  # as if killed after step 3, while it was being saved
        (run / name / "model.safetensors").unlink()
    torn = run / "checkpoint-3/optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:-1])
    train(recipe(*save, f"output_dir={tmp_path}/stopped"), progress=False)
    assert "passing over" in caplog.text
    assert "optimizer.pt has changed" in caplog.text
    after = weights(stopped)
    assert all(torch.equal(after[name], value) for name, value in expected.items())


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.slow
def test_resume_within_a_later_epoch_goes_on_in_its_order(recipe, data, tmp_path, strategy):
    """Three steps an epoch; stopped after the fifth. Dropout would show a generator that is not restored."""
    records = json.loads((data / "questions.json").read_text())
    for number, record in enumerate(records):
        record["conversations"][1]["value"] += " indeed" * (5 * number % 12)
    (data / "lengths.json").write_text(json.dumps(records))
    save = [
        "stage=finetune",
        "pretrain=null",
        f"finetune.data={data}/lengths.json",
        f"finetune.training.train_sampling_strategy={strategy}",
        "finetune.training.max_steps=8",
        "finetune.training.save_strategy=steps",
        "finetune.training.save_steps=5",
        "model.text.attention_dropout=0.1",
    ]
    whole = weights(train(recipe(*save, f"output_dir={tmp_path}/whole"), progress=False))
    stopped = train(recipe(*save, f"output_dir={tmp_path}/stopped"), progress=False)
    for name in ("model", "checkpoint-8"):
        (stopped.parent / name / "model.safetensors").unlink(missing_ok=True)
    train(recipe(*save, f"output_dir={tmp_path}/stopped"), progress=False)
    after = weights(stopped)
    assert all(torch.equal(after[name], value) for name, value in whole.items())


def test_a_strategy_that_does_not_fit_is_told(recipe):
    with pytest.raises(UsageError, match=r"batch_rebalance does not fit|train_sampling_strategy"):
        train(recipe("stage=pretrain", "pretrain.training.train_sampling_strategy=batch_rebalance"), progress=False)


def test_a_loss_that_is_not_finite_stops_before_the_step(recipe, tmp_path, monkeypatch):
    from acformer.hf import AcFormerForConditionalGeneration

    whole = AcFormerForConditionalGeneration.forward
    calls = []

    def poisoned(self, *args, **kwargs):
        output = whole(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(AcFormerForConditionalGeneration, "forward", poisoned)
    save = ["finetune.training.save_strategy=steps", "finetune.training.save_steps=1"]
    with pytest.raises(DivergedError, match=r"loss is nan at step 3: samples \d+, \d+, \d+, \d+") as caught:
        train(recipe("stage=finetune", "pretrain=null", *save), progress=False)
    assert caught.value.exit_code == 5
    last = tmp_path / "run/finetune/checkpoint-2"
    assert verify_folder(last) is None
    assert all(value.isfinite().all() for value in weights(last).values())


def test_a_gradient_that_is_not_finite_stops_before_the_step(recipe, monkeypatch):
    from acformer.connectors.blocks import Projector

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    whole = Projector.forward
    monkeypatch.setattr(Projector, "forward", lambda self, x: Poison.apply(whole(self, x)))
    with pytest.raises(DivergedError, match="gradient is not finite at step 1"):
        train(recipe("stage=pretrain"), progress=False)


def test_a_gradient_that_is_not_finite_names_all_samples_of_its_step(recipe, monkeypatch):
    """Two batches a step; the first of the second step has the bad gradient."""
    from acformer.connectors.blocks import Projector

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, number):
            ctx.number = number
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (float("inf") if ctx.number == 3 else 1.0), None

    whole, loss, batches = Projector.forward, AcFormerTrainer.compute_loss, []

    def watched(self, model, inputs, *args, **kwargs):
        batches.append(inputs["sample_ids"])
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AcFormerTrainer, "compute_loss", watched)
    monkeypatch.setattr(Projector, "forward", lambda self, x: Poison.apply(whole(self, x), len(batches)))
    steps = ["gradient_accumulation_steps=2", "per_device_train_batch_size=2"]
    with pytest.raises(DivergedError, match="not finite at step 2") as caught:
        train(recipe("stage=pretrain", *[f"pretrain.training.{key}" for key in steps]), progress=False)
    assert str(caught.value).endswith(f"samples {', '.join(batches[2] + batches[3])}")


def test_what_was_skipped_stays_skipped_after_a_resume(recipe, data, tmp_path, monkeypatch):
    """Twelve pictures in three steps, four of them torn: used + skipped = offered, whether it was stopped or not."""
    records = json.loads((data / "questions.json").read_text())
    for number in (0, 3, 6, 9):
        torn = (data / records[number]["image"]).read_bytes()[:40]
        (data / f"torn-{number}.png").write_bytes(torn)
        records[number]["image"] = f"torn-{number}.png"
    (data / "torn.json").write_text(json.dumps(records))
    one = ["stage=finetune", "pretrain=null", f"finetune.data={data}/torn.json", "finetune.max_bad_fraction=0.5"]
    one += ["finetune.training.save_strategy=steps", "finetune.training.save_steps=1"]
    save = AcFormerTrainer._save_checkpoint

    def stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(AcFormerTrainer, "_save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(*one), progress=False)
    monkeypatch.setattr(AcFormerTrainer, "_save_checkpoint", save)
    log = tmp_path / "run/finetune/skipped.jsonl"
    with log.open("a") as late:  # after the checkpoint: this part is done again
        late.write(
            json.dumps({"file": "torn.json", "record": 99, "reason": "a disk that was away for a moment"}) + "\n"
        )
    train(recipe(*one), progress=False)
    assert sorted(json.loads(line)["record"] for line in log.read_text().splitlines()) == [1, 4, 7, 10]


def test_bad_records_are_written_down_and_the_cap_works(recipe, data, tmp_path):
    records = json.loads((data / "questions.json").read_text())
    records[3]["image"] = "gone.png"
    (data / "one_bad.json").write_text(json.dumps(records))
    one_bad = ["stage=finetune", "pretrain=null", f"finetune.data={data}/one_bad.json"]
    with pytest.raises(DataError, match="1 of 12 records are bad"):
        train(recipe(*one_bad), progress=False)
    assert not (tmp_path / "run/recipe.yaml").exists(), "it is told before anything trains"
    train(recipe(*one_bad, "finetune.max_bad_fraction=0.1", "resume=false"), progress=False)
    (entry,) = [json.loads(line) for line in (tmp_path / "run/finetune/skipped.jsonl").read_text().splitlines()]
    assert entry["record"] == 4
    assert "gone.png" in entry["reason"]


def test_a_first_try_that_failed_claims_nothing(recipe, tmp_path):
    with pytest.raises(UsageError, match=r"num_anchors must be in 1\.\.16"):
        train(recipe("model.connector_kwargs.num_anchors=999"), progress=False)
    assert not (tmp_path / "run/recipe.yaml").exists()


@pytest.mark.slow
def test_stage_one_anew_takes_stage_two_with_it(recipe, tmp_path):
    train(recipe(), progress=False)
    train(recipe("seed=7", "stage=pretrain", "resume=false"), progress=False)
    assert not (tmp_path / "run/finetune/model").exists()
    train(recipe("seed=7"), progress=False)
    assert verify_folder(tmp_path / "run/finetune/model") is None


def test_rows_without_pictures_do_not_end_stage_one(recipe, data):
    records = [{"id": "t", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}] * 4
    (data / "text.json").write_text(json.dumps(records))
    one = [f"pretrain.data={data}/text.json", "pretrain.template=bare", "pretrain.training.max_steps=1"]
    assert verify_folder(train(recipe("stage=pretrain", *one), progress=False)) is None


def test_finetune_alone_wants_stage_one_first(recipe):
    with pytest.raises(UsageError, match="run pretrain first"):
        train(recipe("stage=finetune"), progress=False)


def test_going_on_from_a_given_model(recipe, tmp_path):
    folder = train(recipe("stage=pretrain"), progress=False)
    again = train(recipe("stage=finetune", f"from_model={folder}", f"output_dir={tmp_path}/second"), progress=False)
    assert "connector" in changed(weights(folder), weights(again))


def test_a_changed_file_in_a_model_folder_is_refused(recipe):
    folder = train(recipe("stage=pretrain"), progress=False)
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1  # one bit: safetensors itself would load it
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"damaged: model.safetensors has changed"):
        load_model(str(folder))
    with pytest.raises(CheckpointError, match="no model in"):
        load_model("/nowhere/at/all")
    with pytest.raises(CheckpointError, match=r"did you mean .*/pretrain\?"):
        load_model(str(folder.parent.with_name("pretrian")))


def test_logits_of_supervised_positions_alone_give_the_same_loss_and_gradients():
    batch = tiny.inputs(["<image> red green", "yes <image> hello blue"], tiny.pictures([0, 1]))
    labels = batch["input_ids"].clone()
    labels[:, :9] = -100
    results = []
    for only in (False, True):
        model = tiny.model()
        output = model(**batch, labels=labels, supervised_only=only, num_items_in_batch=torch.tensor(7))
        output.loss.backward()
        results.append((output.loss.detach(), model.model.connector.projector[0].weight.grad))
    (whole, whole_grad), (part, part_grad) = results
    assert output.logits.shape[1] == int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(part, whole)
    torch.testing.assert_close(part_grad, whole_grad, rtol=1e-4, atol=1e-6)  # another order of summing


@pytest.mark.slow
def test_two_processes_train_one_model(recipe, tmp_path, data):
    """torchrun with gloo: both processes come to the same weights, one writes."""
    import os
    import subprocess
    import sys

    recipe_file = tmp_path / "two.yaml"
    program = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = (*program, "-m", "acformer.cli", "train", str(recipe_file), "--quiet", "cache_features=true")
    command += ("finetune.training.train_sampling_strategy=group_by_length",)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACFORMER_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, [
        line for line in result.stderr.splitlines() if "acformer: " in line
    ] or result.stderr
    folder = tmp_path / "run/finetune/model"
    assert verify_folder(folder) is None
    assert not (folder / "training_args.bin").exists()
    assert "connector" in changed(weights(tmp_path / "run/pretrain/model"), weights(folder))
