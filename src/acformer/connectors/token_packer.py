"""`token_packer`: coarse tokens that read their own regions; not in the paper.

By its authors' table the strongest rival under the same recipe.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from acformer.connectors.attention import MultiHeadAttention
from acformer.connectors.base import Connector, Geometry
from acformer.connectors.blocks import Projector
from acformer.connectors.patch_blocks import as_block, nearest_block, split_blocks
from acformer.errors import UsageError
from acformer.vision.features import VisionFeatures


class TokenPackerConnector(Connector):
    """Each token is a coarse view of the image that attends to its own region, at several depths of the encoder.

    Proj(Attn(LN(W_q down(R)), LN(MLP_k(M)), LN(MLP_v(M)))), where a token attends to its own s x s patches alone.
    down(R): the feature layer's patches, bilinearly shrunk by the scale s; for s = 2 the mean of the four. M: the same
    patches at all `hidden_layers`, side by side (K D wide). T = N / s^2: 144 of 24 x 24 patches for s = 2. Source:
    TokenPacker (Li et al., arXiv 2407.02392) as released, where queries are not added to what they read; its weights
    start as there. Differs in taking any scale, also one for rows and one for columns, and any hidden_layers.

    Args:
        geometry: where it stands.
        scale: s, or (s_h, s_w); must divide the grid.
        hidden_layers: indices into the encoder's `hidden_states`; the source's are those of CLIP-L, 24 layers. [] for
            the feature layer's own patches alone.
        num_heads: must divide D; the release has D / 128 = 8.

    Raises:
        UsageError: a scale or heads that do not divide, an option of the wrong type; in the forward pass, features
            without the hidden_layers.
    """

    former_options = MappingProxyType({"levels": "hidden_layers"})

    def __init__(
        self,
        geometry: Geometry,
        *,
        scale: int | Sequence[int] = 2,
        hidden_layers: Sequence[int] = (12, 16, 22, 23),
        num_heads: int = 8,
    ):
        super().__init__(geometry)
        self.block = as_block("scale", scale, geometry.grid)
        self.hidden_layers = tuple(hidden_layers)
        width = geometry.vision_hidden_size
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (Projector(width * max(1, len(self.hidden_layers)), width) for _ in range(2))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = MultiHeadAttention(width, num_heads)
        self.projector = Projector(width, geometry.text_hidden_size)
        self._init_weights()

    def _init_weights(self) -> None:
        """Weights normal with deviation 0.02 for any width, biases 0; the attention's W_q, W_k, W_v Xavier.

        The release truncates the normal at 100 deviations, which is nowhere. Its rule is for Linears, and torch's
        attention holds these three as one (3 D, D) matrix, which keeps torch's start: uniform to sqrt(6 / (4 D)).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj):
            bound = (6 / (4 * linear.in_features)) ** 0.5
            nn.init.uniform_(linear.weight, -bound, bound)

    @classmethod
    def for_budget(cls, geometry: Geometry, num_tokens: int) -> dict[str, Any]:
        """The scale that gives the number of tokens nearest to `num_tokens`."""
        return {"scale": list(nearest_block(num_tokens, geometry.grid))}

    @property
    def num_tokens(self) -> int:
        """N / (s_h s_w)."""
        return self.geometry.num_patches // (self.block[0] * self.block[1])

    def aggregate(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T E"]:
        """(B, N, D) and hidden_layers (B, K, P+N, D) -> (B, T, E)."""
        coarse = self.coarse_queries(features)  # (B, T, D)
        # Every token attends to its own region, so regions stand in the batch: (B, T, s^2, K D) -> (B T, s^2, K D)
        regions = split_blocks(self._all_layers(features), features.grid, self.block).flatten(0, 1)
        query = self.norm_q(self.q_proj(coarse)).flatten(0, 1).unsqueeze(1)  # (B, T, D) -> (B T, 1, D)
        attended = self.attention(query, self.norm_k(self.k_proj(regions)), self.norm_v(self.v_proj(regions)))
        return self.projector(attended.view_as(coarse))  # (B T, 1, D) -> (B, T, D) -> (B, T, E)

    def coarse_queries(self, features: VisionFeatures) -> Float[Tensor, "B T D"]:
        """down(R): (B, N, D) -> (B, T, D)."""
        size = [side // step for side, step in zip(features.grid, self.block, strict=True)]
        image = features.patches.mT.unflatten(-1, features.grid)  # (B, D, h, w)
        return F.interpolate(image, size=size, mode="bilinear").flatten(2).mT  # (B, D, h', w') -> (B, T, D)

    def _all_layers(self, features: VisionFeatures) -> Float[Tensor, "B N M"]:
        """The patches at all hidden layers, side by side: (B, N, K D)."""
        if not self.hidden_layers:
            return features.patches
        if features.hidden_layers is None:
            raise UsageError(
                f"token_packer reads the hidden layers {list(self.hidden_layers)} of the encoder, but the features "
                "have none: encode with these hidden_layers, or build it with hidden_layers=[]"
            )
        # (B, K, N, D) -> (B, N, K, D) -> (B, N, K D)
        return features.hidden_layers[:, :, features.num_prefix_tokens :].transpose(1, 2).flatten(2)
