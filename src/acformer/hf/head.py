"""The head of any language model: what its own class makes of the last hidden states.

Most heads are one matrix. Others have a bias, cap or scale the logits, or run a small network first, under names of
their own. None of that is rebuilt here: the forward pass of the language model's own class runs, with the hidden states
in the place of its body.
"""

import inspect
from dataclasses import make_dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from acformer.errors import UsageError
from acformer.hf.cache_name import CACHE

REQUIRED = {"inputs_embeds", "attention_mask", CACHE}
"""What the body of a language model must take: visual tokens among the embeddings, padding, a KV cache."""

UNFIT = {
    "deepseek_v4": "routes tokens to experts by the ids that visual tokens do not have",
    "minimax": "keeps a KV cache of its own kind, which generation with visual tokens does not make",
}
"""Language models that take embeddings, but cannot do with them alone."""


def body_name(model: PreTrainedModel) -> str:
    """The name under which a causal language model holds what `AutoModel` gives of it: `model`, `transformer`, ...

    Raises:
        UsageError: it is not a decoder of text alone that takes embeddings in place of ids and keeps a KV cache, its
            embeddings are of another width than its hidden states, or an encoder (BERT) is not set to decode.
    """
    kind, config = type(model).__name__, model.config
    body_class: Any = AutoModel._model_mapping.get(type(config), nn.Module)
    names = [name for name, child in model.named_children() if type(child) is body_class]
    takes = inspect.signature(body_class.forward).parameters
    if not names or not takes.keys() >= REQUIRED or config.get_text_config() is not config:
        raise UsageError(
            f"{kind} is not a language model that can read visual tokens: that is a decoder of text alone which takes "
            "embeddings in place of ids and keeps a KV cache, as Llama, Qwen, Gemma, Phi and GPT-2 are"
        )
    if config.model_type in UNFIT:
        raise UsageError(f"{kind} cannot read visual tokens: it {UNFIT[config.model_type]}")
    if getattr(config, "is_decoder", None) is False and "encoder_hidden_states" in takes:
        raise UsageError(f"{kind} reads both ways as it is configured, so it cannot generate: set is_decoder to true")
    width = model.get_input_embeddings().weight.shape[1]
    if width != config.hidden_size:
        raise UsageError(f"{kind} has embeddings of width {width} but hidden states of width {config.hidden_size}")
    return names[0]


class LanguageModelHead:
    """`head(owner, hidden)`: hidden states (B, L, E) -> logits (B, L, V).

    Its weights are the modules `names` of `owner`, under the names that the language model has for them, and so do not
    belong to this object: what replaces one of them there (an adapter, a quantised layer) is what runs.

    Args:
        model: a causal language model, of which its class and what its constructor has noted are kept.
    """

    def __init__(self, model: PreTrainedModel):
        self.body = body_name(model)
        self.names = [name for name, _ in model.named_children() if name != self.body]
        self.forward = type(model).forward
        self.numbers = {name: value for name, value in vars(model).items() if isinstance(value, int | float)}

    def __call__(self, owner: Any, hidden: Tensor) -> Tensor:
        """Called with modules that stand for the language model's own (see the class)."""
        language_model = owner.model.language_model
        parts = {name: getattr(owner, name) for name in self.names}
        parts[self.body] = _Body(language_model)
        model = _LanguageModel({**self.numbers, **parts, "config": language_model.config})
        return self.forward(model, inputs_embeds=hidden).logits

    def renamed(self, name: str) -> str:
        """A weight of the language model, as the whole model calls it."""
        part, _, rest = name.partition(".")
        return f"model.language_model.{rest}" if part == self.body else name


RETURNED = (
    "last_hidden_state", CACHE, "hidden_states", "attentions", "cross_attentions", "router_logits", "shared_kv_states",
)  # fmt: skip
_Hidden = make_dataclass("_Hidden", [(name, Any, None) for name in RETURNED], bases=(ModelOutput,))
"""What any body returns, of which a head wants the first."""


class _LanguageModel:
    """Stands in for the language model whose class's forward pass runs."""

    def __init__(self, parts: dict[str, Any]):
        for name, value in parts.items():  # one by one: torch.compile follows that
            setattr(self, name, value)


class _Body:
    """Stands in for a body, and for the decoder within it (OPT): returns the embeddings as the hidden states."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> ModelOutput:
        return _Hidden(last_hidden_state=inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return _Body(value) if isinstance(value, nn.Module) else value
