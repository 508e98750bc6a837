"""`downsample`: a smaller image, and then every patch of it.

The baseline that a designed connector must beat: it is the only one that spares the encoder's work as well. Unlike
every other connector it reads features of `input_grid`, not of the geometry's grid.
"""

from jaxtyping import Float
from torch import Tensor

from acformer.connectors.base import Geometry
from acformer.connectors.blocks import Projector
from acformer.connectors.grid_connector import GridConnector
from acformer.errors import UsageError
from acformer.vision.features import VisionFeatures


class DownsampleConnector(GridConnector):
    """The image itself is made smaller before the encoder, then LLaVA's MLP takes every patch that is left.

    Proj(Encoder(resize(I))): an image of h' x w' patches, T = h' w', [CLS] and registers dropped. (h', w') is what
    `token_grid` makes of `num_tokens`, so the aspect changes as little as T allows (144 of 24 x 24: 12 x 12, an
    image of 168 px for CLIP's 336). The model shrinks the pixels that the image processor made (bicubic,
    antialias), and the encoder interpolates its position embedding; an image resized once from its file would keep
    slightly more.
    """

    def __init__(self, geometry: Geometry, *, num_tokens: int = 144):
        super().__init__(geometry, num_tokens)
        self.projector = Projector(geometry.vision_hidden_size, geometry.text_hidden_size)

    @property
    def input_grid(self) -> tuple[int, int]:
        """(h', w')."""
        return self.layout

    def aggregate(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T E"]:
        """(B, T, D) -> (B, T, E); `UsageError` for features of an image that was not made smaller."""
        if features.grid != self.layout:
            (rows, columns), (h, w) = self.layout, features.grid
            raise UsageError(
                f"`downsample` reads an image of {rows} x {columns} patches, not one of {h} x {w}: resize the pixels "
                "before the encoder, as AcFormerForConditionalGeneration does"
            )
        return self.projector(features.patches)
