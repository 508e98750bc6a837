"""`e_vit`: the anchors and one token for all the rest, straight into the projector (Table 4)."""

from acformer.connectors.base import Geometry
from acformer.connectors.queries import FusedQueries
from acformer.connectors.stack import QueryConnector


class EViTConnector(QueryConnector):
    """Proj([CLS], the anchors, sum_n a_n R_n / sum_n a_n over the other patches): T = num_anchors + 2 (146).

    a is the [CLS] attention's mean over heads. Differs from EViT (Liang et al. 2022), which does this between the
    encoder's blocks, keeps the joint top-k and does not divide by the sum.
    """

    source = FusedQueries

    def __init__(self, geometry: Geometry, *, num_anchors: int = 144):
        super().__init__(geometry, FusedQueries(geometry, num_anchors))
