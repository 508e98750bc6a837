"""What becomes of the patches that were not chosen: a few means of similar ones, or one weighted mean of all.

Unlike token merging inside an encoder (ToMe), this happens once, after it, and the chosen patches stay as they are.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from acformer.anchors.selectors import without_autocast


def take(patches: Float[Tensor, "B N D"], index: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    """The patches at an image's own indices."""
    return patches.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def merge_rest(patches: Float[Tensor, "B N D"], index: Int[Tensor, "B K"], num: int) -> Float[Tensor, "B M D"]:
    """`num` means of the N - K >= num patches not in `index` (contextual tokens; VisionZip, Yang et al. 2025).

    Every floor(i (N - K) / num)-th of the rest is a target; each other patch joins its most similar target (cosine);
    a token is the mean of a target and those that joined it. Differs from VisionZip in comparing R_v, not the
    encoder's keys, which do not leave it; its release adds the mean of those that joined to the target.
    """
    size = patches.shape[1] - index.shape[1]  # N - K
    free = torch.ones(patches.shape[:2], dtype=torch.int64, device=patches.device).scatter(1, index, 0)  # (B, N)
    # The ones first, in order: their indices without waiting for the device, as `nonzero` would. No two keys are equal.
    keys = free * patches.shape[1] - torch.arange(patches.shape[1], device=patches.device)  # (B, N)
    rest = take(patches, keys.topk(size, dim=-1).indices)  # (B, N-K, D)
    target = torch.arange(num, device=patches.device) * size // num  # (M,), the same places in every image's rest
    unit = F.normalize(rest.float(), dim=-1)
    joins_itself = torch.arange(size, device=patches.device).unsqueeze(-1) == target  # (N-K, M)
    with without_autocast(patches.device):
        similarity = (unit @ unit[:, target].mT).masked_fill(joins_itself, torch.inf)  # (B, N-K, M)
        members = F.one_hot(similarity.argmax(dim=-1), num).mT.float()  # (B, M, N-K)
        return (members @ rest.float() / members.sum(dim=-1, keepdim=True)).to(patches.dtype)  # (B, M, D)


def fuse_rest(
    patches: Float[Tensor, "B N D"], index: Int[Tensor, "B K"], weight: Float[Tensor, "B N"]
) -> Float[Tensor, "B 1 D"]:
    """sum_n w_n R_n / sum_n w_n over the patches not in `index` (fused token; EViT, Liang et al. 2022).

    Differs from EViT in dividing by the weights' sum, so that the token is as long as the others.
    """
    weight = weight.float().scatter(1, index, 0).unsqueeze(1)  # (B, N) -> (B, 1, N), 0 at the chosen ones
    total = weight.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)  # no attention at all: not 0 / 0
    with without_autocast(patches.device):
        return (weight / total @ patches.float()).to(patches.dtype)  # (B, 1, D)
