"""A run's folder: whose run is in it, what of it is done, what a checkpoint was trained on, whether there is room."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from acformer.data.records import Samples, as_samples
from acformer.data.samples import Sample
from acformer.errors import CheckpointError, UsageError, translated
from acformer.files import only_process, write_text
from acformer.hf import AcFormerForConditionalGeneration
from acformer.hf.checkpoints import verify_folder
from acformer.training.recipe import STAGES, Recipe, StageSpec, load_recipe
from acformer.training.strict_yaml import parse_yaml
from acformer.training.trainer import module_parameters

RECIPE = "recipe.yaml"
TRAINED_ON = "trained_on.json"
"""In a checkpoint: what a run that goes on from it must have too."""
PROCESSES = "processes.json"
"""In a run's folder: how many processes have run each stage."""
KNOWN = ("samples", "num_samples", "num_processes")
"""What every checkpoint has written down."""
ROWS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
"""How one process shares a step among its passes, and the defaults."""
SHARING = ("fsdp", "fsdp_config", "deepspeed", "ddp_backend", "ddp_bucket_cap_mb", "ddp_timeout")
"""Settings that share weights and work among processes, and change nothing in what is computed."""


def is_first_process() -> bool:
    """Whether this process writes what is written once in a distributed run (torchrun and accelerate set RANK)."""
    return os.environ.get("RANK", "0") == "0"


def num_processes() -> int:
    """Of a distributed run; 1 for any other. Asked for before there is a process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """The folder is this run's alone; `UsageError` where another run is at work in it."""
    with ExitStack() as stack:
        if is_first_process():  # all processes of a distributed run are one run
            busy = f"another run is at work in {folder}; wait for its end, or choose output_dir=..."
            try:
                stack.enter_context(only_process(folder / ".lock"))
            except BlockingIOError as error:
                raise UsageError(busy) from error
        yield


def is_done(recipe: Recipe, stage: str) -> bool:
    """The stage's model is there, whole."""
    folder = recipe.output / stage / "model"
    return recipe.resume and folder.exists() and verify_folder(folder) is None


def check_same_run(recipe: Recipe) -> None:
    """`UsageError` if the folder belongs to another recipe, or to a user: two runs would be mixed, a file lost.

    The section of a stage that has left nothing yet may change: a mistake in stage 2 does not cost stage 1.
    """
    record = recipe.output / RECIPE
    if not record.exists():
        return
    if not _is_record(record):
        raise UsageError(f"{record} is not a record of a run, which would be written over it; choose output_dir=...")
    begun = [stage for stage in STAGES if _work_of(recipe, [stage])]
    if not (recipe.resume and begun):
        return
    ours = _settings_until(recipe, begun[-1], dict.fromkeys(STAGES, num_processes()))
    theirs: dict[str, Any] = {}
    with suppress(UsageError):  # a record that another version has written may not be a recipe of ours
        processes = {**dict.fromkeys(STAGES, num_processes()), **_processes(recipe.output)}
        theirs = _settings_until(load_recipe(str(record)), begun[-1], processes)
    differing = [key for key in ours if key not in theirs or ours[key] != theirs[key]]
    if differing:
        keeping = "stage=finetune " if differing == ["finetune"] else ""
        raise UsageError(
            f"{recipe.output} holds a run of another recipe ({record}; not the same: {', '.join(differing)}); choose "
            f"output_dir=..., or {keeping}resume=false to write over it"
        )


def claim(recipe: Recipe, stage: str) -> None:
    """Write the recipe down, once all it names was found; with `resume: false` this and later stages start anew."""
    if not is_first_process():
        return
    if not recipe.resume:
        for path in _work_of(recipe, STAGES[STAGES.index(stage) :]):
            shutil.rmtree(path)
    recipe.output.mkdir(parents=True, exist_ok=True)
    write_text(recipe.output / RECIPE, replace(recipe, stage="all", resume=True).to_yaml())
    processes = {**_processes(recipe.output), stage: num_processes()}
    write_text(recipe.output / PROCESSES, json.dumps(processes))


def _is_record(path: Path) -> bool:
    """Whether a run has written this recipe: it then spells out every key, which nobody does by hand."""
    values = None
    with suppress(UsageError, UnicodeDecodeError):
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    own = {"name", "model", "pretrain", "finetune", "stage", "seed", "output_dir", "cache_features", "resume"}
    return isinstance(values, dict) and own <= values.keys()


def _work_of(recipe: Recipe, stages: Iterable[str]) -> list[Path]:
    """Checkpoints and models that the stages have left in the output folder."""
    names = ("checkpoint-*", "model", "base")
    return [path for stage in stages for name in names for path in (recipe.output / stage).glob(name)]


def samples_a_step(training: Mapping[str, Any], num_processes: int) -> int:
    """Rows of an optimizer step, over all its passes and processes (a row may be a group of samples)."""
    return math.prod(training.get(key, default) for key, default in ROWS.items()) * num_processes


def _processes(folder: Path) -> dict[str, int]:
    """How many processes have run each stage, as far as it is written down."""
    path = folder / PROCESSES
    with suppress(OSError, ValueError):
        return {stage: int(count) for stage, count in json.loads(path.read_text(encoding="utf-8")).items()}
    return {}


def _settings_until(recipe: Recipe, last: str, processes: Mapping[str, int]) -> dict[str, Any]:
    """What of a recipe the stages up to `last` rest on. How a step is shared among processes is not part of it."""
    values = asdict(replace(recipe, stage="all", resume=True))
    for stage in STAGES[: STAGES.index(last) + 1]:
        if values[stage] is not None:
            training = values[stage]["training"]
            rows = samples_a_step(training, processes[stage])
            kept = {key: value for key, value in training.items() if key not in (*ROWS, *SHARING)}
            values[stage]["training"] = {**kept, "samples_a_step": rows}
    has_new_tokenizer = isinstance(recipe.model.text, dict) and recipe.from_model is None
    for stage in STAGES[STAGES.index(last) + 1 :]:
        spec = values.pop(stage) or {}
        if has_new_tokenizer:  # it has learnt from the data of all stages
            values[f"{stage}.data"] = spec.get("data"), spec.get("image_root")
    return values


def trained_on(samples: Samples | Sequence[Sample], num_processes: int) -> dict[str, Any]:
    """What decides which samples a step has, beside the recipe: their content and order, and the processes."""
    samples = as_samples(samples)
    return {"samples": samples.fingerprint(), "num_samples": len(samples), "num_processes": num_processes}


def check_trained_on(checkpoint: Path, now: Mapping[str, Any], data: str) -> None:
    """`UsageError` where the run would go on with other samples, or another order of them, than it began with."""
    path = checkpoint / TRAINED_ON
    if not path.exists():  # of a version that did not write it down
        return
    with translated(f"cannot go on from {checkpoint}", CheckpointError):
        found = json.loads(path.read_text(encoding="utf-8"))
        then = {"samples_a_step": found.get("samples_a_step"), **{key: found[key] for key in now if key in KNOWN}}
    remedy = "or start the stage anew with resume=false"
    other_processes = then["num_processes"] != now["num_processes"]
    if other_processes and then["samples_a_step"] != now["samples_a_step"]:
        raise UsageError(
            f"{checkpoint} is of a run with {then['num_processes']} processes and {then['samples_a_step']} samples a "
            f"step, and this one has {now['num_processes']} and {now['samples_a_step']}: start as many, change "
            f"per_device_train_batch_size or gradient_accumulation_steps, {remedy}"
        )
    if then["samples"] != now["samples"]:
        raise UsageError(
            f"{checkpoint} was trained on other data than {data} is now ({then['num_samples']} samples then, "
            f"{now['num_samples']} now): restore it, {remedy}"
        )


def check_room(folder: Path, model: AcFormerForConditionalGeneration, stages: Mapping[str, StageSpec]) -> None:
    """`CheckpointError` where the disk has not even room for each stage's model, and one of its checkpoints."""
    whole = sum(parameter.nbytes for parameter in model.parameters())
    needed = 0
    for spec in stages.values():
        modules = set(spec.learning_rates) - ({"language_model"} if spec.lora else set())  # adapters are small
        trained = sum(p.nbytes for name in modules for p in module_parameters(model)[name])
        weights = trained if spec.lora or spec.save == "connector" else whole
        needed += weights
        if spec.training.get("save_strategy", "no") != "no":
            needed += weights + 2 * trained  # AdamW's two averages
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"no room in {folder}: the run writes at least {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
        )
