"""A table in small: two connectors, two seeds, three steps a stage, on images of one colour."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from tqdm import tqdm
from transformers import CLIPVisionModel

from acformer.connectors import CONNECTORS, Geometry, build_connector, list_connectors
from acformer.connectors.mlp import MLPConnector
from acformer.errors import AcFormerError, DataError, UsageError
from acformer.hf.build import build_model
from acformer.lab.reproduce import execute, pairs, plot_scores, run_plan, runs
from acformer.lab.reproduce.execute import Task, answer_loss
from acformer.lab.reproduce.measured import Measured, mean_interval, student_t
from acformer.lab.reproduce.plans import (
    SCALES,
    TABLES,
    Plan,
    Scale,
    Search,
    TableRow,
    chosen_rows,
    every_connector,
    plan_for,
)
from acformer.lab.reproduce.run_plan import reproduce
from acformer.lab.reproduce.runs import Timing, cells_of, job_path, refuse_idle_overrides, row_options
from acformer.lab.reproduce.schedule import run_tasks
from acformer.lab.reproduce.tables import table_text
from acformer.lab.reproduce.variants import shortened, with_factor, with_fraction
from acformer.training.recipe import ModelSpec, load_recipe
from acformer.training.stages import train

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
ROWS = (TableRow("acformer", "acformer"), TableRow("mlp", "mlp"))
CHANGED = ("finetune.training.max_steps=6",)
GEOMETRY, SMALL = Geometry(32, 32, (4, 4), 1), {"num_anchors": 4, "depth": 1, "num_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images with a question and a caption each, a vision tower, and the recipe `mini.yaml`."""
    folder = tmp_path_factory.mktemp("data")
    questions, captions = [], []
    for number in range(12):
        name = list(COLOURS)[number % 3]
        Image.new("RGB", (20, 14), tuple(min(255, c + number) for c in COLOURS[name])).save(folder / f"{number}.png")
        turns = ("<image>\nWhich colour?", name), ("<image>", f"all {name}")
        for records, (human, gpt) in zip((questions, captions), turns, strict=True):
            said = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
            kind = ("colour", "shade")[number % 2]
            records.append({"id": str(number), "image": f"{number}.png", "conversations": said, "kind": kind})
    for name, records in (("questions", questions), ("captions", captions)):
        (folder / f"{name}.json").write_text(json.dumps(records))
    CLIPVisionModel(tiny.config().vision_config).save_pretrained(folder / "vision")
    tiny.processor().image_processor.save_pretrained(folder / "vision")
    training = "{max_steps: 4, per_device_train_batch_size: 4, dataloader_pin_memory: false}"
    (folder / "mini.yaml").write_text(f"""
model:
  vision: {folder}/vision
  text: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
         num_key_value_heads: 2, max_position_embeddings: 256}}
  connector: acformer
  connector_kwargs: {{num_anchors: 4, depth: 1, num_heads: 2, head_dim: 8}}
  template: bare
pretrain: {{data: {folder}/captions.json, template: plain, learning_rates: {{connector: 0.01}}, training: {training}}}
finetune:
  data: {folder}/questions.json
  learning_rates: {{connector: 0.01, language_model: 0.002}}
  training: {training}
cache_features: true
""")
    return folder


@pytest.fixture(scope="module")
def plan(folder):
    """The miniature plan; a test replaces what it is about."""
    questions = f"{folder}/questions.json"
    search = Search(questions, factors=(0.5, 2.0), fraction=0.5)
    scale = Scale(
        "mini", f"{folder}/mini.yaml", budgets=(5,), data=(questions,), search=search, seeds=2, scaling_budget=5
    )
    return Plan("table0", "Does it run?", scale, ROWS)


@pytest.fixture(scope="module")
def made(plan, tmp_path_factory):
    """The plan carried out once: (folder of all results, folder of work, the table)."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACFORMER_CACHE", str(root / "cache"))
        text = reproduce(plan, root / "results", root / "work", jobs=1, progress=False)
    return root / "results", root / "work", text


@pytest.fixture
def copied(made, tmp_path, monkeypatch):
    """A copy of the results to go on from; `trained` lists what is trained from here on."""
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made[0], tmp_path / "results")
    trained = []

    def spy(recipe, **kwargs):
        trained.append(recipe.name)
        return train(recipe, **kwargs)

    monkeypatch.setattr(execute, "train", spy)

    def go(plan, **kwargs):
        return reproduce(plan, tmp_path / "results", tmp_path / "work", **{"jobs": 1, "progress": False, **kwargs})

    go.trained, go.results = trained, tmp_path / "results"
    return go


def record_of(results, name, table="table0-mini"):
    return json.loads((results / table / "runs" / f"{name}.json").read_text())


def first_table(text: str) -> list[str]:
    """The rows' scores; tables by kind and of pairs follow it."""
    lines = text[text.index("| ---") :].splitlines()[1:]
    return lines[: next((place for place, line in enumerate(lines) if not line.startswith("|")), len(lines))]


@pytest.mark.lab
def test_a_plan_leaves_records_table_and_figure_and_no_weights(made, plan):
    results, work, text = made
    found = sorted(path.stem for path in (results / "table0-mini/runs").iterdir())
    assert found == ["acformer-T5-seed0", "acformer-T5-seed1", "mlp-T16-seed0", "mlp-T16-seed1"]
    record = record_of(results, "acformer-T5-seed1")
    assert (record["num_tokens"], record["seed"], record["connector"]) == (5, 1, "acformer")
    assert set(record["scores"][plan.scale.data[0]]["accuracy_by_kind"]) == {"colour", "shade"}
    assert record["num_parameters"] == sum(
        p.numel() for p in build_connector("acformer", GEOMETRY, **SMALL).parameters()
    )
    assert {"machine", "commit", "torch", "transformers", "seconds", "fingerprint"} <= set(record)
    assert "step_seconds" not in record
    steps = {path.stem: json.loads(path.read_text()) for path in (results / "table0-mini/steps").iterdir()}
    assert set(steps) == {"acformer-T5", "mlp-T16"}
    for name, timing in steps.items():
        (line,) = (line for line in first_table(text) if line.startswith(f"| `{name.partition('-')[0]}`"))
        assert f"| {timing['step_seconds']:.3g} s |" in line
        assert {"machine", "device", "commit", "fingerprint"} <= set(timing)
    assert (results / "table0-mini/table.md").read_text() == text
    assert all((results / f"table0-mini/figure.{suffix}").stat().st_size > 0 for suffix in ("png", "svg"))
    assert not list(work.rglob("*.safetensors"))
    assert len(list(work.rglob("predictions.jsonl"))) == 4


@pytest.mark.lab
def test_every_row_has_the_same_recipe_but_for_its_connector_and_chosen_rate(made):
    results = made[0]
    for name in ("acformer-T5", "mlp-T16"):
        record = record_of(results, f"{name}-seed0")
        losses = {float(factor): loss for factor, loss in record["losses_of_factors"].items()}
        assert set(losses) == {0.5, 2.0}
        assert record["factor"] == min(losses, key=losses.get)
        rates = record["recipe"]["finetune"]["learning_rates"]
        assert rates == {"connector": 0.01 * record["factor"], "language_model": 0.002}
    recipes = [record_of(results, f"{name}-seed0")["recipe"] for name in ("acformer-T5", "mlp-T16")]
    for recipe in recipes:
        del recipe["model"]["connector"], recipe["model"]["connector_kwargs"], recipe["name"], recipe["output_dir"]
        for stage in ("pretrain", "finetune"):
            del recipe[stage]["learning_rates"]
    assert recipes[0] == recipes[1]


@pytest.mark.lab
def test_what_is_done_is_not_done_again(copied, plan, made):
    assert copied(plan) == made[2]
    assert copied.trained == []


@pytest.mark.lab
def test_a_new_connector_adds_its_row_and_nothing_else(copied, plan, monkeypatch):
    for name in set(CONNECTORS) - {"acformer", "mlp"}:
        monkeypatch.delitem(CONNECTORS, name)
    monkeypatch.delitem(CONNECTORS.aliases, "random_pr")
    assert [row.name for row in every_connector()] == ["acformer", "mlp"]
    before = {path: path.stat().st_mtime_ns for path in copied.results.glob("*/*/*.json")}

    class MyConnector(MLPConnector):
        """Mine."""

    monkeypatch.setitem(CONNECTORS, "my_connector", MyConnector)
    text = copied(replace(plan, rows=every_connector(), scale=replace(plan.scale, seeds=1)))
    parts = {name.removeprefix("my_connector-T16") for name in copied.trained}
    assert parts == {"-x0.5", "-x2", "-seed0", ""}  # its trials, its run, its timing
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    lines = {line for line in first_table(text) if line.startswith("| `")}
    others = {line for line in lines if "my_connector" not in line}
    assert (len(lines), len(others)) == (3, 2)


@pytest.mark.lab
def test_more_seeds_of_chosen_rows_train_the_new_ones_alone(copied, plan):
    copied(replace(plan, scale=replace(plan.scale, seeds=3)), connectors=["mlp"])
    assert copied.trained == ["mlp-T16-seed2"]
    with pytest.raises(UsageError, match=r"unknown connector of table0 'mpl'; did you mean 'mlp'"):
        copied(plan, connectors=["mpl"])


@pytest.mark.lab
def test_fewer_seeds_show_all_that_there_are(copied, plan, made):
    fewer = replace(plan, scale=replace(plan.scale, seeds=1))
    assert copied(fewer, connectors=["mlp"]) == copied(fewer) == made[2]
    assert copied.trained == []
    runs = copied.results / "table0-mini/runs"
    (runs / "mlp-T16-seed5.json").write_text('{"fingerprint": "of another plan"}')
    assert copied(fewer) == made[2]
    (runs / "mlp-T16-seed1.json").rename(runs / "mlp-T16-seed1.gone")
    assert copied(fewer) != made[2]


@pytest.mark.lab
def test_steps_are_timed_one_row_after_the_other_when_all_runs_are_done(copied, plan, monkeypatch):
    stages = []

    def spy(tasks, jobs, bar):
        stages.append(([task.job.name for task in tasks], jobs))
        run_tasks(tasks, jobs, bar)

    monkeypatch.setattr(run_plan, "run_tasks", spy)
    shutil.rmtree(copied.results / "table0-mini/steps")
    copied(plan, jobs=2)
    assert stages == [([], 2), ([], 2), (["acformer-T5", "mlp-T16"], 1)]
    assert copied.trained == ["acformer-T5", "mlp-T16"]


@pytest.mark.lab
def test_a_timing_that_fails_is_told_and_its_row_stays(copied, plan, monkeypatch):
    def stopped(*_):
        raise RuntimeError("the clock stopped")

    shutil.rmtree(copied.results / "table0-mini/steps")
    monkeypatch.setattr(execute, "step_seconds", stopped)
    with pytest.raises(AcFormerError, match=r"2 runs failed.*steps/acformer-T5: RuntimeError: the clock stopped"):
        copied(replace(plan, fractions=(0.25,)))  # both shares have one timing
    text = (copied.results / "table0-mini/table.md").read_text()
    assert text.count("- steps/acformer-T5: RuntimeError: the clock stopped") == 1
    assert all(line.endswith(" M |  | 2 |") for line in first_table(text) if line.startswith("| `"))


def test_a_timing_is_of_the_step_alone(plan):
    def marks(scale, **changes):
        return [Timing(cell.runs[-1]).fingerprint for cell in cells_of(replace(plan, scale=scale, **changes))]

    search = replace(plan.scale.search, factors=(1.0,), limit=3)
    other = replace(plan.scale, seeds=3, limit=3, search=search, data=("elsewhere.json",))
    assert marks(other, fractions=(0.5,)) == marks(plan.scale) * 2
    assert not set(marks(replace(plan.scale, overrides=CHANGED))) & set(marks(plan.scale))
    assert len(set(marks(plan.scale))) == 2


@pytest.mark.lab
def test_another_table_takes_over_what_this_one_made(copied, plan):
    copied(replace(plan, name="table9"))
    assert copied.trained == []
    assert record_of(copied.results, "mlp-T16-seed0", "table9-mini") == record_of(copied.results, "mlp-T16-seed0")
    steps = [copied.results / table / "steps/mlp-T16.json" for table in ("table9-mini", "table0-mini")]
    assert steps[0].read_text() == steps[1].read_text()


@pytest.mark.lab
@pytest.mark.parametrize("text", [b"", b"[1]", b'{"fingerprint": []}', b"\xff\xfe"])
def test_other_files_beside_are_passed_over(copied, plan, text):
    (copied.results / "notes/mine").mkdir(parents=True)
    (copied.results / "notes/mine/a.json").write_bytes(text)
    copied(replace(plan, name="table9"))
    assert copied.trained == []


@pytest.mark.lab
@pytest.mark.parametrize("text", ['{"fingerprint": "12', "[1]"])
def test_a_broken_record_is_named(copied, plan, text):
    (copied.results / "table0-mini/runs/mlp-T16-seed1.json").write_text(text)
    with pytest.raises(DataError, match=r"mlp-T16-seed1\.json .*: move it away, and it is made again"):
        copied(plan)
    assert copied.trained == []


@pytest.mark.lab
def test_records_of_another_plan_are_refused(copied, plan):
    changed = replace(plan, scale=replace(plan.scale, limit=3))
    with pytest.raises(UsageError, match=r"acformer-T5-seed0.json was made by another plan"):
        copied(changed)


@pytest.mark.lab
def test_a_killed_plan_goes_on(copied, plan, monkeypatch):
    three, spy = replace(plan, scale=replace(plan.scale, seeds=3)), execute.train

    def stopped(recipe, **kwargs):
        if "mlp" in recipe.name:
            raise KeyboardInterrupt
        return spy(recipe, **kwargs)

    monkeypatch.setattr(execute, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        copied(three)
    assert copied.trained == ["acformer-T5-seed2"]
    assert "| 3 |" in (copied.results / "table0-mini/table.md").read_text()  # the table is of what there is
    monkeypatch.setattr(execute, "train", spy)
    copied(three)
    assert copied.trained == ["acformer-T5-seed2", "mlp-T16-seed2"]


class Broken(MLPConnector):
    """Cannot be run."""

    def aggregate(self, features, num_tokens):
        """Fail."""
        raise RuntimeError("out of\nideas")


@pytest.mark.lab
def test_a_failing_run_is_told_and_the_others_go_on(copied, plan, monkeypatch):
    monkeypatch.setitem(CONNECTORS, "broken", Broken)
    rows = (TableRow("broken", "broken"), TableRow("unheard", "perceiver", {"num_heads": "x"}), ROWS[1])
    more = replace(plan, rows=rows, scale=replace(plan.scale, seeds=3))
    with pytest.raises(AcFormerError, match=r"4 runs failed.*broken-T16-seed0: .*RuntimeError: out of ideas") as caught:
        copied(more)
    assert caught.value.exit_code == 1
    assert "mlp-T16-seed2" in copied.trained
    text = (copied.results / "table0-mini/table.md").read_text()
    assert "| `broken` |  | failed |" in text
    assert "- unheard at T = 5: option num_heads of connector 'perceiver'" in text
    monkeypatch.setattr(Broken, "aggregate", MLPConnector.aggregate)  # once mended, it is tried again
    copied(replace(plan, rows=rows[:1], scale=replace(plan.scale, seeds=1)))
    assert "failed" not in (copied.results / "table0-mini/table.md").read_text().lower()


@pytest.mark.lab
def test_fewer_samples_and_as_many_steps(copied, plan):
    copied(replace(plan, rows=ROWS[:1], fractions=(0.25,), scale=replace(plan.scale, seeds=1)))
    assert copied.trained == ["acformer-T5-0.25-seed0"]
    spec = record_of(copied.results, "acformer-T5-0.25-seed0")["recipe"]["finetune"]
    assert (spec["max_samples"], spec["training"]["max_steps"]) == (3, 4)
    assert "0.25 of the samples" in (copied.results / "table0-mini/table.md").read_text()


@pytest.mark.lab
def test_processes_share_the_work(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    search = replace(plan.scale.search, factors=(1.0,))  # one is no choice: no trials
    small = replace(plan, scale=replace(plan.scale, seeds=1, search=search))
    text = reproduce(small, tmp_path / "results", tmp_path / "work", jobs=2, progress=False)
    assert "failed" not in text.lower()
    made = sorted(path.parent.name for path in (tmp_path / "results").glob("*/*/*.json"))
    assert made == ["runs", "runs", "steps", "steps"]


@pytest.mark.slow
def test_a_worker_that_does_not_know_a_connector_says_so(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(CONNECTORS, "mine", MLPConnector)  # here alone, as in a script's `__main__`
    (cell,) = cells_of(replace(plan, rows=(TableRow("mine", "mine"),)))
    task = Task(cell.runs[0], tmp_path / "results", tmp_path / "work")
    with tqdm(total=1, disable=True) as bar:
        run_tasks([task], 2, bar)
    error = json.loads(job_path(task.results, task.job).read_text())["error"]
    assert "connector 'mine' is unknown in the worker process" in error
    assert "entry point, register it in an importable module, or take --jobs 1" in error


@dataclass(frozen=True)
class Job:
    name: str = "dies"
    cost: float = 1.0


@dataclass(frozen=True)
class Dying:
    """A task whose process is killed, as when memory runs out."""

    path: Path
    job: Job = Job()

    def __call__(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(self, reason):
        self.path.write_text(reason)


@dataclass(frozen=True)
class Closing:
    """A task whose process shuts its end of the sentinel well before it is gone, as large ones do."""

    job: Job = Job("closes")

    def __call__(self):
        os.closerange(3, 64)
        time.sleep(0.5)
        os._exit(0)


@pytest.mark.slow
def test_a_process_on_its_way_out_is_waited_for_not_asked_again_and_again(monkeypatch):
    drawn = []
    with tqdm(total=1, disable=True) as bar:
        monkeypatch.setattr(bar, "set_postfix_str", drawn.append)
        run_tasks([Closing()], 2, bar)
    assert drawn == ["closes"]


@pytest.mark.slow
def test_a_process_that_dies_is_a_failed_run(tmp_path):
    with tqdm(total=1, disable=True) as bar:
        run_tasks([Dying(tmp_path / "why")], 2, bar)
    assert (tmp_path / "why").read_text().startswith("its process ended with code -9")


@dataclass(frozen=True)
class Sleeping:
    """A task that would take a minute."""

    job: Job = Job("sleeps")

    def __call__(self):
        time.sleep(60)


def test_a_stop_ends_the_processes_too():
    def interrupted(signum, frame):
        raise KeyboardInterrupt(signum)

    before = signal.signal(signal.SIGALRM, interrupted)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    with pytest.raises(KeyboardInterrupt), tqdm(total=2, disable=True) as bar:
        run_tasks([Sleeping(), Sleeping()], 2, bar)
    signal.signal(signal.SIGALRM, before)
    assert multiprocessing.active_children() == []


def test_variants_change_one_thing(folder):
    recipe = load_recipe(f"{folder}/mini.yaml", ["pretrain.training={num_train_epochs: 2}", "finetune.max_samples=8"])
    faster = with_factor(recipe, 3.0)
    assert faster.finetune.learning_rates == pytest.approx({"connector": 0.03, "language_model": 0.002})
    assert shortened(recipe, 0.5).pretrain.training["num_train_epochs"] == 1
    assert shortened(recipe, 0.5).finetune.training["max_steps"] == 2
    assert shortened(recipe, 0.01).finetune.training["max_steps"] == 1
    fewer = with_fraction(recipe, 0.5)
    assert (fewer.pretrain.max_samples, fewer.pretrain.training["num_train_epochs"]) == (6, 4)
    assert (fewer.finetune.max_samples, fewer.finetune.training["max_steps"]) == (4, 4)
    assert with_fraction(recipe, 1.0) == recipe
    assert asdict(recipe) == asdict(
        load_recipe(f"{folder}/mini.yaml", ["pretrain.training={num_train_epochs: 2}", "finetune.max_samples=8"])
    )


def test_the_loss_of_a_trial_does_not_depend_on_the_batches(folder, monkeypatch, tmp_path):
    from acformer.evaluate.report import evaluation_samples

    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(f"{folder}/mini.yaml", ["cache_features=false"])
    parts = build_model(**asdict(recipe.model), texts=["Which colour? red green blue"])
    samples = evaluation_samples(f"{folder}/questions.json")
    losses = []
    for size in (1, 5, 12):
        recipe.finetune.training["per_device_train_batch_size"] = size
        losses.append(answer_loss(parts, recipe, samples))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)  # float32: padding changes the order of sums, 3e-7 seen
    uniform = math.log(parts[0].config.text_config.vocab_size)
    assert losses[0] == pytest.approx(uniform, rel=0.1)  # an untrained model guesses


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (60, 2.000)])
def test_students_t_is_the_books(freedom, expected):
    assert student_t(freedom) == pytest.approx(expected, abs=5e-4)  # to the digits that books give


def test_a_missing_scipy_is_told_before_anything_is_trained(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UsageError, match=r"need scipy .*: pip install 'acformer\[lab\]'"):
        reproduce(plan, tmp_path / "results", tmp_path / "work", progress=False)
    assert not (tmp_path / "results").exists()


def test_mean_and_interval_by_hand():
    mean, half = mean_interval([0.1, 0.2, 0.3])
    assert (mean, half) == pytest.approx((0.2, 4.303 * 0.1 / math.sqrt(3)), rel=1e-4)
    assert math.isnan(mean_interval([0.5])[1])


WHERE = {"device": "cpu", "machine": "here", "torch": "2", "transformers": "5", "commit": "abc"}


def record(accuracy, blind=0.4, **more):
    families = {"exist": (accuracy, 0.5), "read": (accuracy - 0.1, blind - 0.1), "average": (accuracy - 0.05, blind)}
    scores = {
        name: {"score": score, "interval": [score - 0.02, score + 0.02], "blind": blindly}
        for name, (score, blindly) in families.items()
    }
    values = {"num_tokens": 33, "num_parameters": 2e6, "fraction": 1.0}
    search = {"factor": 1.0, "losses_of_factors": {"0.3": 2.0, "1.0": 1.0, "3.0": None}}
    return {
        "scores": {"d": {"average": scores.pop("average"), "families": scores}},
        **values,
        **search,
        **WHERE,
        **more,
    }


def measured(name, accuracies, fraction=1.0, step=0.2, **more):
    timing = {"step_seconds": step, **WHERE} if step else None
    return Measured(name, 33, fraction, [record(accuracy, **more) for accuracy in accuracies], timing=timing)


@pytest.fixture
def page():
    """A plan to make pages of."""
    return Plan("table3", "Which?", Scale("cpu", "r", (33,), ("d",), Search("v")), ROWS, fractions=(0.5,))


def test_a_table_shows_means_intervals_and_what_did_not_learn(page, tmp_path):
    cells = [
        measured("perceiver", [0.45, 0.55, 0.65], factor=0.3),  # 50.0 on average, far from sure that it is above 40
        measured("acformer", [0.84, 0.85, 0.86]),
        measured("mlp", [0.91], factor=3.0, step=None),
        Measured("pooling", 33, 1.0),
        Measured("e_vit", 33, 1.0, errors=["e_vit-T33-seed0: DivergedError: loss is nan"]),
        measured("acformer", [0.6, 0.7], fraction=0.5),
    ]
    text = table_text(page, cells)
    table = [line for line in text.split("### 0.5")[0].splitlines() if line.startswith("|")]
    assert table == [
        "| connector | T | average | exist | read | rate | weights | step | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `mlp` | 33 | 86.0 | 91.0 | 81.0 | >3 | 2.0 M |  | 1 |",
        "| `acformer` | 33 | 80.0 ± 2.5 | 85.0 ± 2.5 | 75.0 ± 2.5 | 1 | 2.0 M | 0.2 s | 3 |",
        "| `perceiver` | 33 | did not learn (50.0 ± 24.8) |  |  | <0.3 | 2.0 M | 0.2 s | 3 |",
        "| `e_vit` |  | failed |  |  |  |  |  |  |",
        "| *blind* |  | 40.0 | 50.0 | 30.0 |  |  |  |  |",
    ]
    assert "\nNot measured: `pooling`.\n" in text.split("### 0.5")[0]
    assert "`mlp` over all tokens: 86.0 (aim 85); blind: 40.0 (aim under 40)." in text
    assert "- e_vit-T33-seed0: DivergedError: loss is nan" in text
    assert "0.5 of the samples" in text
    plot_scores.plot_scores(page, cells, tmp_path / "figure")
    svg = (tmp_path / "figure.svg").read_text()
    plot_scores.plot_scores(page, cells, tmp_path / "figure")
    assert (tmp_path / "figure.svg").read_text() == svg


def with_kinds(name, values):
    """Rows with seeds and kinds: {seed: (accuracy, of one kind, of another)}."""
    cell = measured(name, [])
    for seed, (accuracy, near, far) in values.items():
        made = record(accuracy, seed=seed)
        made["scores"]["d"]["accuracy_by_kind"] = {"far": far, "near": near}
        cell.records.append(made)
    return cell


def test_rows_are_compared_seed_by_seed_and_by_kind(page):
    base = with_kinds("acformer", {0: (0.80, 0.7, 0.5), 1: (0.84, 0.8, 0.5), 2: (0.82, 0.9, 0.5)})
    other = with_kinds("mlp", {1: (0.86, 0.8, 0.6), 2: (0.83, 0.9, 0.4), 0: (0.83, 0.7, 0.5), 7: (0.1, 0, 0)})
    assert pairs.common_seeds(other, base) == [0, 1, 2]
    found = pairs.difference(other, base, "d")
    assert found.values == pytest.approx([0.03, 0.02, 0.01])
    half = 4.303 * 0.01 / math.sqrt(3)
    assert (found.mean, found.half) == pytest.approx((0.02, half), rel=1e-3)
    assert found.p == pytest.approx(0.0742, abs=1e-4)  # t = 2 sqrt(3), 2 degrees of freedom
    text = table_text(page, [base, other])
    (line,) = (line for line in text.splitlines() if line.startswith("| `mlp` | +2.0"))
    assert line == "| `mlp` | +2.0 ± 2.5 | 0.074 | +3.0, +2.0, +1.0 | +0.0 ± 24.8 | +0.0 ± 0.0 |"
    assert "| less `acformer` | average | p | seed by seed | far | near |" in text
    assert "| `acformer` | 50.0 ± 0.0 | 80.0 ± 24.8 |" in text, "accuracy by kind"


def test_without_a_pair_there_is_no_comparison(page):
    alone = with_kinds("acformer", {0: (0.8, 0.7, 0.5)})
    assert pairs.pairs_table([alone, with_kinds("mlp", {1: (0.8, 0.7, 0.5)})], "acformer", "d") == ""
    assert pairs.pairs_table([alone], "acformer", "d") == ""
    once = pairs.pairs_table([alone, with_kinds("mlp", {0: (0.9, 0.7, 0.5)})], "acformer", "d")
    assert "| `mlp` | +10.0 |  | +10.0 | +0.0 | +0.0 |" in once, "of one seed neither interval nor p"
    assert math.isnan(pairs.paired_p([0.1, 0.1, 0.1]))


def test_rows_that_were_not_timed_are_left_out_of_the_first_panel(page, tmp_path, monkeypatch):
    panels = []

    def spy(axes, names, cells, data, along):
        panels.append([(cell.name, along(cell)) for cell in cells])

    monkeypatch.setattr(plot_scores, "_lines", spy)
    cells = [measured("mlp", [0.9], step=None), measured("acformer", [0.8], step=0.3)]
    plot_scores.plot_scores(page, cells, tmp_path / "figure")
    assert panels == [[("acformer", 0.3)], [("mlp", 1.0), ("acformer", 1.0)]]


def test_a_table_whose_measure_did_not_learn_does_not_count(page):
    assert "This table does not count" in table_text(page, [measured("mlp", [0.45, 0.46])])
    assert "is not known" in table_text(page, [measured("acformer", [0.8])])


@pytest.mark.lab
def test_a_changed_recipe_is_another_table(copied, plan):
    changed = replace(plan, name="longer", table="table0", scale=replace(plan.scale, overrides=CHANGED))
    assert copied(changed, connectors=["mlp"]) != copied(plan)
    record = record_of(copied.results, "mlp-T16-seed0", "longer-mini")
    assert record["recipe"]["finetune"]["training"]["max_steps"] == 6
    text = (copied.results / "longer-mini/table.md").read_text()
    assert f"`acformer reproduce table0 {CHANGED[0]} --scale mini --name longer`" in text
    assert "Not measured: `acformer`." in text


@pytest.mark.parametrize("name", [None, "table3", "table4"])
def test_a_changed_recipe_needs_a_name_of_its_own(name):
    with pytest.raises(UsageError, match="--name"):
        plan_for("table3", "cpu", overrides=CHANGED, name=name)


@pytest.mark.parametrize(
    "idle",
    ["seed=7", "output_dir=x", "resume=false", "name=abc", "model.connector_kwargs.num_anchors=9", CHANGED[0]],
)
def test_an_override_that_changes_no_run_is_refused(plan, tmp_path, idle):
    """Alone or beside one that does."""
    for overrides in ((*CHANGED, idle), (idle, "finetune.training.max_steps=4")):
        changed = replace(plan, name="longer", table="table0", scale=replace(plan.scale, overrides=overrides))
        with pytest.raises(UsageError, match="changes no run of longer"):
            reproduce(changed, tmp_path / "results", tmp_path / "work", progress=False)
    assert not (tmp_path / "results").exists()


def test_overrides_that_need_one_another_both_count(plan):
    def refuse(*overrides):
        changed = replace(plan, scale=replace(plan.scale, overrides=overrides))
        refuse_idle_overrides(changed, cells_of(changed))

    pair = "cache_features=false", "finetune.learning_rates.vision_tower=1.0e-5"
    refuse(*pair)
    with pytest.raises(UsageError, match=r"^seed=3 changes no run"):
        refuse(*pair, "seed=3")


@pytest.mark.parametrize("override", ["model.connector=mlp", " model.connector = mlp"])
def test_the_connector_is_the_tables_to_set(override):
    with pytest.raises(UsageError, match="--connectors"):
        plan_for("table3", "cpu", overrides=[override], name="mine")


def test_a_name_alone_is_the_same_plan_elsewhere():
    mine = plan_for("table3", "cpu", name="mine")
    assert (mine.folder, mine.command) == ("mine-cpu", "acformer reproduce table3 --scale cpu --name mine")
    assert plan_for("table3", "cpu", name="table3") == plan_for("table3", "cpu")


def test_the_factors_that_every_row_tries_are_the_callers():
    plan = plan_for("table3", "cpu", factors=[3, 0.03, 3], name="wider")
    assert plan.scale.search.factors == (0.03, 3)
    assert plan.command == "acformer reproduce table3 --scale cpu --name wider --factors 0.03 3"
    one = plan_for("successor", "cpu", factors=[0.3], name="unsearched")
    assert not cells_of(one)[0].runs[0].trials
    assert "learning rate is 0.3 times the recipe's in every row, without a search." in table_text(one, [])


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_factor_that_is_no_factor_is_refused(factor):
    with pytest.raises(UsageError, match=f"not multiplied by {factor:g}: --factors are numbers above 0"):
        plan_for("table3", "cpu", factors=[0.3, factor], name="mine")


def test_another_search_needs_a_name():
    with pytest.raises(UsageError, match="a changed search makes another table than table3"):
        plan_for("table3", "cpu", factors=[0.3])


def test_tables_come_from_the_registries():
    from acformer.anchors.selectors import SELECTORS

    assert [row.name for row in plan_for("table3", "cpu").rows] == sorted([*list_connectors(), "random_pr"])
    rows = plan_for("table4", "gpu", seeds=5)
    assert rows.scale.seeds == 5
    for connector, other in (("acformer", {"random"}), ("direct", set())):  # acformer-random is random_pr
        options = [row.options for row in rows.rows if row.connector == connector]
        selected = {chosen["selector"] for chosen in options if "selector" in chosen}
        assert selected | other == {*SELECTORS, *SELECTORS.aliases}
    assert "random_pr" in [row.name for row in rows.rows]
    assert "acformer-stochastic" in [row.name for row in rows.rows]
    rows = [row for table in TABLES.values() for row in table.rows()]
    assert {CONNECTORS.resolve(row.connector).name for row in rows} <= set(CONNECTORS)
    assert chosen_rows(plan_for("table3", "cpu"), ["top_p"]) == (TableRow("direct", "direct"),)


RECORDED = ("table3", "table4", "figure1")
LATER = {"acformer_v2"}
"""Connectors that are younger than the records: they need not have a row there."""
LATER_SELECTORS = {"spaced"}


@pytest.mark.parametrize("table", RECORDED)
def test_records_of_connectors_by_their_former_names_are_recognised(table, monkeypatch):
    """All that `results/` holds of the tables: nothing is trained again because it is called otherwise now."""
    monkeypatch.setattr(runs, "geometry_of", lambda model: Geometry(384, 64, (12, 12), 1))
    records = Path(__file__).parents[1].glob("results/*-cpu/*/*.json")
    known = {json.loads(path.read_text())["fingerprint"] for path in records}
    cells = [
        cell
        for cell in cells_of(plan_for(table, "cpu"))
        if cell.row.connector not in LATER and cell.row.options.get("selector") not in LATER_SELECTORS
    ]
    made = [run for cell in cells for run in cell.runs]
    assert len(made) > 40
    assert [job.name for run in made for job in (run, Timing(run), *run.trials) if job.fingerprint not in known] == []


def test_records_of_the_first_hard_runs_are_recognised(monkeypatch):
    """They had a third of the scale's steps, and say so: no row of the scale itself takes them for its own.

    Their trials were of a tenth of the steps, which is a fifth now.
    """
    monkeypatch.setattr(runs, "geometry_of", lambda model: Geometry(384, 64, (16, 16), 1))
    short = "finetune.training.max_steps=1500"
    made = {
        json.loads(path.read_text())["fingerprint"]
        for path in (Path(__file__).parents[1] / "results/hard-short-cpu-hard").glob("*/*.json")
    }
    assert made
    for overrides, name, known in (((short,), "hard-short", True), ((), None, False)):
        plan = plan_for("successor", "cpu-hard", overrides=overrides, name=name)
        search = replace(plan.scale.search, fraction=0.1)
        marks = all_marks(replace(plan, scale=replace(plan.scale, search=search)))
        assert (made <= marks) == known


@pytest.mark.parametrize(
    ("folder", "side", "overrides", "factors"),
    [
        ("successor-cpu", 12, (), None),
        ("longer-successor-cpu", 12, ("finetune.training.max_steps=4500",), None),
        ("successor-cpu-hard", 16, (), None),
        ("successor-cpu-smollm2", 12, (), None),
        ("more-scenes-cpu-hard", 16, ("finetune.max_samples=16000",), None),
        (
            "longer-more-scenes-cpu-hard",
            16,
            ("finetune.max_samples=16000", "finetune.training.max_steps=13500"),
            (0.3,),
        ),
        ("successor-cpu-smollm2-hard", 16, (), None),
        ("more-tokens-cpu-hard", 16, ("finetune.max_samples=16000",), (0.3,)),
        ("attends-cpu-hard", 16, ("finetune.max_samples=16000", "model.text=scene-probe-attends"), (0.3,)),
    ],
)
def test_records_of_the_successor_are_the_plans(monkeypatch, folder, side, overrides, factors):
    """Its default has changed since: the records are of the rows that say what it was."""
    monkeypatch.setattr(runs, "geometry_of", lambda model: Geometry(384, 64, (side, side), 1))
    name, _, scale = folder.partition("-cpu")
    plan = plan_for("successor", f"cpu{scale}", overrides=overrides, factors=factors, name=name)
    paths = [*(Path(__file__).parents[1] / "results" / folder).glob("*/*.json")]
    made = {job_name(path): json.loads(path.read_text())["fingerprint"] for path in paths}
    jobs = {job_name(job_path(Path(), job)): job.fingerprint for job in all_jobs(plan, seeds=5)}
    assert made
    assert made.items() <= jobs.items()


def test_records_of_the_elastic_example_are_its_recipes(monkeypatch):
    """They name options that are gone, and what was the default."""
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(root / "examples"))
    import elastic

    monkeypatch.setattr(elastic, "geometry_of", lambda model: Geometry(384, 64, (16, 16), 1))
    for tokens in (9, 17, 65):
        made = elastic.record(
            root / f"results/elastic/runs/T{tokens}-seed0.json", elastic.recipe_for(0, tokens, None), []
        )
        assert made["scores"].keys() == {str(tokens)}
    elastic.record(root / "results/elastic/runs/elastic-9-17-65-seed0.json", elastic.recipe_for(0, 65, [9, 65]), [])
    with pytest.raises(SystemExit, match="another recipe"):
        elastic.record(root / "results/elastic/runs/T9-seed0.json", elastic.recipe_for(1, 9, None), [])


def job_name(path):
    return f"{path.parent.name}/{path.stem}"


def all_jobs(plan, seeds=1):
    first = [run for cell in cells_of(plan) for run in cell.runs[:1]]
    every = [run.with_seed(seed) for run in first for seed in range(seeds)]
    return [job for run in every for job in (run, Timing(run), *run.trials)]


def all_marks(plan):
    """Fingerprints of every job of a plan."""
    return {job.fingerprint for job in all_jobs(plan, plan.scale.seeds)}


def test_rows_of_another_table_are_those_runs(monkeypatch):
    """The rivals of `successor` at the old scale are table 3's: the same fingerprints, so they are taken over."""
    monkeypatch.setattr(runs, "geometry_of", lambda model: Geometry(384, 64, (12, 12), 1))
    marks = [
        {cell.row.name: [run.fingerprint for run in cell.runs] for cell in cells_of(plan_for(table, "cpu"))}
        for table in ("table3", "successor")
    ]
    shared = marks[0].keys() & marks[1].keys() - LATER
    assert {"acformer", "c_abstractor", "mlp"} <= shared
    assert all(marks[0][name] == marks[1][name] for name in shared)


def test_a_row_may_take_over_the_search_of_another(plan, tmp_path):
    """Its trials are the other row's, which are made once; its own fingerprint says so."""
    mine = TableRow("mine", "acformer", {"selector": "norm"}, rate_of="acformer")
    first, second = cells_of(replace(plan, rows=(ROWS[0], mine)))
    assert [trial.name for trial in second.runs[1].trials] == ["acformer-T5-x0.5", "acformer-T5-x2"]
    assert [t.fingerprint for t in second.runs[1].trials] == [t.fingerprint for t in first.runs[0].trials]
    (own,) = cells_of(replace(plan, rows=(replace(mine, rate_of=""),)))
    assert own.runs[0].trials[0].name == "mine-T5-x0.5"
    assert own.runs[0].fingerprint != second.runs[0].fingerprint
    (lost,) = cells_of(replace(plan, rows=(replace(mine, rate_of="acfomer"),)))
    assert "did you mean 'acformer'" in lost.error


def test_a_table_says_which_of_the_rows_that_were_run_were_not_searched_for(page):
    plan, tables = replace(page, rows=plan_for("successor", "cpu").rows), []
    for rows in (["acformer", "acformer_v2"], ["acformer", "mlp"]):
        tables.append(table_text(plan, [measured(row, [0.8]) for row in rows]))
    assert "(without a search, at that of `acformer`: `acformer_v2`)" in tables[0]
    assert "without a search" not in tables[1]


def test_a_row_is_chosen_by_its_name_before_its_connectors():
    plan = plan_for("successor", "cpu-hard")
    assert [row.name for row in chosen_rows(plan, ["acformer_v2", "mlp"])] == ["mlp", "acformer_v2"]
    assert [row.name for row in chosen_rows(plan, ["acformer+talk"])] == ["acformer+talk"]
    table4 = [row.name for row in chosen_rows(plan_for("table4", "cpu"), ["direct"])]
    assert len(table4) > 3
    assert all(name.startswith("direct-") for name in table4)


def test_only_budgets_of_the_scale(plan, tmp_path):
    with pytest.raises(UsageError, match=r"scale 'mini' is at T = \[5\], not 6"):
        reproduce(plan, tmp_path, budgets=[5, 6])


@pytest.mark.parametrize("scale", tiny.mostly_slow(SCALES, "cpu", "cpu-hard"))
@pytest.mark.parametrize("table", TABLES)
def test_every_row_can_be_built_at_every_budget(table, scale):
    """DINOv2-S/14 at 168 and at 336 pixels, as the scales' recipes have it."""
    model = ModelSpec("vision", "text", connector_kwargs={"num_anchors": 16, "depth": 2})
    scale = SCALES[scale]
    side = 24 if scale.name == "gpu" else 12
    geometry = Geometry(384, 64, (side, side), 1)
    for budget in scale.budgets:
        for row in TABLES[table].rows():
            options = row_options(row, model, scale.sizes, geometry, budget)
            with torch.device("meta"):
                connector = build_connector(row.connector, geometry, **options)
            # Grids of whole blocks come as near as they can: 36 for 33, 64 for 65 or 16 for 17.
            full = side * side
            assert connector.num_tokens in {full, full + 1} or abs(connector.num_tokens - budget) <= max(3, budget / 8)
            json.dumps(options)


def test_stacks_take_the_recipes_sizes_and_others_their_own():
    model = ModelSpec("vision", "text", connector_kwargs={"num_anchors": 16, "depth": 2})
    geometry = Geometry(384, 64, (16, 16), 1)
    sizes = {"q_former": {"depth": 3}}
    options = {name: row_options(TableRow(name, name), model, sizes, geometry, 33) for name in CONNECTORS}
    assert options["acformer"] == {"num_anchors": 32, "depth": 2}
    assert options["perceiver"] == {"num_queries": 33, "depth": 2}
    assert options["q_former"] == {"num_queries": 33, "depth": 3}
    assert "depth" not in options["c_abstractor"]  # another thing of the same name
    assert options["mlp"] == {}


def test_a_gpu_scale_needs_one(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(UsageError, match="scale 'gpu' is for a GPU"):
        reproduce(plan_for("table3", "gpu"), tmp_path)
