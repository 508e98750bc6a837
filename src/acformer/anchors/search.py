"""Visual anchors: the patches that the [CLS] attention of an image encoder points at.

The paper's progressive search (Sec. 3.3, Fig. 3, Fig. 7) visits the heads in order; each takes its best-attended
patches that no earlier head has taken. A joint top-k over the heads is a different set: the order matters.
Two implementations with one signature: `select_anchors`, batched, for use (on a GPU with Triton a single kernel, see
`kernel.py`); `select_anchors_reference`, the paper's loop, never optimised, for the tests to compare with.

Both differ from the authors' release in two points. They return exactly `num_anchors` patches (the release gives
floor(num_anchors / H) * H; where H divides num_anchors the two agree index for index), and equal scores go to the
lower patch index (the release's sort is unstable there).
"""

import os
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from sysconfig import get_path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from acformer.errors import UsageError


def _has_triton() -> bool:
    """Triton, and the C compiler and headers with which it builds a kernel's launcher; slim images have neither."""
    compilers = os.environ.get("CC", ""), "cc", "gcc", "clang"
    headers = Path(get_path("include"), "Python.h")
    return find_spec("triton") is not None and any(map(which, compilers)) and headers.exists()


HAS_TRITON = _has_triton()
MAX_KERNEL_PATCHES = 4096


def select_anchors(cls_attention: Float[Tensor, "B H N"], num_anchors: int) -> Int[Tensor, "B A"]:
    """Pick `num_anchors` distinct patches an image by the progressive search (Sec. 3.3).

    Head h of H takes ceil((num_anchors - h) / H) patches, that is the same number for all and the remainder one each
    for the first: its best-attended ones that heads 0..h-1 have left. Nothing here waits for the device, so it runs
    inside a compiled graph or a CUDA graph.

    Args:
        cls_attention: (B, H, N) attention of [CLS] to the N patches per head, any float dtype, any device.
        num_anchors: how many patches to keep, 1..N.

    Returns:
        (B, num_anchors) int64 patch indices in 0..N-1, ascending (raster order).

    Raises:
        ValueError: `num_anchors` outside 1..N (as `UsageError`); a NaN score in a CPU tensor. On an accelerator, where
            looking for NaN would wait for the device, and in a compiled graph NaN ranks below every number.
    """
    _check(cls_attention, num_anchors)
    if _has_kernel(cls_attention):
        from acformer.anchors.kernel import select_anchors_triton

        return select_anchors_triton(cls_attention.detach(), num_anchors)
    return select_anchors_torch(cls_attention, num_anchors)


def select_anchors_torch(cls_attention: Float[Tensor, "B H N"], num_anchors: int) -> Int[Tensor, "B A"]:
    """`select_anchors` out of torch operations: three a head, whatever the batch."""
    num_heads = cls_attention.shape[1]
    keys = _sort_keys(cls_attention)  # (B, H, N)
    taken = torch.iinfo(keys.dtype).min
    anchors = []
    # `split` gives views, so that a head sees in its (B, 1, N) row what the heads before it have marked as taken.
    for row, quota in zip(keys.split(1, dim=1), quotas(num_anchors, num_heads), strict=True):
        best = row.topk(quota, sorted=False).indices  # (B, 1, quota)
        keys.scatter_(2, best.expand(-1, num_heads, -1), taken)  # in every head's row: nobody takes a patch twice
        anchors.append(best)
    return torch.cat(anchors, dim=-1).flatten(1).sort().values  # (B, 1, num_anchors) -> (B, num_anchors)


def select_anchors_reference(cls_attention: Float[Tensor, "B H N"], num_anchors: int) -> Int[Tensor, "B A"]:
    """The same search as the paper writes it: image by image, head by head, patch by patch (Fig. 7)."""
    _check(cls_attention, num_anchors)
    num_heads = cls_attention.shape[1]
    batch_anchors = []
    for image in cls_attention.tolist():
        anchors: list[int] = []
        for scores, quota in zip(image, quotas(num_anchors, num_heads), strict=True):
            free = sorted((-score, patch) for patch, score in enumerate(scores) if patch not in anchors)
            anchors += [patch for _, patch in free[:quota]]
        batch_anchors.append(sorted(anchors))
    return torch.tensor(batch_anchors, dtype=torch.int64, device=cls_attention.device).reshape(-1, num_anchors)


def quotas(num_anchors: int, num_heads: int) -> list[int]:
    """Patches that each head takes: ceil((num_anchors - head) / num_heads), from the first head on.

    Without a branch on the remainder, which would make every remainder another compiled graph.
    """
    return [(num_anchors + num_heads - 1 - head) // num_heads for head in range(num_heads)]


def _sort_keys(scores: Float[Tensor, "B H N"]) -> Int[Tensor, "B H N"]:
    """Distinct integers in the order of the scores, the lower index greater among equal ones, NaN least.

    `topk` promises nothing about equal scores; with these keys there are none. Without sorting: the bits of a float,
    read as an integer, rise with a positive float and fall with a negative one.
    """
    num_patches = scores.shape[-1]
    minus_index = torch.arange(0, -num_patches, -1, device=scores.device)  # (N,)
    if torch.onnx.is_in_onnx_export():  # which knows no bits of a float, and lets the lower index go first among equals
        return _scattered(scores.topk(num_patches).indices, minus_index)
    if scores.dtype == torch.float64:  # 64 bits leave no room for the index beside them
        return _scattered(scores.detach().neg().argsort(dim=-1, stable=True), minus_index)
    bits, least = scores.float().view(torch.int32), torch.iinfo(torch.int32).min
    # `least - bits` turns the order of the negative floats round, and maps -0.0, whose bits are `least`, to 0.
    rank = torch.where(bits < 0, least - bits, bits).masked_fill(scores.isnan(), least)
    return torch.add(minus_index, rank, alpha=num_patches)  # rank * N - index, in int64


def _scattered(order: Int[Tensor, "B H N"], keys: Int[Tensor, " N"]) -> Int[Tensor, "B H N"]:
    """The greatest key at the index that comes first."""
    return torch.empty_like(order).scatter_(-1, order, keys.expand_as(order))


def _has_kernel(scores: Tensor) -> bool:
    fits = scores.dtype != torch.float64 and scores.shape[-1] <= MAX_KERNEL_PATCHES
    return HAS_TRITON and scores.is_cuda and fits


def _check(cls_attention: Tensor, num_anchors: int) -> None:
    if cls_attention.ndim != 3:
        raise ValueError(f"cls_attention must be (batch, heads, patches), got {tuple(cls_attention.shape)}")
    check_num_anchors(num_anchors, cls_attention.shape[-1])
    refuse_nan(cls_attention, "cls_attention")


def check_num_anchors(num_anchors: int, num_patches: int, num_left: int = 0) -> None:
    """`UsageError` unless an image of `num_patches` has `num_anchors` to choose and `num_left` beside them."""
    most = num_patches - num_left
    if not 1 <= num_anchors <= most:
        less = f" less {num_left}" if num_left else ""
        raise UsageError(f"num_anchors must be in 1..{most} (the number of patches{less}), got {num_anchors}")


def refuse_nan(values: Tensor, name: str) -> None:
    """`ValueError` where `values` hold NaN and looking is free: on the CPU, outside a compiled graph."""
    can_wait = values.device.type == "cpu" and not torch.compiler.is_compiling()
    if can_wait and bool(values.isnan().any()):
        raise ValueError(f"{name} holds NaN: the encoder produced values that are not numbers")
