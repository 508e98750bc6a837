"""`linear`: the first LLaVA's connector. Every patch becomes a visual token by one matrix."""

from torch import nn

from acformer.connectors.mlp import MLPConnector


class LinearConnector(MLPConnector):
    """W R_v + b: as `mlp`, with Linear(D, E) alone (Liu et al. 2023)."""

    projector_type = nn.Linear
