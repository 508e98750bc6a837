"""Patch features as colours: three principal components a depth, alike from depth to depth and run to run (Sec. 3.2).

Principal components have no sign, and two of nearly equal variance change places from one block to the next. Unlike
the textbook's, these are turned: the components of a depth, scaled to one variance, are rotated or mirrored onto those
of the depth before (orthogonal Procrustes), so that a colour keeps its meaning along a row of maps.
"""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

NUM_COLOURS = 3


def pca_colours(features: Float[Tensor, "K N D"], within: Bool[Tensor, "N"] | None = None) -> UInt8[Tensor, "K N 3"]:
    """Red, green and blue of every patch at every depth.

    At a depth with patches X (N, D), centred: X = U S V^T, and U's first three columns, N (0, 1) up to a factor, are
    the components. The first depth's are signed so that their skewness is positive: the few patches that stand out
    are bright. Those of depth k become U_k R_k with R_k = argmin |U_k R - U_{k-1} R_{k-1}| over orthogonal R, which
    is A B^T of the singular vectors A, B of U_k^T U_{k-1} R_{k-1}. Each is then scaled from its least and greatest
    value to 0..255. A component without variance is 0.

    Args:
        features: (K, N, D) patches at K depths, from the first to the last.
        within: (N,) the patches that components and scale are made of, by default all; the others are coloured on
            the same scale, cut off at its ends (the padding around an image would else be the first component).

    Returns:
        (K, N, 3), 0..255.
    """
    within = torch.ones(features.shape[1], dtype=torch.bool) if within is None else within.cpu()
    maps: list[Tensor] = []
    for patches in features.cpu().double():
        components = _components(patches, within)
        components = components @ (_turn(components[within], maps[-1][within]) if maps else _signs(components[within]))
        maps.append(components)
    return torch.stack([_scaled(components, within) for components in maps])


def _components(patches: Tensor, within: Tensor) -> Tensor:
    """(N, 3) of unit length over the patches within; zeros beyond the rank."""
    centred = patches - patches[within].mean(dim=0)
    _, deviations, axes = torch.linalg.svd(centred[within], full_matrices=False)
    deviations, axes = deviations[:NUM_COLOURS], axes[:NUM_COLOURS]
    real = deviations > 1e-9 * deviations[:1].clamp_min(1e-300)
    scores = centred @ axes.T / deviations.where(real, 1) * real
    return torch.nn.functional.pad(scores, (0, NUM_COLOURS - scores.shape[1]))


def _signs(components: Tensor) -> Tensor:
    return (components**3).sum(dim=0).sign().add(0.5).sign().diag()


def _turn(components: Tensor, onto: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(components.T @ onto)
    return left @ right


def _scaled(components: Tensor, within: Tensor) -> Tensor:
    low, high = components[within].aminmax(dim=0)
    span = (high - low).where(high > low, 1)
    return ((components - low) / span * 255).round().clamp(0, 255).to(torch.uint8)
