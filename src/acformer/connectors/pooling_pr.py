"""`pooling_pr`: average-pooled patches through the same stack, a baseline of Table 3."""

from acformer.connectors.base import Geometry
from acformer.connectors.queries import PooledQueries
from acformer.connectors.stack import StackConnector


class PoolingPRConnector(StackConnector):
    """[CLS] and T - 1 means of h' x w' regions read all tokens; T = `num_tokens` = 1 + h' w' (`token_grid`)."""

    source = PooledQueries

    def __init__(
        self,
        geometry: Geometry,
        *,
        num_tokens: int = 145,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_mult: float = 4,
    ):
        queries = PooledQueries(geometry, num_tokens)
        super().__init__(geometry, queries, depth=depth, num_heads=num_heads, head_dim=head_dim, ff_mult=ff_mult)
