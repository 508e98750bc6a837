"""Pins: a visitor's own say in which patches become anchors, through the scores that the search reads anyway.

Nothing in a model knows of them: the [CLS] attention in `VisionFeatures` is changed, and any search over it follows.
"""

from dataclasses import dataclass

from acformer.errors import UsageError
from acformer.vision.features import VisionFeatures

PINNED, LEAST = 1e30, 1e-20  # both so that damping by neighbours, `spaced`, leaves pinned > free > removed


@dataclass(frozen=True)
class Pins:
    """Patches, in raster order from 0, that shall be anchors (`pinned`) and that shall not (`removed`)."""

    pinned: frozenset[int] = frozenset()
    removed: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.pinned or self.removed)

    def __str__(self) -> str:
        counts = {"pinned": len(self.pinned), "removed": len(self.removed)}
        return ", ".join(f"{count} {state}" for state, count in counts.items() if count)

    def toggled(self, patch: int) -> "Pins":
        """The patch in its next state: free, pinned, removed, free again."""
        if patch in self.pinned:
            return Pins(self.pinned - {patch}, self.removed | {patch})
        return Pins(self.pinned if patch in self.removed else self.pinned | {patch}, self.removed - {patch})


def apply_pins(features: VisionFeatures, pins: Pins) -> VisionFeatures:
    """The features of one image with scores that a search must follow.

    With e = 10^-20, head by head: A' = max(A, e) for free patches, max(A, e) + 10^30 max_n A' for
    pinned ones, 0 for removed ones. So K anchors hold all pinned patches if these are at most K, and no removed one
    if N - |removed| is at least K, also where a choice takes score from its neighbours (`spaced`); among free patches
    the order stays (but for scores below e). Scores stay >= 0.

    Raises:
        UsageError: no [CLS] attention, or a patch outside 0..N-1.
    """
    if not pins:
        return features
    if features.cls_attention is None:
        raise UsageError("this encoder gives no [CLS] attention, so there are no anchors to pin")
    scores = features.cls_attention.float().clamp_min(LEAST)
    if outside := [patch for patch in pins.pinned | pins.removed if not 0 <= patch < scores.shape[-1]]:
        raise UsageError(f"patch {outside[0]} is outside the image's {scores.shape[-1]} patches")
    best = scores.amax(dim=-1, keepdim=True)
    scores[..., sorted(pins.pinned)] += PINNED * best
    scores[..., sorted(pins.removed)] = 0
    return features._replace(cls_attention=scores)
