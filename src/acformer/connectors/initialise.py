"""How a new connector starts: as in the release, PyTorch's own init, whose size follows the width.

transformers would draw every Linear with one standard deviation for all widths. Its `init` functions are still the
ones to use: unlike in-place writes they leave weights alone that were just loaded.
"""

from torch import nn
from transformers import initialization as init

from acformer.connectors.base import Connector
from acformer.connectors.queries import LearnedQueries


def initialise(connector: Connector) -> None:
    """Draw every weight of the connector that was not loaded; latents are unit normal."""
    for module in connector.modules():
        if isinstance(module, LearnedQueries):
            init.normal_(module.latents, std=1.0)
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
