"""A query source, the cross-attention stack, the projector: the shape that four rows of Table 3 share."""

from jaxtyping import Float
from torch import Tensor

from acformer.connectors.base import Connector, Geometry
from acformer.connectors.blocks import CrossAttentionStack, Projector
from acformer.connectors.queries import QuerySource
from acformer.vision import VisionFeatures


class StackConnector(Connector):
    """Proj(Stack(Queries(R_v), R_v)), eq. 4-6; subclasses choose the query source."""

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
        super().__init__(geometry)
        self.queries = queries
        self.stack = CrossAttentionStack(geometry.vision_hidden_size, depth, num_heads, head_dim, ff_mult)
        self.projector = Projector(geometry.vision_hidden_size, geometry.text_hidden_size)
        self.elastic = queries.elastic

    @property
    def num_tokens(self) -> int:
        """As many as there are queries."""
        return self.queries.num_tokens

    def aggregate(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T E"]:
        """Queries read all tokens, [CLS] and registers included -> (B, T, E)."""
        return self.projector(self.stack(self.queries(features, num_tokens), features.tokens))
