"""A probe whose classes are a language model's own words: it teaches a connector to say what is there in them.

As `SceneProbe`, but a token is scored by the embeddings of the nouns and words in place of learned directions, and what
the tokens of a class come to is drawn to its embedding. A pre-trained language model then reads the tokens as words of
its own, before it has seen an image.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from acformer.lab.scenes.difficulty import Difficulty
from acformer.lab.scenes.probe import SceneProbe
from acformer.lab.scenes.targets import SceneTargets


class WordProbe(SceneProbe):
    """(B, T, E) visual tokens -> what is there, as `SceneProbe`; `words`: (V, E), an embedding for each class.

    Directions are those of the embeddings less their mean, since all of them share much; one scale is learned for all,
    a bias for each.
    """

    words: Tensor

    def __init__(self, difficulty: Difficulty, num_tokens: int, words: Float[Tensor, "V E"]):
        super().__init__(difficulty, num_tokens, words.shape[-1])
        self.register_buffer("words", words.float(), persistent=False)
        self.score = WordScores(words.float())

    def more(self, tokens: Float[Tensor, "B T E"], weights: Float[Tensor, "B V T"]) -> dict[str, Tensor]:
        """`seen`, (B, V, E): the mean of the tokens themselves, weighted by each class's scores."""
        return {"seen": weights @ tokens.float()}

    def loss(self, predictions: dict[str, Tensor], targets: SceneTargets) -> Float[Tensor, ""]:
        """That of `SceneProbe`, and how far the tokens of the classes that are there are from their embeddings."""
        there = targets.counts > 0
        wanted = self.words.expand(len(there), -1, -1)[there]  # (classes that are there, E)
        distance = (predictions["seen"][there] - wanted).square().sum(-1) / wanted.square().sum(-1)
        return super().loss(predictions, targets) + distance.mean()


class WordScores(nn.Module):
    """(..., E) -> (..., V): scale * token . direction + bias; directions (V, E) of unit length, which do not learn."""

    directions: Tensor

    def __init__(self, words: Float[Tensor, "V E"]):
        super().__init__()
        self.register_buffer("directions", F.normalize(words - words.mean(0), dim=-1), persistent=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.full((len(words),), -3.0))  # few of the classes are there

    def forward(self, tokens: Float[Tensor, "... E"]) -> Float[Tensor, "... V"]:
        """The scores of every class."""
        return self.scale * F.linear(tokens, self.directions.to(tokens.dtype)) + self.bias
