"""A query source, then the projector (Table 4's "direct-in"); between them, for most of Table 3, the stack."""

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from acformer.connectors.base import Connector, Geometry
from acformer.connectors.blocks import CrossAttentionStack, Projector
from acformer.connectors.queries import QuerySource
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

    def aggregate(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T E"]:
        """Queries, which in a stack read all tokens, [CLS] and registers included -> (B, T, E)."""
        queries = self.queries(features, num_tokens)
        return self.projector(queries if self.stack is None else self.stack(queries, features.tokens))


class StackConnector(QueryConnector):
    """Proj(Stack(Queries(R_v), R_v)), eq. 4-6: one stack, four query sources in Table 3."""

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
