"""`acformer`: the paper's connector. Visual anchors are the queries (Sec. 3.3, eq. 4-6)."""

from acformer.connectors.base import Geometry
from acformer.connectors.queries import SelectedQueries
from acformer.connectors.stack import StackConnector


class AcFormerConnector(StackConnector):
    """[CLS] and `num_anchors` anchors read all tokens: T = num_anchors + 1 (65, 145, 257 in the paper).

    No weight depends on the number of anchors, so one checkpoint serves any budget. Differs from the release in
    returning exactly `num_anchors` anchors where the heads do not divide it, and in ordering ties (`anchors.py`).
    Not in the paper: another `selector` than the anchors, and `stochastic_anchors`, which draws them while training
    (Gumbel top-k on the [CLS] attention) as a fair match for `random_pr`, whose queries vary by nature.
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
