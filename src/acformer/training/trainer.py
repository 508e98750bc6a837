"""What is added to the Hugging Face Trainer: one learning rate a module (a module without one is frozen), a budget of
visual tokens that may change at every step, batches of like length that a resume finds again, a stop before the first
step that is not finite, whole checkpoints.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME

from acformer.data.collate import ConversationDataset
from acformer.data.lengths import LengthGroupedSampler
from acformer.data.mixture import MixtureSampler
from acformer.errors import CheckpointError, DataError, DivergedError, UsageError, translated
from acformer.hf import AcFormerForConditionalGeneration
from acformer.hf.checkpoints import keep_newest, write_manifest
from acformer.training.distributed import load_sharded_optimizer, save_sharded_optimizer, set_up_fsdp
from acformer.training.elastic import ElasticBudget
from acformer.training.failures import LOADER_TIMEOUT
from acformer.training.progress import announced
from acformer.training.recipe import MODULES
from acformer.training.settings import check_settings
from acformer.training.stopping import StopOnSignal

Saver = Callable[[Path, Mapping[str, torch.Tensor]], None]
"""Writes some of a model's weights (by their names) into a folder."""


def freeze(model: AcFormerForConditionalGeneration, learning_rates: dict[str, float]) -> str:
    """Only the named modules learn; returns the table of who does, with parameter counts (`learning_table`).

    `UsageError` for a module of which the model has none (`fusion`, where that is `concat`).
    """
    check_modules(model, learning_rates)
    for name, parameters in module_parameters(model).items():
        for parameter in parameters:
            parameter.requires_grad_(name in learning_rates and parameter.is_floating_point())
    return learning_table(model, learning_rates)


def learning_table(model: AcFormerForConditionalGeneration, learning_rates: dict[str, float]) -> str:
    """A line a module: its parameters, how many of them learn, and at what rate."""
    lines = []
    for name, parameters in module_parameters(model).items():
        if not parameters:
            continue
        count, learning = (sum(p.numel() for p in parameters if p.requires_grad or every) for every in (True, False))
        rate = f"lr {learning_rates[name]:g}" if learning else "frozen"
        part = f" of which {learning / 1e6:.2f} M learn" if 0 < learning < count else ""
        lines.append(f"{name:<15} {count / 1e6:9.2f} M  {rate}{part}")
    return "\n".join(lines)


def check_modules(model: AcFormerForConditionalGeneration, learning_rates: dict[str, float]) -> None:
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
    """The Trainer with a learning rate a module, a frozen encoder kept in eval mode, and a budget of visual tokens.

    Args:
        learning_rates: a rate a module; one that is not named is frozen (`freeze`).
        budget: gives each step its number of visual tokens.
        complete: adds to a checkpoint's folder what is to be in it, before its manifest is written.
        kwargs: the Trainer's. `UsageError` for arguments that it would not do right (`acformer.training.settings`).
    """

    optimizer: Any

    def __init__(
        self,
        *,
        learning_rates: dict[str, float],
        budget: ElasticBudget | None = None,
        complete: Callable[[Path], None] | None = None,
        **kwargs: Any,
    ):
        check_settings(kwargs["args"])
        super().__init__(**kwargs)
        self.learning_rates = learning_rates
        self.budget = budget
        self.complete = complete
        self.save_weights: Saver | None = None
        self.saved_dtype: torch.dtype | None = None
        self.compile_layers = False
        self.is_saving = False
        self.sample_ids: list[str] = []  # of the step, which may have several batches
        # The Trainer would remove the older checkpoints before the new one has its manifest: we do it after.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.stop = StopOnSignal(self)
        if self.is_fsdp_enabled and isinstance(self.model, AcFormerForConditionalGeneration):
            set_up_fsdp(self.accelerator.state.fsdp_plugin, self.model)
        self.add_callback(StopOnBadGradient(self))
        self.add_callback(self.stop)

    @property
    def is_finished(self) -> bool:
        """All steps are done."""
        return self.state.global_step >= self.state.max_steps

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or what `optim` says) with one group a module and decay setting."""
        if self.optimizer is None:
            # Matrices decay, biases and norms do not; without decay there is one group a module.
            names = set(self.get_decay_parameter_names(self.model)) if self.args.weight_decay > 0 else set()
            decayed = {id(p) for n, p in self.model.named_parameters() if n in names}
            groups = []
            for module, parameters in module_parameters(self.model).items():
                if module not in self.learning_rates:
                    continue
                learning = [p for p in parameters if p.requires_grad]  # of a module with adapters, these alone
                for decay in (self.args.weight_decay, 0.0):
                    chosen = [p for p in learning if (id(p) in decayed) == (decay > 0)]
                    groups.append({"params": chosen, "lr": self.learning_rates[module], "weight_decay": decay})
                    if self.args.weight_decay == 0:
                        break
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class([group for group in groups if group["params"]], **kwargs)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's; a worker that hangs does not hang the run."""
        loader = super().get_train_dataloader()
        if self.args.dataloader_num_workers > 0:
            # accelerate wraps the loader: the one inside starts the workers and waits for them.
            getattr(loader, "base_dataloader", loader).timeout = LOADER_TIMEOUT
        return loader

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Ours for `group_by_length`, mixtures, streams: the Trainer's wants dicts and opens them all."""
        args, dataset = self.args, self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, ConversationDataset):
            return super()._get_train_sampler(train_dataset)
        if dataset.is_stream:
            return SequentialSampler(dataset)
        mixture, by_length = dataset.mixture(), args.train_sampling_strategy == "group_by_length"
        if not (mixture or by_length):
            return super()._get_train_sampler(train_dataset)
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        lengths = None
        if by_length:
            with announced("estimating the lengths of the samples"):
                lengths = dataset.lengths()
        if mixture:
            return MixtureSampler(*mixture, seed, self._epoch, lengths, rows)
        return LengthGroupedSampler(lengths or [], rows, seed, self._epoch)

    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any, **kwargs: Any) -> Any:
        """The batches of a step, cut to its number of visual tokens; and the number of tokens that it learns.

        `DataError` where the data ends early: the Trainer would take that for the end of an epoch.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
        if len(batches) < num_batches:
            step, last = self.state.global_step, self.state.max_steps
            raise DataError(f"the data ended early, after step {step} of {last}: an item raised StopIteration")
        self.sample_ids = [name for batch in batches for name in batch.get("sample_ids", ())]
        if self.budget is not None:
            batches = [self.budget(batch, self.state.global_step) for batch in batches]
        return batches, num_items

    def compute_loss(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        """The model's loss; a loss that is not finite stops the run before anything is changed by it."""
        sample_ids = inputs.pop("sample_ids", [])
        # At each step anew: the Trainer puts the whole model into training mode before it.
        if "vision_tower" not in self.learning_rates:
            self.accelerator.unwrap_model(model).model.vision_tower.eval()
        result = super().compute_loss(model, {**inputs, "supervised_only": True}, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss):
            names = ", ".join(sample_ids)
            raise DivergedError(f"loss is {loss.item()} at step {self.state.global_step + 1}: samples {names}")
        return result

    def check_weights(self) -> None:
        """`DivergedError` where the last step has made a weight infinite or NaN: such a model is not saved."""
        for module, parameters in module_parameters(self.model).items():
            if not all(torch.isfinite(p).all() for p in parameters if p.requires_grad):
                step = self.state.global_step
                raise DivergedError(f"a weight of {module} is not finite after step {step}; lower its learning rate")

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, and then its manifest, after every process has written: without one it did not finish.

        Older checkpoints go only then, so that there is a whole one at any moment.
        """
        self.check_weights()
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        self.is_saving = True
        try:
            with translated(f"cannot save {folder}", CheckpointError):
                super()._save_checkpoint(*args, **kwargs)
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nobody reads
                    if self.complete is not None:
                        self.complete(folder)
                    write_manifest(folder)
                    keep_newest(folder.parent, self.save_total_limit, step)
        finally:
            self.is_saving = False
        self.stop.saved_step = step

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As the Trainer's, unless `save_weights` says which weights; `saved_dtype` is what they are loaded in."""
        if self.save_weights is None:
            super()._save(output_dir, state_dict)
            if self.saved_dtype is not None and self.args.should_save:
                _write_dtype(Path(output_dir or self.args.output_dir), self.saved_dtype)
        elif self.args.should_save:
            self.save_weights(Path(output_dir or self.args.output_dir), state_dict or self.model.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        if self.save_weights is not None or self.is_fsdp_enabled:
            return  # the stage has put them into the model, before it was sharded
        with _going_on_from(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the Trainer's; of FSDP's shards one whole file, as one process has it."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_sharded_optimizer(self.model, self.optimizer, Path(output_dir), writes=self.args.should_save)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _going_on_from(checkpoint):
            if self.is_fsdp_enabled and checkpoint is not None:
                reads = self.is_world_process_zero()
                load_sharded_optimizer(self.model, self.optimizer, Path(checkpoint), reads=reads)
                state = torch.load(Path(checkpoint) / SCHEDULER_NAME, map_location="cpu", weights_only=True)
                self.lr_scheduler.load_state_dict(state)
                return
            super()._load_optimizer_and_scheduler(checkpoint)
            for parameter, state in self.optimizer.state.items():
                for name in {"exp_avg", "exp_avg_sq"} & state.keys():
                    if (shape := state[name].shape) != parameter.shape:  # would be noticed in the first step
                        raise ValueError(f"{name} has shape {tuple(shape)}, its weight {tuple(parameter.shape)}")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As the Trainer's; a process that the checkpoint does not know starts with a seed of its own."""
        world, rank = self.args.world_size, self.args.process_index
        name = "rng_state.pth" if world == 1 else f"rng_state_{rank}.pth"
        if checkpoint is not None and not (Path(checkpoint) / name).exists():
            # Another seed for every process and step, or all would draw the same dropout.
            set_seed((self.args.seed + 1_000_003 * self.state.global_step + rank) % 2**32)
            return
        with _going_on_from(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _going_on_from(checkpoint):
            super()._load_scaler(checkpoint)


def _write_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Into the config: where frozen weights are in half precision, the Trainer's would say that all are."""
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "dtype": str(dtype).removeprefix("torch.")}, indent=2), encoding="utf-8")


def _going_on_from(checkpoint: str | None) -> AbstractContextManager[None]:
    return translated(f"cannot go on from {checkpoint} (remove it, or give resume=false)", CheckpointError)


class StopOnBadGradient(TrainerCallback):
    """Stops before an optimizer step on gradients that are not finite."""

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
