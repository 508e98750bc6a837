"""Two-stage training (Sec. 4.1) on the Hugging Face Trainer: accelerate, FSDP, DeepSpeed and loggers come along.

A stage is data, a template, learning rates, `TrainingArguments`; `trainer` has what is added to the Trainer itself.
"""

import copy
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PrinterCallback, set_seed

from acformer.data.chat_format import check_template
from acformer.data.collate import Collator, ConversationDataset
from acformer.data.conversation import split_at_images
from acformer.data.datasets import load_samples
from acformer.data.samples import Sample
from acformer.data.skip_log import SKIPPED, SkipLog
from acformer.data.templates import resolve_template
from acformer.errors import UsageError
from acformer.fetch.embedded import cache_dir
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.hf.build import build_model
from acformer.hf.checkpoints import latest_valid_checkpoint, load_model, save_trained, verify_folder
from acformer.training.arguments import fitting, refuse_unfit, training_arguments
from acformer.training.elastic import ElasticBudget, elastic_choices
from acformer.training.recipe import STAGES, Recipe, StageSpec, load_recipe
from acformer.training.trainer import AcFormerTrainer, freeze, refuse_missing_modules
from acformer.vision.feature_cache import FeatureCache

logger = logging.getLogger("acformer")

Parts = tuple[AcFormerForConditionalGeneration, AcFormerProcessor]


def train(recipe: Recipe, *, progress: bool = True) -> Path:
    """Run the stages of a recipe; returns the folder of the model that the last one made.

    A stage that is already whole in the output folder, with the same recipe, is not run again; an interrupted one
    goes on from its newest whole checkpoint (unless `resume: false`). What is wrong with any stage to be run is told
    before the first one trains.

    Raises:
        UsageError: recipe and output folder do not fit. DataError: too many bad records. CheckpointError: a part
        cannot be loaded. DivergedError: loss or gradient not finite; the last checkpoint is untouched.
    """
    _refuse_another_run(recipe)
    todo = {stage: spec for stage, spec in recipe.stages() if not _is_done(recipe, stage)}
    for stage, spec in todo.items():
        with _naming(stage):
            refuse_unfit(spec, recipe.seed)
            load_samples(spec.data, image_root=spec.image_root, skipped=SkipLog(max_bad_fraction=1.0), limit=1)
    set_seed(recipe.seed)
    parts, speakers = None, None
    folder = recipe.output
    for stage, spec in recipe.stages():
        folder = recipe.output / stage / "model"
        if stage not in todo:
            logger.info("stage %s is done: %s", stage, folder)
            parts = load_model(str(folder))
            continue
        checkpoint = latest_valid_checkpoint(folder.parent, logger.warning) if recipe.resume else None
        samples, skip_log = stage_samples(spec, folder.parent, checkpoint)
        parts = parts or _first_model(recipe, stage)
        speakers = speakers or {name: _speaker(recipe, name, parts) for name in todo}
        _claim_output(recipe, stage)
        trainer = _trainer(recipe, stage, parts, speakers[stage], samples, skip_log, progress)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.is_world_process_zero():
            (folder.parent / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1), encoding="utf-8")
        logger.info("stage %s: %d records read, %d skipped", stage, skip_log.offered, skip_log.skipped)
        save_trained(trainer, parts[1], folder)
        logger.info("stage %s: model saved in %s", stage, folder)
    return folder


@contextmanager
def _naming(stage: str) -> Iterator[None]:
    """A mistake in a recipe is looked for in all stages at once: say in which it is."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{stage}: {error}") from error


def _is_done(recipe: Recipe, stage: str) -> bool:
    folder = recipe.output / stage / "model"
    return recipe.resume and folder.exists() and verify_folder(folder) is None


def stage_samples(spec: StageSpec, folder: Path, resumed: Path | None = None) -> tuple[list[Sample], SkipLog]:
    """The stage's records; bad ones are counted and written to `<folder>/skipped.jsonl`.

    resumed: a checkpoint; what was skipped on the way to it stays skipped.
    """
    with PartialState().main_process_first():  # one makes the log, the others go on in it
        path, first = folder / SKIPPED, is_first_process()
        skip_log = SkipLog(path, max_bad_fraction=spec.max_bad_fraction, fresh=first)
        if first and resumed is not None and (resumed / SKIPPED).exists():
            shutil.copy(resumed / SKIPPED, path)
        return load_samples(spec.data, image_root=spec.image_root, skipped=skip_log, limit=spec.max_samples), skip_log


def is_first_process() -> bool:
    """Whether this process writes what is written once in a distributed run (torchrun and accelerate set RANK)."""
    return os.environ.get("RANK", "0") == "0"


def _record(recipe: Recipe) -> str:
    """The recipe as it is kept in the output folder, without what may differ between two calls of one run."""
    return replace(recipe, stage="all", resume=True).to_yaml()


def _work_of(recipe: Recipe, stages: Iterable[str] = STAGES) -> list[Path]:
    """Checkpoints and models that the stages have left in the output folder."""
    return [
        path for stage in stages for name in ("checkpoint-*", "model") for path in (recipe.output / stage).glob(name)
    ]


def _refuse_another_run(recipe: Recipe) -> None:
    """An output folder belongs to one recipe: another one in it would mix two runs.

    The section of a stage that has left nothing yet may change: a mistake in stage 2 does not cost stage 1.
    """
    record = recipe.output / "recipe.yaml"
    begun = [stage for stage in STAGES if _work_of(recipe, [stage])]
    if not (recipe.resume and record.exists() and begun):
        return
    ours, theirs = _foundation(recipe, begun[-1]), {}
    with suppress(UsageError):  # a record that another version has written may not be a recipe of ours
        theirs = _foundation(load_recipe(str(record)), begun[-1])
    differing = [key for key in ours if key not in theirs or ours[key] != theirs[key]]
    if differing:
        keeping = "stage=finetune " if differing == ["finetune"] else ""
        raise UsageError(
            f"{recipe.output} holds a run of another recipe ({record}; not the same: {', '.join(differing)}); choose "
            f"output_dir=..., or {keeping}resume=false to write over it"
        )


def _foundation(recipe: Recipe, last: str) -> dict[str, Any]:
    """What of a recipe the stages up to `last` rest on."""
    values = asdict(replace(recipe, stage="all", resume=True))
    for stage in STAGES[STAGES.index(last) + 1 :]:
        spec = values.pop(stage) or {}
        if (
            isinstance(recipe.model.text, dict) and recipe.from_model is None
        ):  # its tokenizer has learned from the data of all stages
            values[f"{stage}.data"] = spec.get("data"), spec.get("image_root")
    return values


def _claim_output(recipe: Recipe, stage: str) -> None:
    """Write the recipe down, once all it names was found; with `resume: false` this and later stages start anew."""
    if not is_first_process():
        return
    if not recipe.resume:
        for path in _work_of(recipe, STAGES[STAGES.index(stage) :]):
            shutil.rmtree(path)
    recipe.output.mkdir(parents=True, exist_ok=True)
    (recipe.output / "recipe.yaml").write_text(_record(recipe), encoding="utf-8")


def _first_model(recipe: Recipe, stage: str) -> Parts:
    """What the first stage of this call starts from: a given model, stage 1's result, or new parts."""
    after_pretrain = recipe.output / "pretrain" / "model"
    if recipe.from_model is not None:
        return load_model(recipe.from_model)
    if stage == "finetune" and recipe.pretrain is not None:
        if not after_pretrain.exists():
            raise UsageError(f"stage=finetune goes on from {after_pretrain}, which is not there: run pretrain first")
        return load_model(str(after_pretrain))
    return build_model(**asdict(recipe.model), texts=recipe_texts(recipe))


def recipe_texts(recipe: Recipe) -> Iterator[str]:
    """All that is said in the data of all the recipe's stages: what a new tokenizer learns from."""
    for spec in (recipe.pretrain, recipe.finetune):
        if spec is not None:
            skip_log = SkipLog(max_bad_fraction=spec.max_bad_fraction)
            for sample in load_samples(spec.data, image_root=spec.image_root, skipped=skip_log):
                for message in sample.messages:
                    yield from split_at_images(message)


def _speaker(recipe: Recipe, stage: str, parts: Parts) -> tuple[AcFormerProcessor, ElasticBudget | None]:
    """The processor that encodes a stage's samples, and the stage's budget; `UsageError` if model and stage differ."""
    model, processor = parts
    spec: StageSpec = getattr(recipe, stage)
    speaker, budget = copy.copy(processor), None
    with _naming(stage):
        refuse_missing_modules(model, spec.learning_rates)
        if spec.template is not None:
            speaker.chat_template = resolve_template(spec.template, processor.tokenizer)
        check_template(speaker)
        if spec.elastic is not None:
            model.to(PartialState().device)  # the connector is asked for every number of the range
            choices = elastic_choices(model.model.connector, *spec.elastic)
            speaker.num_placeholders = processor.count_placeholders(choices[-1])
            budget = ElasticBudget(choices, recipe.seed, processor)
    return speaker, budget


def _trainer(
    recipe: Recipe,
    stage: str,
    parts: Parts,
    spoken: tuple[AcFormerProcessor, ElasticBudget | None],
    samples: list[Sample],
    skip_log: SkipLog,
    progress: bool,
) -> AcFormerTrainer:
    (model, _), (speaker, budget) = parts, spoken
    spec: StageSpec = getattr(recipe, stage)
    logger.info("stage %s: %d samples\n%s", stage, len(samples), freeze(model, spec.learning_rates))
    args = training_arguments(spec, recipe.output / stage, recipe.seed, progress)
    model.to(args.device)
    dataset = ConversationDataset(samples, speaker, max_length=spec.max_length, group=spec.group)
    features = cached_features(parts, samples, progress) if recipe.cache_features else None
    with _naming(stage), fitting():
        trainer = AcFormerTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=Collator(speaker, features=features, skip_log=skip_log, dataset=dataset),
            learning_rates=spec.learning_rates,
            budget=budget,
        )
    trainer.remove_callback(PrinterCallback)  # without a progress bar it would print every log to stdout
    return trainer


def cached_features(
    parts: Parts,
    samples: Iterable[Sample],
    progress: bool = True,
) -> FeatureCache:
    """The encoder's features of every picture of the samples, encoded now or read from the user's cache folder."""
    model, processor = parts
    tower, connector = model.model.vision_tower, model.model.connector
    cache = FeatureCache(
        cache_dir() / "features",
        model.get_vision_features,
        tower,
        processor.image_processor,
        hidden_layers=connector.hidden_layers,
        input_grid=connector.input_grid,
    )
    cache.add((path for sample in samples for path in sample.images), progress=progress)
    return cache
