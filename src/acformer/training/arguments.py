"""A stage's `training` section as `TrainingArguments`, checked before any stage trains.

The Trainer itself looks at many settings only when it is built, or later: stage 1 would be trained by then.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import PretrainedConfig, TrainingArguments

from acformer.errors import UsageError, translated
from acformer.training.recipe import StageSpec
from acformer.training.settings import check_section
from acformer.training.trainer import AcFormerTrainer


def training_arguments(spec: StageSpec, folder: Path, seed: int, progress: bool) -> TrainingArguments:
    """The recipe's `training` section over our defaults; `UsageError` for what does not exist or does not fit.

    What does not go together is the trainer's to refuse (`check_settings`).
    """
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
    check_section(spec.training)
    with fitting():
        return TrainingArguments(**{**defaults, **spec.training})


def fitting() -> AbstractContextManager[None]:
    """An error of transformers' about its arguments (a package that is missing, values that exclude one another)."""
    return translated("training arguments do not fit", UsageError, ImportError, RuntimeError, TypeError, ValueError)


class _OneWeight(nn.Linear):
    """The smallest model that a Trainer takes."""

    config = PretrainedConfig()

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)


def check_arguments(spec: StageSpec, seed: int) -> None:
    """`UsageError` for what the Trainer would stumble over: it is built here for a model of one weight.

    Random numbers are drawn: seed afterwards.
    """
    with TemporaryDirectory() as folder:
        args = training_arguments(spec, Path(folder), seed, progress=False)
        args.train_sampling_strategy = "random"  # another would look at the data
        with fitting():
            rates = {"language_model": args.learning_rate}
            trainer = AcFormerTrainer(model=_OneWeight(), args=args, learning_rates=rates, train_dataset=[0])
            trainer.get_train_dataloader()
            trainer.create_optimizer_and_scheduler(num_training_steps=1000)
