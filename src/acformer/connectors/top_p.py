"""`top_p`: the chosen patches straight into the projector, no cross-attention (Table 4, "direct-in")."""

from acformer.connectors.base import Geometry
from acformer.connectors.queries import SelectedQueries
from acformer.connectors.stack import QueryConnector


class TopPConnector(QueryConnector):
    """Proj([CLS], R_v at `num_anchors` patches): T = num_anchors + 1, the anchors unless told otherwise.

    With another `selector`, a trained projector for what VisionZip (`dominant_contextual`), DivPrune (`diverse`) or
    any other in `selectors.py` keeps.
    """

    source = SelectedQueries

    def __init__(self, geometry: Geometry, *, num_anchors: int = 144, selector: str = "anchors"):
        super().__init__(geometry, SelectedQueries(geometry, num_anchors, selector))
