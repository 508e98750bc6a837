"""`pooling`: average-pooled patches straight into the projector, a baseline of Table 3."""

from acformer.connectors.base import Geometry
from acformer.connectors.queries import PooledQueries
from acformer.connectors.stack import QueryConnector


class PoolingConnector(QueryConnector):
    """Proj([CLS], means of h' x w' regions); T = `num_tokens` = 1 + h' w' (`token_grid`).

    Differs from the paper in that the kernel need not divide the grid: any T that can be laid out will do.
    """

    source = PooledQueries

    def __init__(self, geometry: Geometry, *, num_tokens: int = 145):
        super().__init__(geometry, PooledQueries(geometry, num_tokens))
