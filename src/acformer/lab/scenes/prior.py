"""What heads would say that never see a picture: how often each thing is there, where things are on average.

Guessing the most frequent answer to a question is not all that can be had blindly. Heads answer all orders of a
`choose` question alike, and may say yes to every noun: their floor is this.
"""

from functools import cache

import torch
from torch import Tensor

from acformer.lab.scenes.facts import facts_of
from acformer.lab.scenes.layout import make_scene
from acformer.lab.scenes.levels import Level

SCENES = 2000  # of the train split


@cache
def prior_said(level: Level) -> dict[str, Tensor]:
    """As `SceneReader` says it of one picture (no batch dimension), from the frequencies of train scenes.

    Every entry is said to be there (`exist` is yes: F1 2/3 of balanced questions), the likelier the more often it is.
    """
    facts = facts_of([make_scene(level, "train", number) for number in range(min(SCENES, level.num_scenes("train")))])
    frequency = (facts.counts > 0).float().mean(0)
    most = level.objects[1]
    often = torch.stack([(facts.counts == number).sum(0) for number in range(1, most + 1)], dim=-1)
    total = torch.stack([(facts.totals == number).sum() for number in range(level.objects[0], most + 1)])
    return {
        "present": frequency + 1e-3,
        "place": facts.places.nanmean(0).nan_to_num(0.5),
        "size": facts.sizes.nanmean(0).nan_to_num(0.5),
        "count": often.float(),
        "total": total.float(),
    }
