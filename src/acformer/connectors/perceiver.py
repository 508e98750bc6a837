"""`perceiver`: learned queries through the same stack, the paper's main baseline (PR in Table 3)."""

from acformer.connectors.base import Geometry
from acformer.connectors.queries import LearnedQueries
from acformer.connectors.stack import StackConnector


class PerceiverConnector(StackConnector):
    """`num_queries` learned vectors, the same for every image, read all tokens: T = num_queries."""

    source = LearnedQueries

    def __init__(
        self,
        geometry: Geometry,
        *,
        num_queries: int = 145,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_mult: float = 4,
    ):
        queries = LearnedQueries(geometry, num_queries)
        super().__init__(geometry, queries, depth=depth, num_heads=num_heads, head_dim=head_dim, ff_mult=ff_mult)
