"""How visual tokens reach the language model: in its sequence (Fusion B, eq. 3) or beside it (Fusion A, eq. 2).

`concat`: they take the positions of the prompt's image tokens, T of them an image, and cost as much as text does.
`gated_cross_attention` (Flamingo): the prompt holds one image token that marks the position; blocks before the decoder
layers read the visual tokens by cross-attention. It costs no sequence length and no KV cache, but new weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from acformer.connectors.blocks import CrossAttention, FeedForward
from acformer.errors import UsageError
from acformer.registry import Registry, check_options


class CrossAttentionInputs(NamedTuple):
    """What the cross-attention blocks of one pass read.

    states: (B, S, E) visual tokens of each row's images. mask: (B, 1, L, S) which of them a text position may read
    (all, where it may read none). has_image: (B, L, 1) whether it may read any.
    """

    states: Float[Tensor, "B S E"]
    mask: Bool[Tensor, "B 1 L S"]
    has_image: Bool[Tensor, "B L 1"]


class Fusion(nn.Module, ABC):
    """Base of both; made for a language model, whose layers it may hook."""

    reads_every_step = False
    """Whether generation needs the visual tokens at every step, not for the prompt alone."""

    @staticmethod
    @abstractmethod
    def count_placeholders(num_tokens: int) -> int:
        """Image tokens that the prompt holds for an image of `num_tokens` visual tokens."""

    @abstractmethod
    def gather(self, image_mask: Bool[Tensor, "B L"], per_image: Sequence[Tensor]) -> dict[str, Tensor]:
        """`forward`'s further arguments for these images, (T, E) each, in the order of their image tokens."""

    @abstractmethod
    def forward(
        self, embeddings: Float[Tensor, "B L E"], image_mask: Bool[Tensor, "B L"] | None, **images: Tensor
    ) -> tuple[Float[Tensor, "B L E"], dict[str, Any]]:
        """What the language model is called with: its sequence and further arguments.

        Args:
            embeddings: of the prompt.
            image_mask: where the prompt has image tokens.
            **images: what `gather` gave; without them, text alone.
        """

    @abstractmethod
    def zero_loss(self) -> Tensor | float:
        """0, as a function of every weight (see `Connector.zero_loss`)."""


class Concat(Fusion):
    """LM_in = the prompt with its image tokens replaced by visual tokens (eq. 3 and 6): LLaVA's way, no weights."""

    def __init__(self, language_model: PreTrainedModel):
        super().__init__()

    @staticmethod
    def count_placeholders(num_tokens: int) -> int:
        """T."""
        return num_tokens

    def gather(self, image_mask: Bool[Tensor, "B L"], per_image: Sequence[Tensor]) -> dict[str, Tensor]:
        """All images in a row: (images * T, E)."""
        return {"visual_tokens": torch.cat(list(per_image))}

    def forward(
        self, embeddings: Float[Tensor, "B L E"], image_mask: Bool[Tensor, "B L"] | None, **images: Tensor
    ) -> tuple[Float[Tensor, "B L E"], dict[str, Any]]:
        """Visual tokens where the prompt has image tokens, text embeddings elsewhere."""
        if image_mask is None or not images:
            return embeddings, {}
        # Row by row, (B, L, 1): the n-th image token of the batch becomes the n-th visual token.
        return embeddings.masked_scatter(image_mask.unsqueeze(-1), images["visual_tokens"].to(embeddings)), {}

    def zero_loss(self) -> float:
        """0: there is no weight."""
        return 0.0


class GatedCrossAttentionBlock(nn.Module):
    """x + tanh(a) Attn(LN(x), LN(V)), then x + tanh(f) FF(LN(x)); both gates start at 0, where this is x itself."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, ff_mult: float):
        super().__init__()
        self.attention = CrossAttention(dim, num_heads, head_dim)
        self.feed_forward = FeedForward(dim, ff_mult)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "B L E"], inputs: CrossAttentionInputs) -> Float[Tensor, "B L E"]:
        """(B, L, E) -> (B, L, E); a position that has no image to read stays as it is."""
        has_image = inputs.has_image.to(x.dtype)
        x = x + has_image * self.attention_gate.tanh() * self.attention(x, inputs.states, inputs.mask)
        return x + has_image * self.feed_forward_gate.tanh() * self.feed_forward(x)

    @torch.no_grad()
    def init_gates(self) -> None:
        """Gates to 0, unless they were just loaded: the language model says what it said before."""
        init.zeros_(self.attention_gate)
        init.zeros_(self.feed_forward_gate)


class GatedCrossAttention(Fusion):
    """T_h = G(query = T, key = value = V) before every `every`-th decoder layer (eq. 2; Flamingo, arXiv 2204.14198).

    A text position reads the visual tokens of all images of its row that stand at or before it, as it would under
    `concat`; one before the first image, and every row without an image, passes untouched. Differs from Flamingo in
    reading all earlier images of the row (there: the last one alone), in normalising V (there its Perceiver has done
    so), and in leaving a position without an image wholly alone (there the feed-forward still acts on it).

    Args:
        language_model: a Hugging Face decoder with a list `layers` that hands its keyword arguments to them, as
            Llama, Qwen, Mistral, Gemma, Phi and SmolLM do.
        every: 1 puts a block before each decoder layer, 4 before the first, fifth, ninth, ...
        num_heads, head_dim, ff_mult: of the blocks.

    Raises:
        UsageError: another kind of language model.
    """

    reads_every_step = True

    def __init__(
        self,
        language_model: PreTrainedModel,
        *,
        every: int = 1,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_mult: float = 4,
    ):
        super().__init__()
        self.dim = language_model.config.hidden_size
        layers = dict(language_model.named_children()).get("layers")
        if not isinstance(layers, nn.ModuleList):
            raise _unsupported(language_model)
        self.blocks = nn.ModuleList()
        for number, layer in enumerate(layers):
            block = None if number % every else GatedCrossAttentionBlock(self.dim, num_heads, head_dim, ff_mult)
            if block is not None:
                self.blocks.append(block)
            # Layers without a block are hooked too: they would not know the argument `cross_attention_inputs`.
            layer.register_forward_pre_hook(partial(_before_layer, block), with_kwargs=True)

    @staticmethod
    def count_placeholders(num_tokens: int) -> int:
        """1: it marks where the image stands."""
        return 1

    def gather(self, image_mask: Bool[Tensor, "B L"], per_image: Sequence[Tensor]) -> dict[str, Tensor]:
        """`cross_attention_states` (B, K, T, E), zeros where a row has fewer than K images; `_mask` (B, K)."""
        counts = image_mask.sum(1)  # (B,) images of each row
        tokens = torch.stack(list(per_image))  # (images, T, E)
        mask = torch.arange(int(counts.max()), device=image_mask.device) < counts.unsqueeze(1)  # (B, K)
        states = tokens.new_zeros(*mask.shape, *tokens.shape[1:])  # (B, K, T, E)
        states = states.masked_scatter(mask.unsqueeze(-1).unsqueeze(-1).to(states.device), tokens)
        return {"cross_attention_states": states, "cross_attention_mask": mask}

    def forward(
        self, embeddings: Float[Tensor, "B L E"], image_mask: Bool[Tensor, "B L"] | None, **images: Tensor
    ) -> tuple[Float[Tensor, "B L E"], dict[str, Any]]:
        """The embeddings as they are, and what the blocks read.

        A row's images that are not in `image_mask` stand before it, in the part of the row that the KV cache holds.
        """
        if image_mask is None or not images:
            return embeddings, {"cross_attention_inputs": None}
        states = images["cross_attention_states"]  # (B, K, T, E)
        num_images, num_tokens = states.shape[1:3]
        in_cache = images["cross_attention_mask"].sum(1) - image_mask.sum(1)  # (B,) images
        count = (in_cache.unsqueeze(1) + image_mask.cumsum(1)).unsqueeze(-1)  # (B, L, 1) images at or before a position
        has_image = count > 0
        mask = torch.arange(num_images, device=count.device) < count  # (B, L, K)
        # A position without an image reads all, and its result is multiplied by 0: an empty softmax would be NaN.
        mask = (mask | ~has_image).repeat_interleave(num_tokens, dim=-1).unsqueeze(1)  # (B, 1, L, K T)
        inputs = CrossAttentionInputs(states.flatten(1, 2).to(embeddings), mask, has_image)  # states (B, K T, E)
        return embeddings, {"cross_attention_inputs": inputs}

    def zero_loss(self) -> Tensor:
        """Every block once, on one position of zeros."""
        x = next(self.parameters()).new_zeros(1, 1, self.dim)
        has_image = torch.ones(1, 1, 1, dtype=torch.bool, device=x.device)
        inputs = CrossAttentionInputs(x, has_image.unsqueeze(1), has_image)
        for block in self.blocks:
            x = block(x, inputs)
        return 0 * x.sum()


FUSIONS = Registry[type[Fusion]](
    "fusion", "acformer.fusions", {"concat": Concat, "gated_cross_attention": GatedCrossAttention}
)


def build_fusion(name: str, language_model: PreTrainedModel, **kwargs: Any) -> Fusion:
    """A new fusion for a language model; `UsageError`: unknown name or option, or a number that is not positive."""
    check_options(f"fusion {name!r}", FUSIONS[name], kwargs)
    return FUSIONS[name](language_model, **kwargs)


def _before_layer(
    block: GatedCrossAttentionBlock | None, layer: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """Decoder layers are called with `cross_attention_inputs`, which their own code need not know."""
    if "cross_attention_inputs" not in kwargs:
        raise _unsupported(layer)
    kwargs = dict(kwargs)
    inputs = kwargs.pop("cross_attention_inputs")
    if block is None or inputs is None:
        return args, kwargs
    return (block(args[0], inputs), *args[1:]), kwargs


def _unsupported(module: nn.Module) -> UsageError:
    return UsageError(
        f"gated_cross_attention cannot be put into {type(module).__name__}: it needs a language model with `layers` "
        "that hands its keyword arguments to them (Llama, Qwen, Mistral, ...); use fusion: concat"
    )
