"""`random_pr`: random patches through the same stack, a baseline of Table 3 that is stronger than it looks."""

from acformer.connectors.base import Geometry
from acformer.connectors.queries import SelectedQueries
from acformer.connectors.stack import StackConnector


class RandomPRConnector(StackConnector):
    """[CLS] and `num_anchors` patches drawn at random read all tokens: T = num_anchors + 1.

    Drawn anew in every step of training; in evaluation the picture itself is the seed (`selectors.own_noise`), so
    that a score can be repeated in any batch. The paper does not say what it does there.
    """

    source = SelectedQueries

    def __init__(
        self,
        geometry: Geometry,
        *,
        num_anchors: int = 144,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_mult: float = 4,
    ):
        queries = SelectedQueries(geometry, num_anchors, "random")
        super().__init__(geometry, queries, depth=depth, num_heads=num_heads, head_dim=head_dim, ff_mult=ff_mult)
