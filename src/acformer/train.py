"""Two-stage training (Sec. 4.1) on the Hugging Face Trainer: accelerate, FSDP, DeepSpeed and loggers come along.

A stage is data, a template, learning rates, `TrainingArguments`; `trainer` has what is added to the Trainer itself.
"""

import copy
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainingArguments, set_seed

from acformer.build import build_model
from acformer.checkpoints import damage, load_model, newest_whole, save_trained
from acformer.data.collate import Collator, ConversationDataset
from acformer.data.conversation import split_at_images
from acformer.data.samples import Sample
from acformer.data.skip_log import SkipLog
from acformer.data.sources import load_samples
from acformer.data.templates import resolve_template
from acformer.elastic import ElasticBudget, elastic_choices
from acformer.embedded import cache_dir
from acformer.errors import UsageError, unknown_name
from acformer.features import FeatureCache
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.recipe import STAGES, Recipe, StageSpec, coerce
from acformer.trainer import AcFormerTrainer, Guard, freeze

logger = logging.getLogger("acformer")


def train(recipe: Recipe, *, progress: bool = True) -> Path:
    """Run the stages of a recipe; returns the folder of the model that the last one made.

    A stage that is already whole in the output folder, with the same recipe, is not run again; an interrupted one
    goes on from its newest whole checkpoint (unless `resume: false`).

    Raises:
        UsageError: recipe and output folder do not fit. DataError: too many bad records. CheckpointError: a part
        cannot be loaded. DivergedError: loss or gradient not finite; the last checkpoint is untouched.
    """
    set_seed(recipe.seed)
    _refuse_another_run(recipe)
    parts = None
    folder = recipe.output
    for stage, spec in recipe.stages():
        folder = recipe.output / stage / "model"
        if recipe.resume and folder.exists() and damage(folder) is None:
            logger.info("stage %s is done: %s", stage, folder)
            parts = load_model(str(folder))
            continue
        samples, skip_log = stage_samples(spec, recipe.output / stage)
        parts = parts or _first_model(recipe, stage)
        _claim_output(recipe, stage)
        trainer = _run_stage(recipe, stage, parts, samples, skip_log, progress)
        save_trained(trainer, parts[1], folder)
        logger.info("stage %s: model saved in %s", stage, folder)
    return folder


def stage_samples(spec: StageSpec, folder: Path) -> tuple[list[Sample], SkipLog]:
    """The stage's records; bad ones are counted and written to `<folder>/skipped.jsonl`."""
    with PartialState().main_process_first():  # one makes the log, the others go on in it
        path, first = folder / "skipped.jsonl", is_first_process()
        skip_log = SkipLog(path, max_bad_fraction=spec.max_bad_fraction, fresh=first)
        return load_samples(spec.data, image_root=spec.image_root, skipped=skip_log, limit=spec.max_samples), skip_log


def is_first_process() -> bool:
    """Whether this process writes what is written once in a distributed run (torchrun and accelerate set RANK)."""
    return os.environ.get("RANK", "0") == "0"


def training_arguments(spec: StageSpec, folder: Path, seed: int, progress: bool) -> TrainingArguments:
    """The recipe's `training` section over our defaults; `UsageError` for an argument that does not exist."""
    defaults = {
        "output_dir": str(folder),
        "seed": seed,
        "learning_rate": max(spec.learning_rates.values()),
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": not progress,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    hints = get_type_hints(TrainingArguments)
    for key, value in spec.training.items():
        if key not in hints:
            raise unknown_name("training argument", key, hints)
        coerce(hints[key], value, f"training.{key}")
    try:
        args = TrainingArguments(**{**defaults, **spec.training})
    except (TypeError, ValueError) as error:
        raise UsageError(f"training arguments do not fit: {error}") from error
    if args.train_sampling_strategy == "batch_rebalance":
        raise UsageError("training.train_sampling_strategy batch_rebalance does not fit groups: take group_by_length")
    if args.n_gpu > 1:  # the Trainer would fall back to DataParallel, whose threads share one vision tower
        raise UsageError(
            f"{args.n_gpu} GPUs are visible to one process: start one process a GPU (torchrun --nproc-per-node "
            f"{args.n_gpu} -m acformer.cli train ...), or show one (CUDA_VISIBLE_DEVICES=0)"
        )
    return args


def _record(recipe: Recipe) -> str:
    """The recipe as it is kept in the output folder, without what may differ between two calls of one run."""
    return replace(recipe, stage="all", resume=True).to_yaml()


def _work_of(recipe: Recipe, stages: Iterable[str] = STAGES) -> list[Path]:
    """Checkpoints and models that the stages have left in the output folder."""
    return [
        path for stage in stages for name in ("checkpoint-*", "model") for path in (recipe.output / stage).glob(name)
    ]


def _refuse_another_run(recipe: Recipe) -> None:
    """An output folder belongs to one recipe: another one in it would mix two runs."""
    record = recipe.output / "recipe.yaml"
    if recipe.resume and record.exists() and _work_of(recipe) and record.read_text(encoding="utf-8") != _record(recipe):
        raise UsageError(
            f"{recipe.output} holds a run of another recipe ({record}); choose output_dir=..., or resume=false to "
            "write over it"
        )


def _claim_output(recipe: Recipe, stage: str) -> None:
    """Write the recipe down, once all it names was found; with `resume: false` this and later stages start anew."""
    if not is_first_process():
        return
    if not recipe.resume:
        for path in _work_of(recipe, STAGES[STAGES.index(stage) :]):
            shutil.rmtree(path)
    recipe.output.mkdir(parents=True, exist_ok=True)
    (recipe.output / "recipe.yaml").write_text(_record(recipe), encoding="utf-8")


def _first_model(recipe: Recipe, stage: str) -> tuple[AcFormerForConditionalGeneration, AcFormerProcessor]:
    """What the first stage of this call starts from: a given model, stage 1's result, or new parts."""
    after_pretrain = recipe.output / "pretrain" / "model"
    if recipe.from_model is not None:
        return load_model(recipe.from_model)
    if stage == "finetune" and recipe.pretrain is not None:
        if not after_pretrain.exists():
            raise UsageError(f"stage=finetune goes on from {after_pretrain}, which is not there: run pretrain first")
        return load_model(str(after_pretrain))
    return build_model(recipe.model, recipe_texts(recipe))


def recipe_texts(recipe: Recipe) -> Iterator[str]:
    """All that is said in the data of all the recipe's stages: what a new tokenizer learns from."""
    for spec in (recipe.pretrain, recipe.finetune):
        if spec is not None:
            skip_log = SkipLog(max_bad_fraction=spec.max_bad_fraction)
            for sample in load_samples(spec.data, image_root=spec.image_root, skipped=skip_log):
                for message in sample.messages:
                    yield from split_at_images(message)


def _run_stage(
    recipe: Recipe,
    stage: str,
    parts: tuple[AcFormerForConditionalGeneration, AcFormerProcessor],
    samples: list[Sample],
    skip_log: SkipLog,
    progress: bool,
) -> AcFormerTrainer:
    model, processor = parts
    spec: StageSpec = getattr(recipe, stage)
    folder = recipe.output / stage
    logger.info("stage %s: %d samples\n%s", stage, len(samples), freeze(model, spec.learning_rates))
    args = training_arguments(spec, folder, recipe.seed, progress)
    model.to(args.device)
    speaker = copy.copy(processor)
    if spec.template is not None:
        speaker.chat_template = resolve_template(spec.template, processor.tokenizer)
    budget = None
    if spec.elastic is not None:
        choices = elastic_choices(model.model.connector, *spec.elastic)
        speaker.num_image_tokens = processor.num_placeholders(choices[-1])
        budget = ElasticBudget(choices, recipe.seed, processor)
    dataset = ConversationDataset(samples, speaker, max_length=spec.max_length, group=spec.group)
    features = cached_features(parts, samples, progress) if recipe.cache_features else None
    guard = Guard()
    trainer = AcFormerTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=Collator(speaker, features=features, skip_log=skip_log, dataset=dataset),
        learning_rates=spec.learning_rates,
        budget=budget,
        callbacks=[guard],
    )
    guard.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # without a progress bar it would print every log to stdout
    checkpoint = newest_whole(folder, logger.warning) if recipe.resume else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.is_world_process_zero():
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1), encoding="utf-8")
    logger.info("stage %s: %d records read, %d skipped", stage, skip_log.offered, skip_log.skipped)
    return trainer


def cached_features(
    parts: tuple[AcFormerForConditionalGeneration, AcFormerProcessor],
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
        levels=connector.levels,
        input_grid=connector.input_grid,
    )
    cache.add((path for sample in samples for path in sample.images), progress=progress)
    return cache
