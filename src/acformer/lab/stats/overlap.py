"""The overlap of Sec. 3.2: are the patches that stand out in the feature map those that [CLS] attends to?

The paper reports up to 69.38 % over 500 images and defines neither "activated" nor "salient". Here both are the best
patches of a score, as many as a share of all patches says, so that chance is known: of whatever patches are activated,
a random salient set of share q holds q on average (the mean of a hypergeometric distribution). The share is varied,
and so are the scores, because the number means nothing without them.

The main pair is `pca3` against `anchors`. `pca3` is how far a patch lies from the mean patch in the space of the first
three principal components: the components are what the paper's feature maps show, and the distance, unlike a
brightness, does not depend on the components' signs. `anchors` is the set that the model would be given.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from acformer.anchors.search import select_anchors
from acformer.lab.figures.pca import pca_colours

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
MAIN = ("pca3", "anchors")
ACTIVATIONS = {
    "pca3": "distance from the mean patch within the first three principal components",
    "pc1": "the same within the first component alone",
    "brightness": "sum of the colours that `acformer visualize` draws",
    "deviation": "distance from the mean patch in all dimensions",
    "norm": "L2 norm of the patch, nothing removed",
}
SALIENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "anchors": lambda attention: attention,
    "mean": lambda attention: attention.mean(dim=0, keepdim=True),
    "max": lambda attention: attention.amax(dim=0, keepdim=True),
}


def activation_scores(patches: Float[Tensor, "N D"]) -> dict[str, Float[Tensor, "N"]]:
    """Every score of `ACTIVATIONS` for the patches of one image."""
    centred = patches - patches.mean(dim=0)
    left, deviations, _ = torch.linalg.svd(centred, full_matrices=False)
    components = left * deviations
    return {
        "pca3": components[:, :3].norm(dim=-1),
        "pc1": components[:, 0].abs(),
        "brightness": pca_colours(patches[None])[0].float().sum(dim=-1),
        "deviation": centred.norm(dim=-1),
        "norm": patches.norm(dim=-1),
    }


def overlaps(patches: Float[Tensor, "N D"], attention: Float[Tensor, "H N"]) -> dict[str, float]:
    """|activated ∩ salient| / |activated| of one image, by `overlap_name`.

    The main pair at every two shares of `SHARES`, all other pairs where both shares are the same. A share q of N
    patches is round(q N) of them, at least one; `anchors` takes them by the progressive search over the H heads,
    `mean` and `max` are a joint top-k of the heads' mean and greatest attention. Equal scores: the lower index.
    """
    counts = {share: max(1, round(share * len(patches))) for share in SHARES}
    activated = {
        name: {share: _best(score[None], count) for share, count in counts.items()}
        for name, score in activation_scores(patches).items()
    }
    salient = {
        name: {share: _best(rows(attention), count) for share, count in counts.items()}
        for name, rows in SALIENCES.items()
    }
    return {
        overlap_name(feature, row, ours, theirs): len(first & second) / len(first)
        for feature, first_by_share in activated.items()
        for row, second_by_share in salient.items()
        for ours, first in first_by_share.items()
        for theirs, second in second_by_share.items()
        if ours == theirs or (feature, row) == MAIN
    }


def overlap_name(activation: str, salience: str, activated: float, salient: float) -> str:
    """`overlap_pca3_anchors_20_10`: the best 20 % of the feature map against the best 10 % of the attention."""
    return f"overlap_{activation}_{salience}_{100 * activated:g}_{100 * salient:g}"


def _best(rows: Tensor, count: int) -> set[int]:
    return set(select_anchors(rows[None], count)[0].tolist())
