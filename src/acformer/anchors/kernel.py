"""The progressive search as one Triton kernel: an image a program, all its heads in order (Sec. 3.3).

No sort. A score becomes an integer of the same order, its key; bisection over the keys finds that of the quota-th best
free patch, counting at every step how many reach the middle; patches of a greater key are taken, and of those with
this very key the ones of lowest index. Steps end as soon as exactly the quota is above, at most 32 a head. The free
patches stay in registers from head to head, so scores are read once and the anchors written once, whatever the number
of heads.

`select_anchors` comes here for CUDA tensors; `select_anchors_torch` gives the same answer everywhere, in 3 H launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST = tl.constexpr(-(2**31))


@triton.jit
def progressive_search(  # type: ignore[no-untyped-def]
    scores,
    anchors,
    image_stride,
    head_stride,
    patch_stride,
    num_anchors,
    num_heads,
    num_patches,
    BLOCK: tl.constexpr,
):
    """Anchors of image `program_id`: scores (B, H, N) of any strides -> anchors (B, num_anchors) int64, contiguous."""
    image = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK)  # a power of two; what lies beyond `num_patches` is never free
    inside = patch < num_patches
    free = inside
    for head in range(tl.minimum(num_heads, num_anchors)):
        quota = (num_anchors + num_heads - 1 - head) // num_heads
        row = scores + image * image_stride + head * head_stride
        key = _sort_keys(tl.load(row + patch * patch_stride, mask=inside, other=0.0), free)
        threshold = _threshold(key, quota)
        above = key > threshold
        tied = (key == threshold).to(tl.int32)
        missing = quota - tl.sum(above.to(tl.int32), axis=0)  # so many of the tied are taken, the first ones
        free = free & (key < threshold) | (tied == 1) & (tl.cumsum(tied, axis=0) > missing)
    chosen = (inside & ~free).to(tl.int32)
    position = tl.cumsum(chosen, axis=0) - 1  # of a chosen patch among the chosen ones: raster order
    tl.store(anchors + image * num_anchors + position, patch.to(tl.int64), mask=chosen == 1)


@triton.jit
def _sort_keys(score, free):
    """Integers in the order of the scores; -0 equals 0, NaN is below all numbers, a taken patch below that."""
    score = score.to(tl.float32)
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, LEAST - bits, bits)
    key = tl.where(score == score, key, LEAST + 1)
    return tl.where(free, key, LEAST)


@triton.jit
def _threshold(key, quota):
    """The greatest key that at least `quota` patches reach, or a lower one that the same patches reach."""
    low, high = tl.min(tl.maximum(key, LEAST + 1), axis=0), tl.max(key, axis=0) + 1
    reached = quota + 1
    while (low + 1 < high) & (reached != quota):
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        count = tl.sum((key >= middle).to(tl.int32), axis=0)
        enough = count >= quota
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        reached = tl.where(enough, count, reached)
    return low


@torch.library.custom_op("acformer::select_anchors", mutates_args=())
def select_anchors_triton(cls_attention: Tensor, num_anchors: int) -> Tensor:
    """`select_anchors` without its checks: (B, H, N) float32, bf16 or fp16 -> (B, num_anchors) int64, ascending.

    An operator of its own, so that `torch.compile` and export take it whole, with a dynamic number of anchors.
    """
    batch, num_heads, num_patches = cls_attention.shape
    anchors = cls_attention.new_empty((batch, num_anchors), dtype=torch.int64)
    block = triton.next_power_of_2(num_patches)
    with torch.cuda.device_of(cls_attention):
        progressive_search[(batch,)](
            cls_attention,
            anchors,
            *cls_attention.stride(),
            num_anchors,
            num_heads,
            num_patches,
            BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )
    return anchors


@select_anchors_triton.register_fake
def _(cls_attention: Tensor, num_anchors: int) -> Tensor:
    return cls_attention.new_empty((cls_attention.shape[0], num_anchors), dtype=torch.int64)
