"""Every field of `TrainingArguments`: set by the recipe, allowed, or refused with the reason, before anything trains.

The Trainer has flags that go by a model's class name, that change the loss or the order of the data, or that make a
checkpoint which cannot be gone on from. What is not in these tables (a field of a later transformers) is refused too.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from acformer.errors import UsageError, unknown_name
from acformer.training.recipe import RESERVED, coerce

_ALLOWED = """
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps max_grad_norm
    lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon neftune_noise_alpha average_tokens_across_devices
    bf16 fp16 tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps full_determinism
    train_sampling_strategy data_seed dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
    save_strategy save_steps save_total_limit
    logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica disable_tqdm
    include_num_input_tokens_seen skip_memory_metrics
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    use_cpu accelerator_config fsdp fsdp_config deepspeed
    ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout
"""
_EVALUATION = """
    eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_do_concat_batches
    eval_use_gather_object per_device_eval_batch_size batch_eval_metrics include_for_metrics prediction_loss_only
    bf16_full_eval fp16_full_eval label_names load_best_model_at_end metric_for_best_model greater_is_better
    do_train do_eval do_predict
"""
_UPLOAD = "push_to_hub hub_token hub_model_id hub_private_repo hub_strategy hub_always_push hub_revision"
_RESUME = "ignore_data_skip save_only_model restore_callback_states_from_checkpoint"
_OWN_GROUPS = """
    galore_adamw galore_adamw_8bit galore_adafactor galore_adamw_layerwise galore_adamw_8bit_layerwise
    galore_adafactor_layerwise apollo_adamw apollo_adamw_layerwise
"""
_NOT_EVALUATED = "nothing is evaluated while a stage trains; run acformer eval on its model"
_NOT_UPLOADED = "nothing is uploaded while a run goes on, and no token is kept; upload the finished model's folder"
_NOT_RESUMED = "the run could not go on from its checkpoints as if it had never stopped"
_EVAL_SCHEDULE = "it follows a loss that nobody measures while a stage trains"

HINTS: dict[str, Any] = {"fsdp": bool | str | None}
"""Types of fields that take more than transformers' own hint says."""

ALLOWED = frozenset(_ALLOWED.split())
"""Fields that do here what they do in the Trainer, but for the values in the tables below."""

REFUSED = {
    **dict.fromkeys(_EVALUATION.split(), _NOT_EVALUATED),
    **dict.fromkeys(_UPLOAD.split(), _NOT_UPLOADED),
    **dict.fromkeys(_RESUME.split(), _NOT_RESUMED),
    "label_smoothing_factor": "the Trainer shifts labels for models that it knows by name, and would train this one to "
    "repeat each token",
    "use_liger_kernel": "there are no Liger kernels for this model",
    "liger_kernel_config": "there are no Liger kernels for this model",
    "use_cache": "keys and values are of no use while training",
    "auto_find_batch_size": "it would start again with half the batch from weights that have moved; give a batch size",
    "optim_target_modules": "parameters are grouped by learning_rates",
    "length_column_name": "lengths are estimated from the text",
    "debug": "its hooks cannot read masks; a loss or gradient that is not finite stops the run in any case",
    "enable_jit_checkpoint": "such a checkpoint would have no manifest; SIGTERM saves one in any case",
    "save_on_each_node": "one process writes a checkpoint, and its manifest",
    "parallelism_config": "a sequence is not split among processes",
    "local_rank": "torchrun and accelerate say which process this is",
}
"""Fields that are refused unless they have their default, and why."""

REFUSED_VALUES: dict[str, dict[Any, str]] = {
    "save_strategy": {"best": _NOT_EVALUATED},
    "lr_scheduler_type": {"reduce_lr_on_plateau": _EVAL_SCHEDULE, "greedy": _EVAL_SCHEDULE},
    "train_sampling_strategy": {"batch_rebalance": "it does not fit groups; take group_by_length"},
    "dataloader_in_order": {False: _NOT_RESUMED},
    "optim": {
        **dict.fromkeys(
            ("lomo", "adalomo"), "it steps while gradients are computed, before anyone has seen that they are finite"
        ),
        **dict.fromkeys(_OWN_GROUPS.split(), "it makes groups of its own, and every module has its learning rate here"),
        **dict.fromkeys(
            ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
            "the weights that it trains are not those to be saved",
        ),
    },
}
"""Values of allowed fields that are refused, and why."""

RULES: tuple[tuple[Callable[[TrainingArguments], bool], str], ...] = (
    (lambda a: a.per_device_train_batch_size < 1, "per_device_train_batch_size must be at least 1"),
    (lambda a: a.gradient_accumulation_steps < 1, "gradient_accumulation_steps must be at least 1"),
    (lambda a: a.max_steps == 0 or a.max_steps < -1, "max_steps must be at least 1 (or -1: num_train_epochs says it)"),
    (
        lambda a: a.max_steps < 0 and not 0 < a.num_train_epochs < math.inf,
        "num_train_epochs must be more than 0, or max_steps be given: nothing would be trained",
    ),
    (lambda a: a.save_strategy == "steps" and not a.save_steps > 0, "save_steps must be more than 0"),
    (
        lambda a: a.fp16 and a.device.type == "cpu",
        "fp16 does nothing on a CPU, which would train in float32; take bf16, or leave it out",
    ),
    (
        lambda a: bool(a.optim_args) and a.optim in ("adamw_torch", "adamw_torch_fused", "adafactor"),
        "optim_args is not read by this optim; there are adam_beta1, adam_beta2 and adam_epsilon",
    ),
    (
        lambda a: _other_than_default(a.accelerator_config) != [],
        "accelerator_config: of its keys only non_blocking may be set; the others change batches or their order",
    ),
    (
        lambda a: a.n_gpu > 1,  # the Trainer would fall back to DataParallel, whose threads share one vision tower
        "several GPUs are visible to one process: start one process a GPU (torchrun --nproc-per-node N -m acformer.cli "
        "train ...), or show one (CUDA_VISIBLE_DEVICES=0)",
    ),
)
"""What must not hold of the arguments together, and what to say if it does."""


def check_section(training: dict[str, Any]) -> None:
    """`UsageError` for a key of a recipe's `training` that there is not, that is not known here, or for its value."""
    hints = {**get_type_hints(TrainingArguments), **HINTS}
    for key, value in training.items():
        if key not in hints:
            raise unknown_name("training argument", key, ALLOWED & hints.keys())
        if key not in ALLOWED | REFUSED.keys() | RESERVED.keys():
            raise UsageError(f"training.{key} is newer than this version of acformer, which does not know what it does")
        _check_value(key, value)
        coerce(hints[key], value, f"training.{key}")
        if isinstance(value, float) and math.isnan(value):
            raise UsageError(f"training.{key} must be a number, got nan")


def check_settings(args: TrainingArguments) -> None:
    """`UsageError` for settings with which a run would not do what it says."""
    for field in fields(TrainingArguments):
        _check_value(field.name, getattr(args, field.name))
    for is_wrong, message in RULES:
        if is_wrong(args):
            raise UsageError(f"training.{message}")


def _check_value(name: str, value: Any) -> None:
    value = getattr(value, "value", value)  # of an enumeration
    reason = REFUSED_VALUES.get(name, {}).get(value) if isinstance(value, str | bool) else None
    if name in REFUSED and value and value != _defaults()[name]:  # nothing, no or 0 switches it off
        reason = REFUSED[name]
    if reason is not None:
        shown = "" if name == "hub_token" else f" {value}"
        raise UsageError(f"training.{name}{shown}: {reason}")


@functools.cache
def _defaults() -> dict[str, Any]:
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(TrainingArguments)
    }


def _other_than_default(config: AcceleratorConfig) -> list[str]:
    given, default = config.to_dict(), AcceleratorConfig().to_dict()
    return [key for key in given if key != "non_blocking" and given[key] != default[key]]
