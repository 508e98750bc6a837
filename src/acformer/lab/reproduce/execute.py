"""A run made: the learning rate looked up, the recipe trained, the questions answered, the record written.

Three kinds of work: a trial (few steps, the loss on held-out data), a run (all steps, all scores) and a timing (the
seconds of a step). Each holds a lock while it works, so that what a killed command left running is waited for and not
done twice.
"""

import logging
import math
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acformer.connectors import CONNECTORS, complete_options
from acformer.data.collate import Collator, ConversationDataset
from acformer.data.conversation import IGNORE
from acformer.data.records import Samples
from acformer.data.samples import Sample
from acformer.errors import DataError, DivergedError, UsageError
from acformer.evaluate.generate import to_device
from acformer.evaluate.report import as_reply, evaluate, evaluation_samples
from acformer.files import locked
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.hf.build import parse_device
from acformer.hf.checkpoints import load_model
from acformer.lab.reproduce.plans import PROBES, Scale
from acformer.lab.reproduce.probe_pretraining import pretrained_by_probe, probe_recipe, probe_words, text_width
from acformer.lab.reproduce.records import read_record, write_record
from acformer.lab.reproduce.runs import Job, Run, Timing, Trial, job_path, job_record
from acformer.lab.reproduce.train_probe import WIDTH, probe_loss, probe_scores, train_probe, with_prior
from acformer.lab.reproduce.variants import shortened, with_factor, with_fraction, with_steps
from acformer.lab.training_step import autocast, training_step
from acformer.provenance import device_name, machine
from acformer.training.arguments import training_arguments
from acformer.training.lean import lean
from acformer.training.learner import as_it_learns, cast_frozen, half_precision
from acformer.training.recipe import Recipe, StageSpec
from acformer.training.stages import cached_features, stage_samples, train
from acformer.training.trainer import module_parameters

Parts = tuple[AcFormerForConditionalGeneration, AcFormerProcessor]
WARM_UP_STEPS, TIMED_STEPS = 5, 25


@dataclass(frozen=True)
class Task:
    """A job, and where: `results` is the folder of the table, `work` where models lie meanwhile."""

    job: Job
    results: Path
    work: Path
    keep_models: bool = False

    def __call__(self) -> None:
        """Do it, unless it is done; what goes wrong is the record then."""
        try:
            _refuse_unknown(self.job)
            folder = self.work / f"{self.job.name}-{self.job.fingerprint}"
            with locked(self.work / f"{folder.name}.lock"), _logged(folder / "log.txt"):
                if job_record(self.results, self.job) is None:
                    self.do(folder)
        except Exception as error:  # one row must not end the table; the log has the traceback
            self.fail(f"{type(error).__name__}: {error}")

    def do(self, folder: Path) -> None:
        """Do it in this folder."""
        match self.job:
            case Run():
                record = _measure(self, self.job, folder)
            case Trial():
                record = _try(self, self.job, folder)
            case Timing():
                record = _time(self, self.job, folder)
        write_record(job_path(self.results, self.job), {"fingerprint": self.job.fingerprint, **record})
        if not self.keep_models:
            _remove_models(folder)

    def fail(self, reason: str) -> None:
        """Write down that it could not be done, unless it was; without a fingerprint, which may be what fails."""
        path = job_path(self.results, self.job)
        if not (there := read_record(path)) or "error" in there:
            write_record(path, {"error": " ".join(reason.split())})

    def recipe(self, run: Run, folder: Path) -> Recipe:
        """The run's recipe, here."""
        return replace(run.recipe, name=self.job.name, output_dir=str(folder))


def _refuse_unknown(job: Job) -> None:
    """The plan knew the connector: a process that does not is one started for the job."""
    name = (job if isinstance(job, Run) else job.run).recipe.model.connector
    if CONNECTORS.resolve(name).name not in CONNECTORS.names():
        raise UsageError(
            f"connector {name!r} is unknown in the worker process, which starts anew and has only what its imports "
            "register: install it as a package entry point, register it in an importable module, or take --jobs 1"
        )


def _try(task: Task, trial: Trial, folder: Path) -> dict[str, Any]:
    """The loss on held-out data that the factor comes to; none where training diverged."""
    run, search = trial.run, trial.run.scale.search
    if run.scale.probe:
        recipe, width = probe_recipe(run), text_width(run.recipe.model)
        words = probe_words(recipe, run.recipe.model)
    else:
        recipe, width, words = task.recipe(run, folder), WIDTH, None
    recipe = shortened(with_factor(replace(recipe, seed=trial.seed), trial.factor), search.fraction)
    try:
        loss = trial_loss(recipe, search.data, search.limit, width, words)
    except DivergedError:
        loss = math.nan
    return {"factor": trial.factor, "loss": loss if math.isfinite(loss) else None}


def trial_loss(recipe: Recipe, data: str, limit: int, width: int = WIDTH, words: Tensor | None = None) -> float:
    """The loss on held-out data of what the recipe trains; `width`, `words`: what `train_probe` takes."""
    if recipe.model.text in PROBES:
        return probe_loss(train_probe(recipe, width, words).probed, data.partition(":")[2], limit)
    parts = load_model(str(train(recipe, progress=False)), device=parse_device("auto"))
    return answer_loss(parts, recipe, evaluation_samples(data, limit))


def best_factor(run: Run, results: Path) -> tuple[float, dict[float, float | None]]:
    """The factor of the lowest loss, and the losses of all (None: diverged); `DataError` where a trial is missing."""
    if not run.trials:
        return run.scale.search.factors[0], {}
    losses: dict[float, float | None] = {}
    for trial in run.trials:
        record = job_record(results, trial)
        if record is None:  # chosen among fewer, the row would be at a disadvantage
            reason = read_record(job_path(results, trial)).get("error", "not made")
            raise DataError(f"the trial {trial.name} failed, so no learning rate is chosen: {reason}")
        losses[record["factor"]] = record["loss"]
    finite = {factor: loss for factor, loss in losses.items() if loss is not None}
    if not finite:
        raise DataError(f"every trial of {run.trials_name} diverged")
    return min(finite, key=lambda factor: finite[factor]), losses


def _measure(task: Task, run: Run, folder: Path) -> dict[str, Any]:
    """Trained with the learning rate that its trials chose, evaluated on all data, timed."""
    started = time.monotonic()
    factor, losses = best_factor(run, task.results)
    recipe, probe = with_fraction(task.recipe(run, folder), run.fraction), None
    if run.scale.probe:
        probe = with_factor(with_fraction(probe_recipe(run), run.fraction), factor)
        recipe = pretrained_by_probe(recipe, probe, folder / f"probe-x{factor:g}" / "model")
    else:
        recipe = with_factor(recipe, factor)
    measure = probe_figures if recipe.model.text in PROBES else model_figures
    return {
        "connector": recipe.model.connector,
        "num_tokens": run.num_tokens,
        "fraction": run.fraction,
        "seed": run.seed,
        **measure(recipe, run.scale, folder),
        "factor": factor,
        "losses_of_factors": losses,
        "seconds": round(time.monotonic() - started, 1),
        "recipe": asdict(with_all_options(recipe)),
        **({"heads": asdict(probe)} if probe else {}),
        "device": device_name(parse_device("auto")),
        **machine(),
    }


def _time(task: Task, timing: Timing, folder: Path) -> dict[str, Any]:
    """Median seconds of forward, backward and update; at a rate so low that nothing diverges."""
    recipe = with_factor(replace(task.recipe(timing.run, folder), seed=timing.seed), 1e-3)
    if recipe.model.text in PROBES:
        seconds = train_probe(with_steps(recipe, WARM_UP_STEPS + TIMED_STEPS)).seconds
    else:  # a step of training builds the model as the recipe has it
        parts = load_model(str(train(with_steps(recipe, 1), progress=False)), device=parse_device("auto"))
        seconds = step_seconds(parts, recipe, folder)
    median = statistics.median(seconds[WARM_UP_STEPS:])
    return {"step_seconds": round(median, 5), "device": device_name(parse_device("auto")), **machine()}


def with_all_options(recipe: Recipe) -> Recipe:
    """The same, with every option of the connector: a record says what was trained when a default is another one."""
    model = recipe.model
    options = complete_options(model.connector, model.connector_kwargs)
    return replace(recipe, model=replace(model, connector_kwargs=options))


def model_figures(recipe: Recipe, scale: Scale, folder: Path) -> dict[str, Any]:
    """Scores and the connector's weights, of a model with its language model."""
    parts = load_model(str(train(recipe, progress=False)), device=parse_device("auto"))
    scores = {}
    for number, data in enumerate(scale.data):
        samples = evaluation_samples(data, scale.limit)
        features = cached_features(parts, samples, progress=False) if recipe.cache_features else None
        out = folder / f"eval-{number}"
        found = evaluate(parts, data, out, limit=scale.limit, features=features, progress=False)
        scores[data] = with_prior(found, data, [as_reply(sample) for sample in samples])
    return {"scores": scores, "num_parameters": _num_weights(module_parameters(parts[0])["connector"])}


def probe_figures(recipe: Recipe, scale: Scale, folder: Path) -> dict[str, Any]:
    """The same of a connector with a probe."""
    trained = train_probe(recipe)
    return {
        "scores": {
            data: probe_scores(trained.probed, data, folder / f"eval-{number}", scale.limit)
            for number, data in enumerate(scale.data)
        },
        "num_parameters": _num_weights(trained.probed.connector.parameters()),
        "loss_curve": trained.curve(),
    }


def _num_weights(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _loader(parts: Parts, recipe: Recipe, spec: StageSpec, samples: Samples | list[Sample]) -> Iterator[dict[str, Any]]:
    """Batches as in training, in order."""
    dataset = ConversationDataset(samples, parts[1], max_length=spec.max_length, group=spec.group)
    features = cached_features(parts, samples, progress=False) if recipe.cache_features else None
    collator = Collator(parts[1], features=features, dataset=dataset)
    size = spec.training.get("per_device_train_batch_size", 8)
    for start in range(0, len(dataset), size):
        batch = collator([dataset[i] for i in range(start, min(start + size, len(dataset)))])
        del batch["sample_ids"]
        yield to_device(batch, parts[0].device)


def answer_loss(parts: Parts, recipe: Recipe, samples: list[Sample]) -> float:
    """Mean over the tokens of the answers of -log p(token), the true tokens before it given, in nats."""
    *_, (_, spec) = recipe.stages()
    total, count = 0.0, 0
    for batch in _loader(parts, recipe, spec, samples):
        tokens = int((batch["labels"] != IGNORE).sum())
        with torch.inference_mode():
            total += float(parts[0](**batch).loss) * tokens
        count += tokens
    return total / count


def step_seconds(parts: Parts, recipe: Recipe, folder: Path) -> list[float]:
    """Seconds of steps of the last stage on one batch: forward, backward and AdamW, without the loader.

    The encoder is in it unless its features come from the cache. The model is of no use afterwards.
    """
    *_, (_, spec) = recipe.stages()
    enough = spec.training.get("per_device_train_batch_size", 8) * spec.group
    samples, _ = stage_samples(replace(spec, max_samples=min(enough, spec.max_samples or enough)), folder / "timing")
    batch = next(_loader(parts, recipe, spec, samples))
    args = training_arguments(spec, folder, recipe.seed, progress=False)
    half = half_precision(args)
    model, _ = as_it_learns(parts[0].train(), spec, args, None)
    cast_frozen(model, half)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def compute_loss() -> Tensor:
        with autocast(model.device, half or torch.float32):
            return model(**batch, supervised_only=True).loss

    seconds = []
    with lean(model, half, compile_layers=spec.compile_layers):
        for _ in range(WARM_UP_STEPS + TIMED_STEPS):
            start = time.perf_counter()
            training_step(compute_loss, optimizer)
            if model.device.type != "cpu":
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - start)
    return seconds


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Our log goes into a file beside the run instead of between the lines of the progress bar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger, handler = logging.getLogger("acformer"), logging.FileHandler(path, encoding="utf-8")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    except Exception:
        logger.exception("%s failed", path.parent.name)
        raise
    finally:
        logger.level, logger.propagate = before
        logger.removeHandler(handler)
        handler.close()


def _remove_models(folder: Path) -> None:
    """Weights and checkpoints of a run whose record is written; its predictions and logs stay."""
    for name in ("model", "checkpoint-*"):
        for path in folder.glob(f"*/{name}"):
            shutil.rmtree(path)
