"""What is added to the Hugging Face Trainer: one learning rate a module (a module without one is frozen), a budget of
visual tokens that may change at every step, batches of like length that a resume finds again, a stop before the first
step that is not finite, whole checkpoints.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback

from acformer.data.collate import ConversationDataset
from acformer.data.lengths import LengthGroupedSampler
from acformer.data.skip_log import SKIPPED
from acformer.errors import DivergedError, UsageError
from acformer.files import locked
from acformer.hf import AcFormerForConditionalGeneration
from acformer.hf.checkpoints import keep_newest, write_manifest
from acformer.training.elastic import ElasticBudget
from acformer.training.recipe import MODULES


def freeze(model: AcFormerForConditionalGeneration, learning_rates: dict[str, float]) -> str:
    """Only the named modules learn; returns the table of who does, with parameter counts.

    `UsageError` for a module of which the model has none (`fusion`, where that is `concat`).
    """
    refuse_missing_modules(model, learning_rates)
    lines = []
    for name, parameters in module_parameters(model).items():
        if not parameters:
            continue
        rate = learning_rates.get(name)
        for parameter in parameters:
            parameter.requires_grad_(rate is not None)
        count = sum(p.numel() for p in parameters)
        lines.append(f"{name:<15} {count / 1e6:9.2f} M  {'frozen' if rate is None else f'lr {rate:g}'}")
    return "\n".join(lines)


def refuse_missing_modules(model: AcFormerForConditionalGeneration, learning_rates: dict[str, float]) -> None:
    """`UsageError` for a named module of which the model has no weights."""
    groups = module_parameters(model)
    for name in learning_rates:
        if not groups[name]:
            raise UsageError(f"learning_rates.{name}: this model has no weights there; leave it out")


def module_parameters(model: AcFormerForConditionalGeneration) -> dict[str, list[nn.Parameter]]:
    """Every parameter of the model once, under the module that a recipe names; the head is the language model's."""
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in MODULES}
    for name, parameter in model.named_parameters():
        owner = next((module for module in MODULES if name.startswith(f"model.{module}.")), "language_model")
        groups[owner].append(parameter)
    return groups


class AcFormerTrainer(Trainer):
    """The Trainer with a learning rate a module, a frozen encoder kept in eval mode, and a budget of visual tokens."""

    optimizer: Any

    def __init__(self, *, learning_rates: dict[str, float], budget: ElasticBudget | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.learning_rates = learning_rates
        self.budget = budget
        self.sample_ids: list[str] = []  # of the step so far, which may have several batches
        # The Trainer would remove the older checkpoints before the new one has its manifest: `Guard` does it after.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.add_callback(Guard(self))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or what `optim` says) with one group a module and decay setting."""
        if self.optimizer is None:
            names = set(self.get_decay_parameter_names(self.model)) if self.args.weight_decay > 0 else set()
            decayed = {id(p) for n, p in self.model.named_parameters() if n in names}
            groups = []
            for module, parameters in module_parameters(self.model).items():
                if module not in self.learning_rates:
                    continue
                for decay in (self.args.weight_decay, 0.0):
                    chosen = [p for p in parameters if (id(p) in decayed) == (decay > 0)]
                    groups.append({"params": chosen, "lr": self.learning_rates[module], "weight_decay": decay})
                    if self.args.weight_decay == 0:
                        break
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class([group for group in groups if group["params"]], **kwargs)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Ours for `group_by_length`: the Trainer's wants items that are dicts and opens them all."""
        args, dataset = self.args, self.train_dataset if train_dataset is None else train_dataset
        if args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, ConversationDataset):
            return super()._get_train_sampler(train_dataset)
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthGroupedSampler(dataset.lengths(), rows, seed, lambda: int(self.state.epoch or 0))

    def compute_loss(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        """The model's loss; a loss that is not finite stops the run before anything is changed by it."""
        sample_ids = inputs.pop("sample_ids", [])
        self.sample_ids += sample_ids
        if self.budget is not None:
            inputs = self.budget(inputs, self.state.global_step)
        if "vision_tower" not in self.learning_rates:
            self.accelerator.unwrap_model(model).model.vision_tower.eval()
        result = super().compute_loss(model, {**inputs, "supervised_only": True}, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss):
            names = ", ".join(sample_ids)
            raise DivergedError(f"loss is {loss.item()} at step {self.state.global_step + 1}: samples {names}")
        return result


class Guard(TrainerCallback):
    """Stops before an optimizer step on gradients that are not finite; completes every checkpoint."""

    def __init__(self, trainer: AcFormerTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Gradients are looked at after clipping: one that is not finite has spread to all of them by then."""
        if args.fp16:
            return  # there the loss scaler skips such steps, and the first ones are expected to overflow
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            names = ", ".join(self.trainer.sample_ids)
            raise DivergedError(f"the gradient is not finite at step {state.global_step + 1}: samples {names}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The next batch belongs to another step."""
        self.trainer.sample_ids = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The manifest comes last, after every process has written: a checkpoint without one did not finish.

        Older checkpoints go only then, so that there is a whole one at any moment.
        """
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            checkpoint, skipped = folder / f"checkpoint-{state.global_step}", folder / SKIPPED
            if skipped.exists():
                with locked(skipped):
                    shutil.copy(skipped, checkpoint)
            write_manifest(checkpoint)
            keep_newest(folder, self.trainer.save_total_limit, state.global_step)
