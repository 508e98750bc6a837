"""What a probe would predict that never sees an image: how often each thing is there, where things are on average.

Guessing the most frequent answer to a question is not all that can be had blindly. A probe answers all orders of a
`choose` question alike, and may say yes to every noun: its chance level is this.
"""

from functools import cache

import torch
from torch import Tensor

from acformer.lab.scenes.difficulty import Difficulty
from acformer.lab.scenes.layout import make_scene
from acformer.lab.scenes.targets import targets_of

SCENES = 2000  # of the train split


@cache
def prior_predictions(difficulty: Difficulty) -> dict[str, Tensor]:
    """As `SceneProbe` predicts of one image (no batch dimension), from the frequencies of train scenes.

    Every class is present (`exist` is yes: F1 2/3 of balanced questions), the likelier the more often it is there.
    """
    count = min(SCENES, difficulty.num_scenes("train"))
    targets = targets_of([make_scene(difficulty, "train", number) for number in range(count)])
    fewest, most = difficulty.objects
    often = torch.stack([(targets.counts == number).sum(0) for number in range(1, most + 1)], dim=-1)
    total = torch.stack([(targets.totals == number).sum() for number in range(fewest, most + 1)])
    return {
        "present": (targets.counts > 0).float().mean(0) + 1e-3,
        "place": targets.places.nanmean(0).nan_to_num(0.5),
        "size": targets.sizes.nanmean(0).nan_to_num(0.5),
        "count": often.float(),
        "total": total.float(),
    }
