"""A stage's `training` section as `TrainingArguments`; what of it cannot work is refused before any stage trains.

The Trainer itself looks at many settings only when it is built, or later: stage 1 would be trained by then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_type_hints

import torch
from torch import nn
from transformers import PretrainedConfig, TrainingArguments

from acformer.errors import UsageError, unknown_name
from acformer.training.recipe import StageSpec, coerce
from acformer.training.trainer import AcFormerTrainer

_NOT_EVALUATED = "nothing is evaluated while a stage trains; run acformer eval on its model"
REFUSED = {
    "eval_strategy": _NOT_EVALUATED,
    "eval_on_start": _NOT_EVALUATED,
    "load_best_model_at_end": _NOT_EVALUATED,
    "use_liger_kernel": "there are no Liger kernels for this model",
    "enable_jit_checkpoint": "such a checkpoint would have no manifest; give save_steps",
}
"""Keys of `TrainingArguments` that only fit another trainer, and why."""
COUNTS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def training_arguments(spec: StageSpec, folder: Path, seed: int, progress: bool) -> TrainingArguments:
    """The recipe's `training` section over our defaults; `UsageError` for what does not exist or does not fit."""
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
    _refuse_settings(spec.training)
    with fitting():
        args = TrainingArguments(**{**defaults, **spec.training})
    if args.n_gpu > 1:  # the Trainer would fall back to DataParallel, whose threads share one vision tower
        raise UsageError(
            f"{args.n_gpu} GPUs are visible to one process: start one process a GPU (torchrun --nproc-per-node "
            f"{args.n_gpu} -m acformer.cli train ...), or show one (CUDA_VISIBLE_DEVICES=0)"
        )
    return args


def _refuse_settings(training: dict) -> None:
    """What can be told from the section alone."""
    hints = get_type_hints(TrainingArguments)
    for key, value in training.items():
        if key not in hints:
            raise unknown_name("training argument", key, hints)
        coerce(hints[key], value, f"training.{key}")
        if key in REFUSED and value not in (None, False, "no"):
            raise UsageError(f"training.{key} {value}: {REFUSED[key]}")
        if key in COUNTS and value < 1:
            raise UsageError(f"training.{key} must be at least 1, got {value}")
    if training.get("save_strategy") == "best":
        raise UsageError(f"training.save_strategy best: {_NOT_EVALUATED}")
    if training.get("train_sampling_strategy") == "batch_rebalance":
        raise UsageError("training.train_sampling_strategy batch_rebalance does not fit groups: take group_by_length")


@contextmanager
def fitting() -> Iterator[None]:
    """An error of transformers' about its arguments (a package that is missing, values that exclude one another)."""
    try:
        yield
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"training arguments do not fit: {error}") from error


class _OneWeight(nn.Linear):
    """The smallest model that a Trainer takes."""

    config = PretrainedConfig()

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)


def refuse_unfit(spec: StageSpec, seed: int) -> None:
    """`UsageError` for what the Trainer would stumble over: it is built here for a model of one weight.

    Random numbers are drawn: seed afterwards.
    """
    with TemporaryDirectory() as folder:
        args = training_arguments(spec, Path(folder), seed, progress=False)
        args.push_to_hub = False  # a repository would be made
        args.train_sampling_strategy = "random"  # another would look at the data
        with fitting():
            rates = {"language_model": args.learning_rate}
            trainer = AcFormerTrainer(model=_OneWeight(), args=args, learning_rates=rates, train_dataset=[0])
            trainer.get_train_dataloader()
            trainer.create_optimizer_and_scheduler(num_training_steps=1000)
