"""`acformer`, the paper's connector: visual anchors are the queries that read the image (Sec. 3.3, eq. 4-6).

The whole way from pixels to visual tokens, and where each step is, for CLIP ViT-L/14 at 336 pixels, 144 anchors and a
language model of width 4096:

    pixels              (B, 3, 336, 336)
      | image encoder, frozen, up to the feature layer         acformer/vision/encoder.py
    tokens R_v          (B, 577, 1024)    [CLS], then 24 x 24 patches
    cls_attention A     (B, 16, 576)      how much [CLS] attends to each patch, in each of the 16 heads
      | progressive search: head by head, the best patches     acformer/anchors/search.py
      | that no earlier head has taken
    anchors             (B, 144)          indices of patches, ascending
      | [CLS] and the tokens at the anchors                    queries.py, SelectedQueries
    queries             (B, 145, 1024)
      | 6 layers: cross-attention to all of R_v, feed-forward  blocks.py, CrossAttentionStack
    queries             (B, 145, 1024)
      | two-layer MLP                                          blocks.py, Projector
    visual tokens       (B, 145, 4096)

The last three steps are `aggregate` in resampler.py, where the connectors are that differ in their queries alone.
"""

from acformer.connectors.base import Geometry
from acformer.connectors.queries import SelectedQueries
from acformer.connectors.resampler import Resampler


class AcFormerConnector(Resampler):
    """[CLS] and `num_anchors` visual anchors read all tokens by cross-attention: T = num_anchors + 1.

    T is 65, 145 or 257 in the paper. No weight depends on it, so one checkpoint serves any budget. Differs from the
    release in returning exactly `num_anchors` anchors where the heads do not divide it, and in what becomes of equal
    scores (`acformer.anchors.search`). Not in the paper: other patches than the anchors (`selector`), and
    `stochastic_anchors`, which draws them while training (Gumbel top-k on the [CLS] attention), a fair match for
    random patches, which vary by nature. With `selector="random"` this is the paper's `random_pr`.
    """

    source = SelectedQueries

    def __init__(
        self,
        geometry: Geometry,
        *,
        num_anchors: int = 144,
        selector: str = "anchors",
        stochastic_anchors: bool = False,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_mult: float = 4,
    ):
        queries = SelectedQueries(geometry, num_anchors, selector, stochastic_anchors)
        super().__init__(geometry, queries, depth=depth, num_heads=num_heads, head_dim=head_dim, ff_mult=ff_mult)
