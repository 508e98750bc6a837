"""`q_former`: the querying transformer, which the paper names beside the Perceiver Resampler."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from acformer.connectors.attention import check_divisible
from acformer.connectors.base import Connector, Geometry
from acformer.vision.features import VisionFeatures


class QFormerConnector(Connector):
    """BLIP-2's Q-Former: learned queries, the same for every image, in a BERT that also reads the image.

    W Q-Former(queries, R_v) + b. `depth` layers of self-attention among the queries and a feed-forward network,
    norms after the sums; every `cross_attention_frequency`-th, from the first on, cross-attends all tokens, prefix
    included. Source: BLIP-2 (Li et al., arXiv 2301.12597) by transformers' own `Blip2QFormerModel`, whose weights
    load as they are. Differs in having no dropout (BLIP-2: 0.1), no final LayerNorm of the encoder before it, and
    no stage of its own that aligns it with text: it starts as BERT does, normal with deviation 0.02.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        num_queries: int = 32,
        depth: int = 12,
        num_heads: int = 12,
        hidden_size: int = 768,
        ff_mult: float = 4,
        cross_attention_frequency: int = 2,
    ):
        from transformers import Blip2QFormerConfig, Blip2QFormerModel  # no other connector needs transformers

        super().__init__(geometry)
        config = Blip2QFormerConfig(
            hidden_size=hidden_size,
            num_hidden_layers=depth,
            num_attention_heads=check_divisible(hidden_size, num_heads),
            intermediate_size=round(hidden_size * ff_mult),
            cross_attention_frequency=cross_attention_frequency,
            encoder_hidden_size=geometry.vision_hidden_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.queries = nn.Parameter(torch.empty(num_queries, hidden_size))
        self.q_former = Blip2QFormerModel(config)
        self.projector = nn.Linear(hidden_size, geometry.text_hidden_size)
        self._init_weights()

    @classmethod
    def for_budget(cls, geometry: Geometry, num_tokens: int) -> dict[str, Any]:
        """As many queries."""
        return {"num_queries": num_tokens}

    @property
    def num_tokens(self) -> int:
        """As many as there are queries."""
        return self.queries.shape[0]

    def _init_weights(self) -> None:
        """Queries and the Q-Former's Linears normal, biases 0."""
        std = self.q_former.config.initializer_range
        nn.init.normal_(self.queries, std=std)
        for module in self.q_former.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def aggregate(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T E"]:
        """(B, P+N, D) -> (B, T, E)."""
        queries = self.queries.expand(features.tokens.shape[0], -1, -1)  # (T, 768) -> (B, T, 768)
        return self.projector(self.q_former(queries, encoder_hidden_states=features.tokens).last_hidden_state)
