"""Whether a model can be trained on packed rows: its language model is asked, not looked up in a list."""

from typing import Any

import torch
from torch import Tensor

from acformer.data.packing import Packing
from acformer.errors import UsageError
from acformer.hf import AcFormerForConditionalGeneration
from acformer.training.recipe import StageSpec

LENGTH = 6
REMEDY = "leave packing out (train_sampling_strategy: group_by_length pads little)"


def stage_packing(spec: StageSpec, model: AcFormerForConditionalGeneration) -> Packing | None:
    """How a stage's rows are laid out; None without `packing`."""
    if not spec.packing:
        return None
    text = model.config.text_config
    kernel = getattr(model.model.language_model.config, "_attn_implementation", None) or ""
    return Packing(spec.max_length, text.hidden_size, in_one_row="flash" in kernel)


def check_packing(model: AcFormerForConditionalGeneration) -> None:
    """`UsageError` unless the language model keeps the samples of a row apart, and reads each as if it were alone."""
    if model.config.fusion != "concat":
        raise UsageError(f"packing: under fusion {model.config.fusion} a sample would see another's images; {REMEDY}")
    if any(parameter.is_meta for parameter in model.model.language_model.parameters()):
        return  # a process that waits for the weights of another one, which looks
    name = type(model.model.language_model).__name__
    first, second, other = _three_sentences(model)
    together = _states(model, first, second)[:, LENGTH:]
    # Another row is summed in another order: far less than what a token of another sample would change.
    tolerance = (1e-3 if together.dtype == torch.float32 else 5e-2) * float(together.float().std())
    if _differ(together, _states(model, other, second)[:, LENGTH:], tolerance):
        raise UsageError(f"packing: in {name} a sample would see the one before it in its row; {REMEDY}")
    if _differ(together, _states(model, second), tolerance):
        raise UsageError(f"packing: {name} does not number the positions of each sample from 0; {REMEDY}")


def _three_sentences(model: AcFormerForConditionalGeneration) -> Any:
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(size, (3, 1, LENGTH), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


@torch.no_grad()
def _states(model: AcFormerForConditionalGeneration, *sentences: Tensor) -> Tensor:
    """(1, L, E) of the sentences in one row."""
    language_model, was_training = model.model.language_model, model.training
    places = torch.cat([torch.arange(LENGTH, device=model.device) for _ in sentences])[None]
    embeddings = model.get_input_embeddings()(torch.cat(sentences, dim=1))
    model.eval()
    try:
        return language_model(inputs_embeds=embeddings, position_ids=places, use_cache=False).last_hidden_state
    finally:
        model.train(was_training)


def _differ(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return not bool(((a - b).abs().max() <= tolerance).item())  # NaN differs
