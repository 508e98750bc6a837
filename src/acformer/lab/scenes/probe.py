"""A small probe that predicts a scene from the visual tokens: what they still hold, without a language model.

Every class (noun or word) scores every token; the best tokens say whether it is there, and an average of the tokens
weighted by these scores says where, how large and how often. There is no attention among tokens and no depth: what
two tokens know together only, or what takes thought, is lost on it. A language model may do better or worse.

With `attends` one layer of self-attention over the T tokens comes first: a language model mixes tokens, and a connector
should not lead only because it has done so beforehand.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from acformer.connectors.attention import MultiHeadAttention
from acformer.lab.scenes.difficulty import Difficulty
from acformer.lab.scenes.targets import SceneTargets, class_names

PROBE_VERSION = 2  # of architecture, losses and the rules of `answers.py`: other scores, another number
MIXING_VERSION = 2  # of `Mixing`, which one of the probes has


class SceneProbe(nn.Module):
    """(B, T, E) visual tokens -> what is there. V classes, W = `width` of the hidden layers.

    A learned vector a slot stands for the position that a language model would give a token. num_tokens: the most
    tokens that it is given. attends: the tokens are `Mixing` first.
    """

    def __init__(self, difficulty: Difficulty, num_tokens: int, dim: int, width: int = 128, attends: bool = False):
        super().__init__()
        self.num_classes, self.num_nouns = len(class_names(difficulty)), len(difficulty.nouns)
        self.fewest, most = difficulty.objects
        self.norm = nn.LayerNorm(dim)
        self.slots = nn.Parameter(0.1 * torch.randn(num_tokens, dim))
        self.score: nn.Module = nn.Linear(dim, self.num_classes)
        self.value = nn.Sequential(nn.Linear(dim, width), nn.GELU())
        self.place = nn.Linear(width, 2)
        self.size = nn.Linear(width, 1)
        self.count = nn.Linear(width + 2, most)
        self.total = nn.Sequential(nn.Linear(width + 1, width), nn.GELU(), nn.Linear(width, most - self.fewest + 1))
        self.mixing = Mixing(dim) if attends else None

    def slots_of(self, num_tokens: int) -> Float[Tensor, "T E"]:
        """All of them; for fewer tokens as many, evenly spread from the first to the last."""
        if num_tokens == len(self.slots):
            return self.slots
        return self.slots[torch.linspace(0, len(self.slots) - 1, num_tokens).round().long()]

    def forward(self, tokens: Float[Tensor, "B T E"]) -> dict[str, Tensor]:
        """present (B, V) logits; place (B, V, 2), size (B, V) as in `SceneTargets`; count (B, V, most) and
        total (B, range) logits of classes, the first of which are 1 and the difficulty's fewest objects."""
        given, tokens, slots = tokens, self.norm(tokens), self.slots_of(tokens.shape[1])
        if self.mixing is not None:
            tokens = self.mixing(tokens, slots)
        score = self.score(tokens).float().transpose(1, 2)  # (B, V, T)
        present = score.logsumexp(-1) - math.log(score.shape[-1])  # (B, V)
        value = self.value(tokens + slots)  # (B, T, W)
        weights = score.softmax(-1)  # (B, V, T)
        pooled = weights.to(value.dtype) @ value  # (B, V, W)
        often = score.sigmoid().sum(-1)  # (B, V) a soft count of the tokens that show the class
        stats = torch.stack([present, often], dim=-1)  # (B, V, 2)
        num_things = often[:, : self.num_nouns].sum(-1, keepdim=True)  # (B, 1)
        return {
            "present": present,
            "place": self.place(pooled).float(),
            "size": self.size(pooled).squeeze(-1).float(),
            "count": self.count(torch.cat([pooled.float(), stats], dim=-1)).float(),
            "total": self.total(torch.cat([value.float().mean(1), num_things], dim=-1)).float(),
            **self.more(given, weights),
        }

    def more(self, tokens: Float[Tensor, "B T E"], weights: Float[Tensor, "B V T"]) -> dict[str, Tensor]:
        """What a probe with further losses predicts besides; tokens as given, weights: of the mean of each class."""
        return {}

    def loss(self, predictions: dict[str, Tensor], targets: SceneTargets) -> Float[Tensor, ""]:
        """Sum of the losses; those of a class count where it is there (place, size: there once)."""
        there, single = targets.counts > 0, ~targets.places[..., 0].isnan()
        sized = ~targets.sizes.isnan()
        logits = predictions["present"]
        present = F.binary_cross_entropy_with_logits(logits, there.float(), reduction="sum") / len(there)
        place = _mean((predictions["place"] - targets.places)[single].abs())
        size = _mean((predictions["size"] - targets.sizes)[sized].abs())
        nouns = there.clone()
        nouns[:, self.num_nouns :] = False
        count = F.cross_entropy(predictions["count"][nouns], targets.counts[nouns] - 1)
        total = F.cross_entropy(predictions["total"], targets.totals - self.fewest)
        return present + 4 * place + 4 * size + count + total


class Mixing(nn.Module):
    """x + SA(query = key = x + slots, value = x), which starts as x: every token may read every other one, once."""

    def __init__(self, dim: int, num_heads: int = 4):
        super().__init__()
        self.attention = MultiHeadAttention(dim, num_heads)
        # Mixed at random from the start, tokens are told apart much later: after 4,500 steps `acformer` had 42 for 69.
        nn.init.zeros_(self.attention.o_proj.weight)
        nn.init.zeros_(self.attention.o_proj.bias)

    def forward(self, tokens: Float[Tensor, "B T E"], slots: Float[Tensor, "T E"]) -> Float[Tensor, "B T E"]:
        """(B, T, E) -> (B, T, E)."""
        placed = tokens + slots
        return tokens + self.attention(placed, placed, tokens)


def _mean(values: Tensor) -> Tensor:
    """0 of none: a few scenes may hold nothing that is there once."""
    return values.mean() if values.numel() else values.sum()
