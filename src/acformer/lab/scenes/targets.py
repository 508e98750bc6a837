"""Scenes as tensors: what a probe learns to predict from the visual tokens, without a language model."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from acformer.lab.scenes.difficulty import Difficulty
from acformer.lab.scenes.layout import SIDE, Scene, size_share

NUMBER = "<number>"  # any printed number: telling one from another is not asked of the probe


class SceneTargets(NamedTuple):
    """Of B scenes. V classes: the difficulty's nouns, its words, and any number (`class_names`).

    counts (B, V): how many times a class is there. places (B, V, 2) and sizes (B, V): centre (x, y) in 0..1 and the
    share of the difficulty's size range, NaN unless it is there once. totals (B,): objects.
    """

    counts: Int[Tensor, "B V"]
    places: Float[Tensor, "B V 2"]
    sizes: Float[Tensor, "B V"]
    totals: Int[Tensor, "B"]

    def to(self, device: torch.device) -> "SceneTargets":
        """On another device."""
        return SceneTargets(*(value.to(device) for value in self))


def class_names(difficulty: Difficulty) -> list[str]:
    """What a probe can name: nouns first, then words, then any number."""
    return [*(noun.name for noun in difficulty.nouns), *difficulty.words, NUMBER]


def targets_of(scenes: list[Scene]) -> SceneTargets:
    """What a probe should predict of scenes of one difficulty."""
    difficulty = scenes[0].difficulty
    index = {name: number for number, name in enumerate(class_names(difficulty))}
    counts = torch.zeros(len(scenes), len(index), dtype=torch.int64)
    places, sizes = torch.full((*counts.shape, 2), torch.nan), torch.full(counts.shape, torch.nan)
    for row, scene in enumerate(scenes):
        for thing in (*scene.objects, *scene.words):
            name = index.get(thing.text, index[NUMBER])
            counts[row, name] += 1
            single = counts[row, name] == 1
            places[row, name] = torch.tensor([thing.x / SIDE, thing.y / SIDE]) if single else torch.nan
            sizes[row, name] = size_share(thing, difficulty) if single and thing in scene.objects else torch.nan
    return SceneTargets(counts, places, sizes, torch.tensor([len(scene.objects) for scene in scenes]))
