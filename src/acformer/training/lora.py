"""Low-rank adapters of the language model (LoRA) and its frozen weights in few bits (QLoRA), as a recipe has them.

PEFT makes the adapters. Where a stage has them, `learning_rates.language_model` is their rate: the language model's own
weights are frozen. The connector beside them is trained whole.
"""

from dataclasses import dataclass
from typing import Any

from acformer.errors import UsageError, translated, unknown_name

QUANTIZED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
"""Bytes of a weight as bitsandbytes keeps it; nf4 has a float32 scale for 64 of them."""


@dataclass
class LoraSpec:
    """Adapters W x + (alpha / r) B A x, A of r rows: r (in + out) weights for a layer of in x out.

    dropout: of x, in training. targets: `language_model`, which is all its linear layers but the head, or the last
    names of some of them (`[q_proj, v_proj]`).
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: str | list = "language_model"


def check_adapters(stage: str, lora: LoraSpec | None, quantize: str | None, learning_rates: dict) -> None:
    """`UsageError` for adapters or a quantisation that nothing can be trained with."""
    trains = "language_model" in learning_rates
    if quantize is not None and quantize not in QUANTIZED:
        raise unknown_name(f"{stage}.quantize", quantize, QUANTIZED)
    if quantize is not None and trains and lora is None:
        raise UsageError(f"{stage}.quantize: {quantize} weights cannot be trained; add {stage}.lora={{}}")
    if lora is None:
        return
    if not trains:
        raise UsageError(f"{stage}.lora: give {stage}.learning_rates.language_model, the adapters' learning rate")
    for key in ("r", "alpha"):
        if getattr(lora, key) < 1:
            raise UsageError(f"{stage}.lora.{key} must be at least 1, got {getattr(lora, key)}")
    if not 0 <= lora.dropout < 1:
        raise UsageError(f"{stage}.lora.dropout must be in 0..1, 1 excluded, got {lora.dropout}")
    names = lora.targets if isinstance(lora.targets, list) else [lora.targets]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UsageError(f"{stage}.lora.targets must be language_model or a list of layers' names, got {lora.targets}")


def lora_targets(model: Any, targets: str | list) -> list[str]:
    """Full names of the language model's linear layers that `targets` means; `UsageError` where one means none."""
    from torch import nn

    prefix = "model.language_model."
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in linear if name.startswith(prefix)]
    if targets == "language_model":
        if not inside:
            raise UsageError("lora.targets: this language model has no linear layers to adapt")
        return inside
    last = {name.rpartition(".")[2] for name in inside}
    wanted = [targets] if isinstance(targets, str) else targets
    for name in wanted:
        if name not in last:
            raise unknown_name("linear layer of the language model under lora.targets", name, {*last, "language_model"})
    return [name for name in inside if name.rpartition(".")[2] in wanted]


def check_peft() -> None:
    """`UsageError` where PEFT is not installed, or older than the installed transformers wants it."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UsageError("lora needs PEFT, which is not installed: pip install 'acformer[peft]'") from error
    import transformers
    from transformers.integrations import peft as theirs

    with translated(f"lora, with transformers {transformers.__version__}", UsageError, ValueError):
        theirs.check_peft_version(min_version=theirs.MIN_PEFT_VERSION)


def add_adapters(model: Any, lora: LoraSpec) -> None:
    """Adapters into the model, in place; of its language model they alone learn, of the rest what did before.

    Raises:
        UsageError: PEFT is not installed, or a target that the language model has not.
    """
    check_peft()
    from peft import LoraConfig

    options = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora_targets(model, lora.targets)
    )
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_adapter(options)  # which freezes all else
    for name, parameter in model.named_parameters():
        if not name.startswith(("model.language_model.", "lm_head.")):
            parameter.requires_grad_(name in learning)
