"""One step of training: what the benches time, and what trains a probe. Models are trained by `acformer.training`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Arithmetic in half precision, the weights as they are; nothing changes where `dtype` is float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def training_step(
    compute_loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, *, max_grad_norm: float | None = None
) -> Tensor:
    """Forward, backward, update; no gradient is left afterwards. Returns the loss, detached."""
    loss = compute_loss()
    loss.backward()
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
