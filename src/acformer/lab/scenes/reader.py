"""Small heads that read a scene off the visual tokens: what the tokens still know, without a language model.

Every entry (noun or word) scores every token; the best tokens say whether it is there, and an average of the tokens
weighted by these scores says where, how large and how often. There is no attention among tokens and no depth: what
two tokens know together only, or what takes thought, is lost on it. A language model may do better or worse.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from acformer.lab.scenes.facts import Facts, entries
from acformer.lab.scenes.levels import Level

READER_VERSION = 2  # of heads, losses and the rules of `answers.py`: other scores, another number


class SceneReader(nn.Module):
    """(B, T, E) visual tokens -> what is there. W = `width` of the heads.

    A learned vector a slot stands for the position that a language model would give a token.
    """

    def __init__(self, level: Level, num_tokens: int, dim: int, width: int = 128):
        super().__init__()
        self.num_entries, self.num_nouns = len(entries(level)), len(level.nouns)
        self.lowest, highest = level.objects
        self.norm = nn.LayerNorm(dim)
        self.slots = nn.Parameter(0.1 * torch.randn(num_tokens, dim))
        self.score = nn.Linear(dim, self.num_entries)
        self.value = nn.Sequential(nn.Linear(dim, width), nn.GELU())
        self.place = nn.Linear(width, 2)
        self.size = nn.Linear(width, 1)
        self.count = nn.Linear(width + 2, highest)
        self.total = nn.Sequential(nn.Linear(width + 1, width), nn.GELU(), nn.Linear(width, highest - self.lowest + 1))

    def forward(self, tokens: Float[Tensor, "B T E"]) -> dict[str, Tensor]:
        """present (B, V) logits; place (B, V, 2), size (B, V) as in `Facts`; count (B, V, most), total (B, range)
        logits of classes, the first of which are 1 and the level's fewest objects."""
        tokens = self.norm(tokens)
        score = self.score(tokens).float().transpose(1, 2)  # (B, V, T)
        present = score.logsumexp(-1) - math.log(score.shape[-1])
        value = self.value(tokens + self.slots)
        pooled = score.softmax(-1).to(value.dtype) @ value  # (B, V, W)
        often = score.sigmoid().sum(-1)
        stats = torch.stack([present, often], dim=-1)
        crowd = often[:, : self.num_nouns].sum(-1, keepdim=True)
        return {
            "present": present,
            "place": self.place(pooled).float(),
            "size": self.size(pooled).squeeze(-1).float(),
            "count": self.count(torch.cat([pooled.float(), stats], dim=-1)).float(),
            "total": self.total(torch.cat([value.float().mean(1), crowd], dim=-1)).float(),
        }

    def loss(self, said: dict[str, Tensor], facts: Facts) -> Float[Tensor, ""]:
        """Sum of the heads' losses; those of an entry count where it is there (place, size: there once)."""
        there, alone = facts.counts > 0, ~facts.places[..., 0].isnan()
        sized = ~facts.sizes.isnan()
        present = F.binary_cross_entropy_with_logits(said["present"], there.float(), reduction="sum") / len(there)
        place = _mean((said["place"] - facts.places)[alone].abs())
        size = _mean((said["size"] - facts.sizes)[sized].abs())
        nouns = there.clone()
        nouns[:, self.num_nouns :] = False
        count = F.cross_entropy(said["count"][nouns], facts.counts[nouns] - 1)
        total = F.cross_entropy(said["total"], facts.totals - self.lowest)
        return present + 4 * place + 4 * size + count + total


def _mean(values: Tensor) -> Tensor:
    """0 of none: a few scenes may hold nothing that is there once."""
    return values.mean() if values.numel() else values.sum()
