"""Scenes as tensors: what small heads learn to tell from the visual tokens, without a language model."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from acformer.lab.scenes.layout import SIDE, Scene, Thing, size_share
from acformer.lab.scenes.levels import Level

NUMBER = "<number>"  # any printed number: telling one from another is not asked of the heads


class Facts(NamedTuple):
    """Of B scenes. V entries: the level's nouns, its words, and any number (`entries`).

    counts (B, V): how many times an entry is there. places (B, V, 2) and sizes (B, V): centre (x, y) in 0..1 and the
    share of the level's size range, NaN unless it is there once. total (B,): objects.
    """

    counts: Int[Tensor, "B V"]
    places: Float[Tensor, "B V 2"]
    sizes: Float[Tensor, "B V"]
    totals: Int[Tensor, "B"]


def entries(level: Level) -> list[str]:
    """What the heads can name: nouns first, then words, then any number."""
    return [*(noun.name for noun in level.nouns), *level.words, NUMBER]


def facts_of(scenes: list[Scene]) -> Facts:
    """What is there, as the heads shall say it; all scenes of one level."""
    level = scenes[0].level
    index = {name: number for number, name in enumerate(entries(level))}
    count = torch.zeros(len(scenes), len(index), dtype=torch.int64)
    place, size = torch.full((*count.shape, 2), torch.nan), torch.full(count.shape, torch.nan)
    for row, scene in enumerate(scenes):
        for thing in (*scene.objects, *scene.words):
            entry = index.get(thing.text, len(index) - 1)
            count[row, entry] += 1
            alone = count[row, entry] == 1
            place[row, entry] = torch.tensor([thing.x / SIDE, thing.y / SIDE]) if alone else torch.nan
            size[row, entry] = _share(thing, scene) if alone else torch.nan
    total = torch.tensor([len(scene.objects) for scene in scenes])
    return Facts(count, place, size, total)


def _share(thing: Thing, scene: Scene) -> float:
    return size_share(thing, scene.level) if thing in scene.objects else torch.nan
