"""Connectors that begin with queries from the image: the resamplers of the paper's Table 3, the direct ones of Table 4.

They differ in where the queries come from (`queries.py`) and in whether the queries read the image before they are
projected:

    name         queries                                  then
    acformer     [CLS] and the anchors                    stack, projector    (acformer.py)
    perceiver    learned, the same for every image        stack, projector
    pooling_pr   [CLS] and means of regions               stack, projector
    pooling      [CLS] and means of regions               projector
    direct       [CLS] and the anchors                    projector
    e_vit        [CLS], the anchors, one for the rest     projector
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from acformer.connectors.base import Connector, Geometry
from acformer.connectors.blocks import CrossAttentionStack, Projector
from acformer.connectors.queries import FusedQueries, LearnedQueries, PooledQueries, QuerySource, SelectedQueries
from acformer.vision.features import VisionFeatures


class QueryConnector(Connector):
    """Proj(Queries(R_v)) or, given a stack, Proj(Stack(Queries(R_v), R_v)); subclasses choose the query `source`."""

    source: ClassVar[type[QuerySource]]

    def __init__(self, geometry: Geometry, queries: QuerySource, stack: CrossAttentionStack | None = None):
        super().__init__(geometry)
        self.queries = queries
        self.stack = stack
        self.projector = Projector(geometry.vision_hidden_size, geometry.text_hidden_size)
        self.elastic = queries.elastic

    @classmethod
    def for_budget(cls, geometry: Geometry, num_tokens: int) -> dict[str, Any]:
        """As the query source says."""
        return cls.source.for_budget(geometry, num_tokens)

    @property
    def num_tokens(self) -> int:
        """As many as there are queries."""
        return self.queries.num_tokens

    @property
    def budgets(self) -> Sequence[int]:
        """As the query source says."""
        return self.queries.budgets

    def aggregate(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T E"]:
        """Queries, which in a stack read all tokens, [CLS] and registers included -> (B, T, E)."""
        queries = self.queries(features, num_tokens)  # (B, T, D)
        if self.stack is not None:
            queries = self.stack(queries, features.tokens)  # (B, T, D), having read (B, P+N, D)
        return self.projector(queries)


class Resampler(QueryConnector):
    """Proj(Stack(Queries(R_v), R_v)), eq. 4-6: the queries read the image in `depth` layers of cross-attention.

    The paper: 6 layers, 8 heads of 64 (`CrossAttentionStack`).
    """

    def __init__(
        self,
        geometry: Geometry,
        queries: QuerySource,
        *,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_mult: float = 4,
    ):
        stack = CrossAttentionStack(geometry.vision_hidden_size, depth, num_heads, head_dim, ff_mult)
        super().__init__(geometry, queries, stack)


class PerceiverConnector(Resampler):
    """Learned queries, the same for every image, read all tokens: the paper's main baseline (PR in Table 3).

    T = `num_queries`. Differs from Flamingo's Perceiver Resampler in that the queries are not keys as well.
    """

    source = LearnedQueries

    def __init__(self, geometry: Geometry, *, num_queries: int = 145, **stack: Any):
        super().__init__(geometry, LearnedQueries(geometry, num_queries), **stack)


class PoolingPRConnector(Resampler):
    """[CLS] and average-pooled patches read all tokens: a baseline of Table 3.

    T = `num_tokens` = 1 + h' w', the pooled grid (`token_grid`).
    """

    source = PooledQueries

    def __init__(self, geometry: Geometry, *, num_tokens: int = 145, **stack: Any):
        super().__init__(geometry, PooledQueries(geometry, num_tokens), **stack)


class PoolingConnector(QueryConnector):
    """[CLS] and average-pooled patches straight into the projector: a baseline of Table 3.

    T = `num_tokens` = 1 + h' w', the pooled grid (`token_grid`). Differs from the paper in that the kernel need not
    divide the patch grid: any T that can be laid out will do.
    """

    source = PooledQueries

    def __init__(self, geometry: Geometry, *, num_tokens: int = 145):
        super().__init__(geometry, PooledQueries(geometry, num_tokens))


class DirectConnector(QueryConnector):
    """[CLS] and the anchors straight into the projector, no cross-attention (Table 4, "direct-in"; there `top_p`).

    T = `num_anchors` + 1. With another `selector` it is a trained projector for the patches that VisionZip
    (`dominant_contextual`), DivPrune (`diverse`) or any other selector keeps.
    """

    source = SelectedQueries

    def __init__(self, geometry: Geometry, *, num_anchors: int = 144, selector: str = "anchors"):
        super().__init__(geometry, SelectedQueries(geometry, num_anchors, selector))


class EViTConnector(QueryConnector):
    """[CLS], the anchors, and one token for all other patches, straight into the projector (Table 4).

    The last token is sum_n a_n R_n / sum_n a_n over the patches that are no anchors, a the [CLS] attention's mean over
    heads: T = `num_anchors` + 2. Differs from EViT (Liang et al. 2022), which does this between the encoder's blocks,
    keeps the joint top-k and does not divide by the sum.
    """

    source = FusedQueries

    def __init__(self, geometry: Geometry, *, num_anchors: int = 144):
        super().__init__(geometry, FusedQueries(geometry, num_anchors))
