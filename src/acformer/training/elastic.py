"""Elastic budget: training in which every step has its own number of visual tokens, so that one checkpoint serves all.

No weight of an elastic connector depends on T, but a model that has seen one T alone was not taught the others. Here T
is drawn anew for each optimizer step, uniformly from a range: of the seed and the step alone, so it is the same in
every process, whatever the loader does, and after a resume. Samples are encoded once, with the longest run of image
tokens; a step drops what its T leaves over. Unlike Matryoshka models, which nest a few fixed sizes in one another, any
T of the range is trained, and its anchors are searched for anew.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from acformer.connectors import Connector
from acformer.data.collate import padding_id
from acformer.data.conversation import IGNORE
from acformer.errors import UsageError


def sample_budget(choices: Sequence[int], seed: int, step: int) -> int:
    """T of an optimizer step, uniform over the choices; of the seed and the step alone."""
    return random.Random(f"{seed} {step}").choice(choices)


@dataclass(frozen=True)
class ElasticBudget:
    """`budget(batch, step)` -> the batch with the number of visual tokens of that step.

    choices: the numbers that are drawn from, ascending. processor: that which encoded the samples, at the largest.
    """

    choices: tuple[int, ...]
    seed: int
    processor: Any

    def sample(self, step: int) -> int:
        """T of an optimizer step, uniform over the choices."""
        return sample_budget(self.choices, self.seed, step)

    def __call__(self, batch: Mapping[str, Any], step: int) -> dict[str, Any]:
        """input_ids, attention_mask and labels (B, L) cut to the step's T, and `num_visual_tokens` for the model."""
        num_tokens = self.sample(step)
        # Under gated cross-attention both are 1, and nothing is dropped.
        written, wanted = map(self.processor.count_placeholders, (self.choices[-1], num_tokens))
        places = batch["input_ids"] == self.processor.image_token_id  # (B, L)
        # The image tokens of a row are numbered through; of each run of `written`, the first `wanted` stay.
        dropped = places & ((places.cumsum(1) - 1) % written >= wanted)
        fill = {"input_ids": padding_id(self.processor.tokenizer), "attention_mask": 0, "labels": IGNORE}
        text = drop_positions(dropped, {key: batch[key] for key in fill}, fill)
        return {**batch, **text, "num_visual_tokens": num_tokens}


def elastic_choices(connector: Connector, low: int, high: int) -> tuple[int, ...]:
    """The numbers of tokens in low..high that the connector can give: it is asked for each, with features of zeros.

    Raises:
        UsageError: the connector is not elastic, or cannot give `low` or `high`.
    """
    if not connector.elastic:
        name, always = type(connector).__name__, connector.num_tokens
        raise UsageError(f"elastic: {name} always gives {always} tokens; take an elastic connector, say acformer")
    choices, zeros = [], connector.zero_features()
    for num_tokens in range(low, high + 1):
        try:
            with torch.no_grad():
                connector(zeros, num_tokens)
        except UsageError as error:
            if num_tokens in (low, high):
                raise UsageError(f"elastic range {low}..{high}: {num_tokens} tokens do not fit: {error}") from error
        else:
            choices.append(num_tokens)
    return tuple(choices)


def drop_positions(
    dropped: Bool[Tensor, "B L"], text: Mapping[str, Tensor], fill: Mapping[str, int]
) -> dict[str, Tensor]:
    """The rows of a padded batch without the dropped positions, padded on the right again to the longest of them."""
    kept = text["attention_mask"].bool() & ~dropped
    lengths = kept.sum(1, keepdim=True)  # (B, 1)
    # A stable sort puts what is kept to the front of each row, in its order: (B, longest of the rows).
    order = (~kept).long().argsort(dim=1, stable=True)[:, : int(lengths.max())]
    padding = torch.arange(order.shape[1], device=order.device) >= lengths  # (B, longest)
    return {key: value.gather(1, order).masked_fill(padding, fill[key]) for key, value in text.items()}
