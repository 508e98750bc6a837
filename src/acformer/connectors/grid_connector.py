"""What connectors share whose tokens form a smaller grid than the patches': any T that can be laid out on it."""

from collections.abc import Sequence
from typing import Any

from acformer.connectors.base import Connector, Geometry
from acformer.connectors.token_grid import grid_sizes, nearest_num_tokens, token_grid


class GridConnector(Connector):
    """T = h' w' tokens in raster order, (h', w') = `layout` as `token_grid` lays out `num_tokens`."""

    def __init__(self, geometry: Geometry, num_tokens: int):
        super().__init__(geometry)
        self.layout = token_grid(num_tokens, geometry.grid)

    @property
    def num_tokens(self) -> int:
        """h' w'."""
        return self.layout[0] * self.layout[1]

    @property
    def budgets(self) -> Sequence[int]:
        """Where it is elastic, every T that has a layout."""
        return grid_sizes(self.geometry.grid) if self.elastic else super().budgets

    @classmethod
    def for_budget(cls, geometry: Geometry, num_tokens: int) -> dict[str, Any]:
        """The number of tokens nearest to `num_tokens` that has a layout on this grid."""
        return {"num_tokens": nearest_num_tokens(num_tokens, geometry.grid)}

    def layout_of(self, num_tokens: int) -> tuple[int, int]:
        """(h', w') of any other T; `UsageError` where it has none."""
        return self.layout if num_tokens == self.num_tokens else token_grid(num_tokens, self.geometry.grid)
