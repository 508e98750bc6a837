"""How a new connector starts: as in the release, PyTorch's own init, whose size follows the width.

transformers would draw every Linear with one standard deviation for all widths. Its `init` functions are still the
ones to use: unlike in-place writes they leave weights alone that were just loaded.
"""

from abc import ABC, abstractmethod

from torch import nn
from transformers import initialization as init

from acformer.connectors.base import Connector
from acformer.connectors.queries import LearnedQueries


class OwnStart(nn.Module, ABC):
    """A module some of whose weights do not start as `initialise` draws Linears and convolutions."""

    @abstractmethod
    def start(self) -> None:
        """Set these weights, by `transformers.initialization`; its constructor calls it too."""


def initialise(connector: Connector) -> None:
    """Draw every weight of the connector that was not loaded; latents are unit normal."""
    for module in connector.modules():
        if isinstance(module, LearnedQueries):
            init.normal_(module.latents, std=1.0)
        if isinstance(module, nn.Linear | nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
    for module in connector.modules():
        if isinstance(module, OwnStart):
            module.start()
