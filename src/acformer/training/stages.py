"""Two-stage training (Sec. 4.1) on the Hugging Face Trainer: accelerate, FSDP, DeepSpeed and loggers come along.

A stage is data, a template, learning rates, `TrainingArguments`; `trainer` has what is added to the Trainer itself.
"""

import copy
import json
import logging
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from acformer.data.chat_format import check_template
from acformer.data.collate import Collator, ConversationDataset
from acformer.data.conversation import split_at_images
from acformer.data.datasets import named_dataset, open_samples
from acformer.data.entries import data_entries, data_title
from acformer.data.mixture import Mixture
from acformer.data.samples import Sample
from acformer.data.skip_log import SKIPPED, SkipLog
from acformer.data.sources import look_through
from acformer.data.templates import resolve_template
from acformer.errors import CheckpointError, UsageError, translated
from acformer.fetch.embedded import cache_dir
from acformer.files import write_text
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.hf.adapters import adapter_base
from acformer.hf.build import build_model
from acformer.hf.checkpoints import latest_valid_checkpoint, load_model, save_trained
from acformer.hf.configuration_acformer import context_length
from acformer.hf.quantize import check_bitsandbytes
from acformer.images.stored import StoredImage
from acformer.training import run_folder
from acformer.training.arguments import check_arguments, fitting, training_arguments
from acformer.training.distributed import check_one_reader
from acformer.training.elastic import ElasticBudget, elastic_choices
from acformer.training.failures import explained
from acformer.training.lean import decoder_layers, lean
from acformer.training.learner import as_it_learns, cast_frozen, check_base, half_precision, saver, write_base
from acformer.training.lora import check_peft, lora_targets
from acformer.training.model_card import write_training_card
from acformer.training.packed import check_packing, stage_packing
from acformer.training.progress import ProgressLines, announced, is_terminal
from acformer.training.recipe import Recipe, StageSpec
from acformer.training.trainer import AcFormerTrainer, check_modules
from acformer.vision.feature_cache import FeatureCache

logger = logging.getLogger("acformer")

Parts = tuple[AcFormerForConditionalGeneration, AcFormerProcessor]


def train(recipe: Recipe, *, progress: bool = True) -> Path:
    """Run the stages of a recipe; returns the folder of the model that the last one made.

    A stage that is already whole in the output folder, with the same recipe, is not run again; an interrupted one
    goes on from its newest whole checkpoint (unless `resume: false`). What is wrong with any stage to be run is said
    before the first one trains. SIGTERM leaves a checkpoint behind and is handed on to whoever listened before.

    Raises:
        UsageError: recipe and output folder do not fit, or another run is at work there.
        DataError: too many bad records.
        CheckpointError: a part cannot be loaded, or nothing saved.
        DivergedError: loss, gradient or weights not finite; the last checkpoint is untouched.
    """
    with explained(), run_folder.reserved(recipe.output):
        run_folder.check_same_run(recipe)
        todo = {stage: spec for stage, spec in recipe.stages() if not run_folder.is_done(recipe, stage)}
        for stage, spec in todo.items():
            with translated(stage, UsageError, UsageError):
                check_stage(spec, recipe.seed)
                check_one_reader(
                    cached=recipe.cache_features, elastic=spec.elastic is not None, quantize=spec.quantize is not None
                )
        set_seed(recipe.seed)  # the checks have drawn random numbers
        return _train_stages(recipe, todo, progress)


def _train_stages(recipe: Recipe, todo: Mapping[str, StageSpec], progress: bool) -> Path:
    parts, processors = None, None
    folder = recipe.output
    for stage, spec in recipe.stages():
        folder = recipe.output / stage / "model"
        if stage not in todo:
            logger.info("stage %s is done: %s (resume=false trains it anew)", stage, folder)
            parts = load_model(str(folder))
            continue
        checkpoint = latest_valid_checkpoint(folder.parent, logger.warning) if recipe.resume else None
        with announced(f"stage {stage}: reading {data_title(spec.data)}"):
            samples, skip_log = stage_samples(spec, folder.parent, checkpoint, seed=recipe.seed)
            data = run_folder.trained_on(samples, PartialState().num_processes)
            data["samples_a_step"] = run_folder.samples_a_step(spec.training, PartialState().num_processes)
        if checkpoint is not None:
            run_folder.check_trained_on(checkpoint, data, data_title(spec.data))
        if parts is None or checkpoint is not None:
            with announced(f"stage {stage}: loading the model"):
                parts = first_model(recipe, stage, checkpoint)
        if processors is None:
            processors = {name: stage_processor(recipe, name, parts) for name in todo}
            run_folder.check_room(recipe.output, parts[0], todo)
        run_folder.claim(recipe, stage)
        if run_folder.is_first_process():
            write_base(recipe, stage, parts)
        trainer = stage_trainer(recipe, stage, parts, processors[stage], (samples, skip_log), checkpoint, progress)
        trainer.complete = partial(_complete_checkpoint, parts[1], skip_log, data)
        _run(trainer, checkpoint, parts[1], folder)
        config = parts[0].config
        if trainer.model is not parts[0] or trainer.save_weights or trainer.saved_dtype:
            parts = None  # the next stage starts from what was saved
        logger.info("stage %s: %d records read, %d skipped", stage, skip_log.offered, skip_log.skipped)
        if run_folder.is_first_process():
            write_training_card(folder, config, recipe, stage)
        logger.info("stage %s: model saved in %s", stage, folder)
    return folder


def check_stage(spec: StageSpec, seed: int) -> None:
    """What can be checked of a stage before anything is built."""
    check_arguments(spec, seed)
    if spec.lora is not None:
        check_peft()
    if spec.quantize is not None:
        check_bitsandbytes()
    drops = spec.training.get("dataloader_drop_last", False)  # then the number of samples matters, not one of them
    is_named = all(named_dataset(entry.path) for entry in data_entries(spec.data))  # one that may have to be made
    few = spec if drops or not is_named else replace(spec, max_samples=1)
    samples = _open(few, seed, skip_log := SkipLog(max_bad_fraction=1.0))
    look_through(samples, data_title(spec.data), skip_log)
    if not drops:
        return
    rows = spec.training.get("per_device_train_batch_size", 8) * PartialState().num_processes
    if len(ConversationDataset(samples, None, group=spec.group)) < rows:
        raise UsageError(
            f"training.dataloader_drop_last would drop all there is: {len(samples)} samples do not fill a batch of "
            f"{rows}"
        )


def _open(spec: StageSpec, seed: int, skip_log: SkipLog) -> Mixture:
    """The stage's samples; of a stream, as many as its steps take."""
    training, rows = spec.training, None
    if data_entries(spec.data)[0].streaming and training.get("max_steps", -1) > 0:
        if spec.group > 1 or training.get("train_sampling_strategy", "random") == "group_by_length":
            raise UsageError("a stream is taken as it comes: leave group and train_sampling_strategy out")
        rows = training["max_steps"] * run_folder.samples_a_step(training, PartialState().num_processes)
    return open_samples(
        spec.data, image_root=spec.image_root, skipped=skip_log, limit=spec.max_samples, seed=seed, num_rows=rows
    )


def _run(trainer: AcFormerTrainer, checkpoint: Path | None, processor: AcFormerProcessor, folder: Path) -> None:
    """Train what is left, and save the model."""
    with trainer.stop.listening():
        if checkpoint is not None:
            with translated(f"cannot go on from {checkpoint}", CheckpointError):
                trainer.state = state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
                logger.info("going on from %s, step %d of %d", checkpoint, int(state.global_step), int(state.max_steps))
        if checkpoint is None or not trainer.is_finished:  # the Trainer would do one step more
            half, compiles = half_precision(trainer.args), trainer.compile_layers
            with lean(trainer.model, half, compile_layers=compiles):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.is_finished:
            trainer.check_weights()
            if trainer.is_world_process_zero():
                write_text(folder.parent / "log.json", json.dumps(trainer.state.log_history, indent=1))
            save_trained(trainer, processor, folder)
            if trainer.args.save_strategy == "no" and trainer.is_world_process_zero():
                for left_by_a_signal in folder.parent.glob("checkpoint-*"):
                    shutil.rmtree(left_by_a_signal)
    if not trainer.is_finished:  # nobody has listened to the signal
        raise KeyboardInterrupt(signal.SIGTERM)


def _complete_checkpoint(processor: AcFormerProcessor, skip_log: SkipLog, data: dict, checkpoint: Path) -> None:
    """What a run needs to go on, beside the Trainer's: tokenizer, the records skipped so far, what it is trained on."""
    processor.save_pretrained(checkpoint)
    skip_log.copy_to(checkpoint)
    write_text(checkpoint / run_folder.TRAINED_ON, json.dumps(data, indent=1))


def stage_samples(
    spec: StageSpec, folder: Path, resumed: Path | None = None, *, seed: int = 0
) -> tuple[Mixture, SkipLog]:
    """The stage's records; bad ones are counted and written to `<folder>/skipped.jsonl`, when they are reached.

    resumed: a checkpoint; what was skipped on the way to it stays skipped. seed: of the order of a stream.
    """
    with PartialState().main_process_first():  # one makes the log, the others go on in it
        path, first = folder / SKIPPED, run_folder.is_first_process()
        skip_log = SkipLog(path, max_bad_fraction=spec.max_bad_fraction, fresh=first)
        if first and resumed is not None and (resumed / SKIPPED).exists():
            shutil.copy(resumed / SKIPPED, path)
        samples = _open(spec, seed, skip_log)
        look_through(samples, data_title(spec.data), skip_log)
        return samples, skip_log


def first_model(recipe: Recipe, stage: str, checkpoint: Path | None) -> Parts:
    """What the first stage of this call starts from: its checkpoint, a given model, stage 1's result, or new parts.

    A new tokenizer is the checkpoint's: it would be another one where the data has changed since.
    """
    has_processor = checkpoint is not None and (checkpoint / "tokenizer_config.json").exists()
    if checkpoint is not None and has_processor and any(checkpoint.glob("*.safetensors")):  # a sharded one has none
        return load_model(adapter_base(checkpoint) or str(checkpoint))  # adapters are not merged to be trained
    after_pretrain = recipe.output / "pretrain" / "model"
    if recipe.from_model is not None:
        return load_model(recipe.from_model)
    if stage == "finetune" and recipe.pretrain is not None:
        if not after_pretrain.exists():
            raise UsageError(f"stage=finetune goes on from {after_pretrain}, which is not there: run pretrain first")
        return load_model(str(after_pretrain))
    model, processor = build_model(**asdict(recipe.model), texts=recipe_texts(recipe))
    return model, AcFormerProcessor.from_pretrained(checkpoint) if has_processor else processor


def recipe_texts(recipe: Recipe) -> Iterator[str]:
    """All that is said in the data of all the recipe's stages: what a new tokenizer learns from."""
    for spec in (recipe.pretrain, recipe.finetune):
        if spec is not None:
            skip_log = SkipLog(max_bad_fraction=spec.max_bad_fraction)
            for sample in _open(replace(spec, max_samples=None), recipe.seed, skip_log):
                for message in sample.messages:
                    yield from split_at_images(message)


def stage_processor(recipe: Recipe, stage: str, parts: Parts) -> tuple[AcFormerProcessor, ElasticBudget | None]:
    """The processor that encodes a stage's samples, and the stage's budget; `UsageError` if model and stage differ."""
    model, processor = parts
    spec: StageSpec = getattr(recipe, stage)
    own, budget = copy.copy(processor), None  # what is saved keeps the model's template and T
    with translated(stage, UsageError, UsageError):
        check_modules(model, spec.learning_rates)
        if model.dtype == torch.float16:
            raise UsageError(
                "weights in float16 cannot be trained, their gradients vanish or overflow: take model.dtype "
                "float32 (and training.fp16 for the arithmetic), or bfloat16"
            )
        if spec.lora is not None:
            lora_targets(model, spec.lora.targets)
            check_base(recipe, stage)
        if spec.template is not None:
            own.chat_template = resolve_template(spec.template, processor.tokenizer)
        check_template(own)
        if spec.packing:
            check_packing(model)
        if spec.compile_layers:
            decoder_layers(model.model.language_model)
        if spec.elastic is not None:
            model.to(PartialState().device)  # the connector is asked for every number of the range
            choices = elastic_choices(model.model.connector, *spec.elastic)
            # Samples are encoded once, with the most image tokens; each step drops what its T leaves over.
            own.num_placeholders = processor.count_placeholders(choices[-1])
            budget = ElasticBudget(choices, recipe.seed, processor)
    return own, budget


def stage_trainer(
    recipe: Recipe,
    stage: str,
    parts: Parts,
    encoding: tuple[AcFormerProcessor, ElasticBudget | None],
    data: tuple[Mixture, SkipLog],
    checkpoint: Path | None,
    progress: bool,
) -> AcFormerTrainer:
    """Of a stage of the recipe: the model as it learns there, its data in batches, what is saved.

    encoding: of `stage_processor`. data: of `stage_samples`. checkpoint: to go on from.
    """
    (model, _), (processor, budget), (samples, skip_log) = parts, encoding, data
    spec: StageSpec = getattr(recipe, stage)
    args = training_arguments(spec, recipe.output / stage, recipe.seed, progress and is_terminal())
    model, table = as_it_learns(model, spec, args, checkpoint)
    logger.info("stage %s: %d samples\n%s", stage, len(samples), table)
    dataset = ConversationDataset(samples, processor, max_length=_max_length(spec, model, stage), group=spec.group)
    features = None
    if recipe.cache_features:  # made by the encoder as it is, before its weights are cast
        model.model.vision_tower.to(args.device)
        features = cached_features((model, processor), samples, progress)
    packing = stage_packing(spec, model)
    # The dtype of what learns is that of the saved model, whatever the frozen weights are cast to.
    half, dtype = half_precision(args), next(p.dtype for p in model.parameters() if p.requires_grad)
    cast_frozen(model, half)
    with translated(stage, UsageError, UsageError), fitting():
        trainer = AcFormerTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=Collator(processor, features=features, skip_log=skip_log, dataset=dataset, packing=packing),
            learning_rates=spec.learning_rates,
            budget=budget,
        )
    trainer.save_weights = saver(recipe, stage, model)
    trainer.compile_layers = spec.compile_layers
    trainer.saved_dtype = dtype if half is not None else None
    trainer.remove_callback(PrinterCallback)  # without a progress bar it would print every log to stdout
    if progress and not is_terminal():
        trainer.add_callback(ProgressLines())
    return trainer


def _max_length(spec: StageSpec, model: AcFormerForConditionalGeneration, stage: str) -> int:
    """The recipe's, or the language model's context where that is shorter: it knows no places behind it."""
    context = context_length(model.config)
    if context is None or context >= spec.max_length:
        return spec.max_length
    if spec.max_length != StageSpec.max_length:  # of the default nobody has said that it shall be so
        logger.warning(
            "stage %s: samples are cut at the language model's context of %d tokens, not at max_length %d",
            stage,
            context,
            spec.max_length,
        )
    return context


def cached_features(
    parts: Parts,
    samples: Iterable[Sample],
    progress: bool = True,
) -> FeatureCache:
    """The encoder's features of every image of the samples, encoded now or read from the user's cache folder."""
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
    cache.add((image for sample in samples for image in _files_of(sample)), progress=progress)
    return cache


def _files_of(sample: Sample) -> Iterator[Path | StoredImage]:
    for image in sample.images:
        if isinstance(image, bytes):
            raise UsageError(f"cache_features knows images by their files, and {sample.file} holds them itself")
        yield image
