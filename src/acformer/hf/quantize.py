"""A language model in few bits (QLoRA): bitsandbytes' layers in the place of its linear ones, all else as it is."""

import copy
from typing import Any

import torch

from acformer.errors import CheckpointError, UsageError, translated
from acformer.hf import AcFormerForConditionalGeneration

SKIPPED = ("model.vision_tower", "model.connector", "model.fusion")
"""Names from the start, as transformers matches them: `connector` alone would be ignored in silence."""


def check_bitsandbytes() -> None:
    """`UsageError` where bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        what = "quantize needs bitsandbytes, which is not installed: pip install 'acformer[quantize]'"
        raise UsageError(what) from error


def quantized(
    model: AcFormerForConditionalGeneration, kind: str, dtype: torch.dtype, device: str | torch.device
) -> AcFormerForConditionalGeneration:
    """The same model on `device`, the linear layers of its language model (not the head) in few bits.

    Args:
        kind: `nf4` (with quantised scales, as QLoRA) or `int8`.
        dtype: of the arithmetic.

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    check_bitsandbytes()
    from transformers import BitsAndBytesConfig

    skipped = [*SKIPPED, *model.head.names]
    options: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
        }
    with translated(f"cannot load the model in {kind}", CheckpointError):
        new = AcFormerForConditionalGeneration.from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict=model.state_dict(),
            dtype=model.dtype,
            device_map={"": torch.device(device)},
            quantization_config=BitsAndBytesConfig(**options, llm_int8_skip_modules=skipped),
        )
    new.generation_config = copy.deepcopy(model.generation_config)
    del new.config.quantization_config  # what is saved beside it is not in few bits
    return new
