"""`acformer train RECIPE --dry-run`: all that is looked at before training, and first batches as people read them.

The stages' own functions run, in a temporary folder in place of the run's: nothing is trained, nothing stays.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import set_seed

from acformer.data.conversation import IGNORE
from acformer.errors import UsageError, translated
from acformer.hf.checkpoints import load_model
from acformer.training import run_folder
from acformer.training.failures import explained
from acformer.training.recipe import Recipe, StageSpec
from acformer.training.stages import Parts, check_stage, first_model, stage_processor, stage_samples, stage_trainer
from acformer.training.trainer import AcFormerTrainer, learning_table

ROWS = 3
"""Rows of the batch that are written out."""


def dry_run(recipe: Recipe) -> str:
    """What each stage that would run learns, from how much, and its first batch: text, what is learned, shapes.

    Weights are not quantised and features not cached. A second stage is shown with the weights that the first would
    start from.

    Raises:
        As `acformer.training.stages.train`.
    """
    with explained(), TemporaryDirectory() as folder:
        run_folder.check_same_run(recipe)
        todo = {stage: spec for stage, spec in recipe.stages() if not run_folder.is_done(recipe, stage)}
        for stage, spec in todo.items():
            with translated(stage, UsageError, UsageError):
                check_stage(spec, recipe.seed)
        if not todo:
            return f"every stage is done: {recipe.output} (resume=false trains anew)"
        set_seed(recipe.seed)
        parts = _parts(recipe, todo)
        processors = {stage: stage_processor(recipe, stage, parts) for stage in todo}
        run_folder.check_room(recipe.output, parts[0], todo)
        elsewhere = replace(recipe, output_dir=folder, cache_features=False)
        shown = [_stage(elsewhere, stage, parts, processors[stage]) for stage in todo]
    return "\n\n".join([*shown, "nothing was trained, nothing written"])


def _parts(recipe: Recipe, todo: dict[str, StageSpec]) -> Parts:
    """What the first stage to run starts from."""
    stage = next(iter(todo))
    done = [name for name, _ in recipe.stages() if name not in todo]
    if done and stage == "finetune":
        return load_model(str(recipe.output / "pretrain" / "model"))
    return first_model(recipe, stage, None)


def _stage(recipe: Recipe, stage: str, parts: Parts, encoding: Any) -> str:
    spec = replace(getattr(recipe, stage), quantize=None)
    spec.training = {**spec.training, "dataloader_num_workers": 0, "dataloader_persistent_workers": False}
    spec.training.pop("dataloader_prefetch_factor", None)
    (recipe.output / stage).mkdir(parents=True)
    samples, skip_log = stage_samples(spec, recipe.output / stage, seed=recipe.seed)
    changed = replace(recipe, **{stage: spec})
    trainer = stage_trainer(changed, stage, parts, encoding, (samples, skip_log), None, progress=False)
    try:
        loader = trainer.get_train_dataloader()
        (batch, *_), _ = trainer.get_batch_samples(iter(loader), 1, trainer.args.device)
        lines = [
            f"stage {stage}: {skip_log.offered} records, {skip_log.skipped} skipped; {_schedule(trainer, len(loader))}",
            *_indented(learning_table(parts[0], spec.learning_rates)),
            *_settings(getattr(recipe, stage)),
            *_batch(trainer, encoding[0], batch),
        ]
    finally:  # the next stage starts from the same model
        if spec.lora is not None:
            parts[0].delete_adapter("default")
        if trainer.saved_dtype is not None:
            parts[0].to(trainer.saved_dtype)
    return "\n".join(lines)


def _schedule(trainer: AcFormerTrainer, batches: int) -> str:
    args = trainer.args
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs = math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)
    steps = args.max_steps if args.max_steps > 0 else epochs
    passes = f"{args.train_batch_size} x {args.gradient_accumulation_steps} passes x {args.world_size} processes"
    return f"{steps} steps of {rows} ({passes})"


def _settings(spec: StageSpec) -> Iterator[str]:
    """What the table does not say."""
    if spec.lora is not None:
        lora = spec.lora
        yield f"  lora: r {lora.r}, alpha {lora.alpha}, dropout {lora.dropout}, targets {lora.targets}"
    if spec.quantize is not None:
        yield f"  frozen language model in {spec.quantize} (not done here)"
    yield f"  saved: {'adapters and connector' if spec.lora else spec.save}"


def _batch(trainer: AcFormerTrainer, processor: Any, batch: dict[str, Any]) -> Iterator[str]:
    yield "  first batch:"
    for name, value in _tensors(batch):
        yield f"    {name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if "num_visual_tokens" in batch:
        yield f"    num_visual_tokens {batch['num_visual_tokens']}"
    learned = batch["labels"] != IGNORE
    count = sum(_length(batch, row) for row in range(len(learned)))
    yield f"    {int(learned.sum())} of {count} tokens are learned: those in [[ ]]"
    for row in range(min(ROWS, len(learned))):
        name = f"sample {trainer.sample_ids[row]}" if row < len(trainer.sample_ids) else "no sample"
        if "position_ids" in batch:
            name = f"{int((batch['position_ids'][row] == 0).sum())} sequences, a last one may be padding"
        yield f"  row {row + 1}, {name}:"
        yield f"    {_text(processor, batch, row)}"


def _tensors(batch: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in batch.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _tensors(value))


def _length(batch: dict[str, Any], row: int) -> int:
    """Positions of a row without its padding; packed rows have no mask that would tell it."""
    return int(batch["attention_mask"][row].sum()) if "attention_mask" in batch else batch["input_ids"].shape[1]


def _text(processor: Any, batch: dict[str, Any], row: int) -> str:
    """A row decoded without its padding; image tokens counted, what is learned in brackets."""
    count = _length(batch, row)
    ids, labels = batch["input_ids"][row, :count].tolist(), batch["labels"][row, :count].tolist()
    parts: list[tuple[str, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        kind = "image" if token == processor.image_token_id else "read" if label == IGNORE else "learned"
        if not parts or parts[-1][0] != kind:
            parts.append((kind, []))
        parts[-1][1].append(token)
    return "".join(_part(processor, kind, tokens) for kind, tokens in parts).replace("\n", "\\n")


def _part(processor: Any, kind: str, tokens: list[int]) -> str:
    if kind == "image":
        return f"<image x {len(tokens)}>"
    text = processor.tokenizer.decode(tokens)
    return f"[[{text}]]" if kind == "learned" else text


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]
