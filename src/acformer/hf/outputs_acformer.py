"""What the models return: the language model's output and the visual tokens that it read."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class AcFormerModelOutput(BaseModelOutputWithPast):
    """As the language model's output; `image_hidden_states`: (images * T, E) visual tokens."""

    image_hidden_states: Tensor | None = None


@dataclass
class AcFormerCausalLMOutput(CausalLMOutputWithPast):
    """`loss` (scalar), `logits` (B, L, V), cache, and what was asked for; visual tokens as in the model's output."""

    image_hidden_states: Tensor | None = None
