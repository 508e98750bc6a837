"""Visual anchors: the patches that the [CLS] attention of an image encoder points at.

The paper's progressive search (Sec. 3.3, Fig. 3, Fig. 7) visits the heads in order; each takes its best-attended
patches that no earlier head has taken. A joint top-k over the heads is a different set: the order matters.
Two implementations with one signature: `select_anchors`, batched, for use; `select_anchors_reference`, the
paper's loop, never optimised, for the tests to compare with.

Both differ from the authors' release in two points. They return exactly `num_anchors` patches (the release gives
floor(num_anchors / H) * H; where H divides num_anchors the two agree index for index), and equal scores go to the
lower patch index (the release's sort is unstable there).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from acformer.errors import UsageError


def select_anchors(cls_attention: Float[Tensor, "B H N"], num_anchors: int) -> Int[Tensor, "B A"]:
    """Pick `num_anchors` distinct patches an image by the progressive search (Sec. 3.3).

    Head h of H takes floor(num_anchors / H) patches, one more while h < num_anchors mod H: its best-attended ones
    that heads 0..h-1 have left. Nothing here waits for the device, so it runs inside a compiled graph.

    Args:
        cls_attention: (B, H, N) attention of [CLS] to the N patches per head, any float dtype, any device.
        num_anchors: how many patches to keep, 1..N.

    Returns:
        (B, num_anchors) int64 patch indices in 0..N-1, ascending (raster order).

    Raises:
        ValueError: `num_anchors` outside 1..N (as `UsageError`); a NaN score in a CPU tensor. On an accelerator,
            where looking for NaN would wait for the device, and in a compiled graph NaN ranks below every number.
    """
    _check(cls_attention, num_anchors)
    batch, num_heads, num_patches = cls_attention.shape
    rank = _ranks(cls_attention)
    taken = torch.zeros(batch, num_patches, dtype=torch.int64, device=rank.device)
    for head, quota in enumerate(_quotas(num_anchors, num_heads)):
        # Ranks are distinct in 0..N-1, so + N puts every taken patch behind every free one, without ties.
        best = (rank[:, head] + num_patches * taken).topk(quota, largest=False, sorted=False).indices
        taken.scatter_(1, best, 1)
    return taken.argsort(dim=-1, descending=True, stable=True)[:, :num_anchors]


def select_anchors_reference(cls_attention: Float[Tensor, "B H N"], num_anchors: int) -> Int[Tensor, "B A"]:
    """The same search as the paper writes it: image by image, head by head, patch by patch (Fig. 7)."""
    _check(cls_attention, num_anchors)
    num_heads = cls_attention.shape[1]
    batch_anchors = []
    for image in cls_attention.tolist():
        anchors: list[int] = []
        for scores, quota in zip(image, _quotas(num_anchors, num_heads), strict=True):
            free = sorted((-score, patch) for patch, score in enumerate(scores) if patch not in anchors)
            anchors += [patch for _, patch in free[:quota]]
        batch_anchors.append(sorted(anchors))
    return torch.tensor(batch_anchors, dtype=torch.int64, device=cls_attention.device).reshape(-1, num_anchors)


def _quotas(num_anchors: int, num_heads: int) -> list[int]:
    """Patches per head, the remainder one each to the first heads; those beyond `num_anchors` get none."""
    base, remainder = num_anchors // num_heads, num_anchors % num_heads  # torch.compile knows no divmod
    return [base + (head < remainder) for head in range(num_heads)]


def _ranks(scores: Float[Tensor, "B H N"]) -> Int[Tensor, "B H N"]:
    """Place of every patch in its head's order, 0 = best; ties by index, NaN last (it sorts as the greatest)."""
    order = scores.detach().neg().argsort(dim=-1, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _check(cls_attention: Tensor, num_anchors: int) -> None:
    if cls_attention.ndim != 3:
        raise ValueError(f"cls_attention must be (batch, heads, patches), got {tuple(cls_attention.shape)}")
    num_patches = cls_attention.shape[-1]
    if not 1 <= num_anchors <= num_patches:
        raise UsageError(f"num_anchors must be in 1..{num_patches} (the number of patches), got {num_anchors}")
    can_wait = cls_attention.device.type == "cpu" and not torch.compiler.is_compiling()
    if can_wait and bool(cls_attention.isnan().any()):
        raise ValueError("cls_attention holds NaN: the encoder produced scores that are not numbers")
