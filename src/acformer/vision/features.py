"""`VisionFeatures`: the one form in which every connector receives an image, whatever encoder it came from."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class VisionFeatures(NamedTuple):
    """What an encoder knows about a batch of images (Sec. 3.1).

    tokens: (B, P+N, D) output R_v of the feature layer, no final LayerNorm; prefix tokens ([CLS], registers) first.
    cls_attention: (B, H, N) attention A of [CLS] to the patches in the same block; None where the encoder has none.
    grid: (h, w) patches, h * w = N.
    num_prefix_tokens: P, 0 for SigLIP.
    hidden_layers: (B, K, P+N, D) of the K further layers that were asked for (`Connector.hidden_layers`, in its order);
        None where it is the feature layer alone.
    """

    tokens: Float[Tensor, "B L D"]
    cls_attention: Float[Tensor, "B H N"] | None
    grid: tuple[int, int]
    num_prefix_tokens: int
    hidden_layers: Float[Tensor, "B K L D"] | None = None

    @property
    def arrays(self) -> dict[str, Tensor]:
        """The tensors by name, those that are there: what a cache keeps of a batch, a row an image."""
        found = {"tokens": self.tokens, "cls_attention": self.cls_attention, "hidden_layers": self.hidden_layers}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def patches(self) -> Float[Tensor, "B N D"]:
        """(B, N, D): the tokens without the prefix."""
        return self.tokens[:, self.num_prefix_tokens :]

    def rows(self, chosen: Sequence[int]) -> "VisionFeatures":
        """Those of some of the images, in that order."""
        row, hidden_layers, chosen = self.cls_attention, self.hidden_layers, list(chosen)
        return self._replace(
            tokens=self.tokens[chosen],
            cls_attention=None if row is None else row[chosen],
            hidden_layers=None if hidden_layers is None else hidden_layers[chosen],
        )
