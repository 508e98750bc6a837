"""`acformer_v2`: spaced queries that know their place and read what is near them; not in the paper.

What `acformer` lacks against convolutions over a grid (docs/reproduce.md): few anchors crowd on the largest things and
miss the small ones, patches are read without their neighbours and from anywhere, and an anchor's token does not say
where it is. So the default has another selector, `spaced`, and three of five parts, each an option: `block`, `places`,
`near`. Without any of them, and with `selector: anchors`, it is `acformer`, weights and tokens:

    stem     R' = R + SE(DW_3x3(LN(R))) over the patches: what queries and keys and values are made of from here on
    block    the stem with hidden layers: R' = R + W_2 SE(SiLU(DW_3x3(SiLU(W_1 LN(R))))), D -> D / 2 -> D
    places   phi(p), a 2-D sine-cosine code, is added to queries, to values and to what comes out, through matrices that
             start at zero; keys stay as they are, so what is looked for has no place
    near     heads of the cross-attention may prefer what is near, each by its own learned locality:
             logits_in = q_i k_n / sqrt(d) - softplus(g) T |p_i - p_n|^2
    talk     self-attention among the tokens, once, before the last feed-forward; each head has a learned locality:
             logits_ij = q_i k_j / sqrt(d) - softplus(g) T |p_i - p_j|^2

A place p is in [0, 1]^2, and the factor T makes a distance of one cell (1 / sqrt(T)) the same at every T; so no weight
depends on the grid or on T. [CLS] and merged patches have no place: no code, and no distance to anything.

Which patches are queries hangs on the encoder's own attention and tokens, as in the paper, not on `stem` or `block`.
"""

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from acformer.anchors.search import check_num_anchors
from acformer.connectors.base import Geometry
from acformer.connectors.blocks import CrossAttentionLayer, CrossAttentionStack
from acformer.connectors.merging import take
from acformer.connectors.queries import SelectedQueries
from acformer.connectors.regnet import SqueezeExcite
from acformer.connectors.resampler import Resampler
from acformer.vision.features import VisionFeatures

NUM_FREQUENCIES = 16  # of an axis, from half a turn to 16 turns over the image
CODE = 4 * NUM_FREQUENCIES  # sine and cosine, x and y


class Queries(NamedTuple):
    """T queries an image, their places (x, y) in [0, 1]^2, and which of them have one (the same for every image)."""

    vectors: Float[Tensor, "B T D"]
    places: Float[Tensor, "B T 2"]
    has_place: Bool[Tensor, "T"]


class AcFormerV2Connector(Resampler):
    """`acformer` whose queries are spaced, know their place and read what is near.

    T = `num_anchors` + 1. With all of the parts below off and `selector: anchors` it is `acformer`, whose weights it
    then takes too. One checkpoint serves any T; compiled, the default selector needs a graph for every T.

    Args:
        geometry: see `Connector`.
        num_anchors, selector, stochastic_anchors, depth, num_heads, head_dim, ff_mult: as of `acformer`.
        stem: a depth-wise 3 x 3 convolution of the patches before they are read.
        block: the same with hidden layers of half the width; with both, `stem` comes first.
        places: sine-cosine codes of places in queries, values and outputs.
        near: a learned locality of every head that reads.
        talk: self-attention among the tokens, with a learned locality.

    Raises:
        UsageError: as `acformer`.
    """

    source = SelectedQueries
    queries: SelectedQueries
    stack: CrossAttentionStack
    former_defaults = MappingProxyType(
        {"selector": "anchors", "stem": True, "block": False, "near": False, "talk": True}
    )
    removed_options = MappingProxyType({"mass": False, "pooled": False})

    def __init__(
        self,
        geometry: Geometry,
        *,
        num_anchors: int = 144,
        selector: str = "spaced",
        stochastic_anchors: bool = False,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_mult: float = 4,
        stem: bool = False,
        places: bool = True,
        talk: bool = False,
        near: bool = True,
        block: bool = True,
    ):
        queries = SelectedQueries(geometry, num_anchors, selector, stochastic_anchors)
        super().__init__(geometry, queries, depth=depth, num_heads=num_heads, head_dim=head_dim, ff_mult=ff_mult)
        width, inner = geometry.vision_hidden_size, num_heads * head_dim
        self.stem = Stem(width) if stem else None
        self.block = Block(width) if block else None
        self.places = PlaceCodes(width, inner, depth) if places else None
        self.talk = Talk(width, num_heads, head_dim) if talk else None
        self.near = nn.ParameterList(initial_locality(num_heads) for _ in range(depth)) if near else None

    def aggregate(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T E"]:
        """Queries, which read all tokens and then one another -> (B, T, E)."""
        seen = features
        for stem in (self.stem, self.block):
            seen = seen if stem is None else stem(seen)
        queries = self.placed_queries(features, seen, num_tokens)
        hidden, last = queries.vectors, len(self.stack.layers) - 1
        nearness = self.nearness(queries, seen)
        if self.places is not None:
            hidden = hidden + self.places.to_queries(place_codes(queries, hidden.dtype))
        for number, layer in enumerate(self.stack.layers):
            assert isinstance(layer, CrossAttentionLayer)
            added = None if self.places is None else self.places.values(number, seen)  # (P+N, H d)
            hidden = hidden + layer.attention(hidden, seen.tokens, nearness[number], added)
            if number == last and self.talk is not None:
                hidden = hidden + self.talk(hidden, queries)
            hidden = hidden + layer.feed_forward(hidden)
        hidden = self.stack.norm(hidden)
        if self.places is not None:
            hidden = hidden + self.places.to_outputs(place_codes(queries, hidden.dtype))
        return self.projector(hidden)

    def nearness(self, queries: Queries, features: VisionFeatures) -> Sequence[Float[Tensor, "B H T L"] | None]:
        """What is added to the logits of each layer: (B, H, T, P+N), or nothing."""
        if self.near is None:
            return [None] * len(self.stack.layers)
        apart = patch_distances(queries, features)
        return [locality_penalty(locality, apart) for locality in self.near]

    def placed_queries(self, features: VisionFeatures, seen: VisionFeatures, num_tokens: int) -> Queries:
        """[CLS], chosen patches, means of merged ones; chosen by `features`, taken from `seen`."""
        num_cls, (h, w) = self.queries.num_cls, features.grid
        num_anchors = num_tokens - num_cls
        check_num_anchors(num_anchors, h * w)
        num_merged = min(round(self.queries.contextual * num_tokens), num_anchors - 1)
        index = self.queries.choose(features, num_anchors - num_merged)  # (B, K)
        device = seen.tokens.device
        placed = centres((h, w), device)[index]  # (B, K, 2)
        vectors = [seen.tokens[:, :num_cls], take(seen.patches, index)]
        if num_merged:
            vectors.append(self.queries.merge(seen, index, num_merged))
        order = torch.arange(num_tokens, device=device)
        has_place = (order >= num_cls) & (order < num_tokens - num_merged)
        return Queries(torch.cat(vectors, dim=1), F.pad(placed, (0, 0, num_cls, num_merged)), has_place)


def centres(grid: tuple[int, int], device: torch.device) -> Float[Tensor, "N 2"]:
    """(x, y) in [0, 1]^2 of the middles of h x w cells, in raster order."""
    h, w = grid
    y = (torch.arange(h, device=device) + 0.5) / h
    x = (torch.arange(w, device=device) + 0.5) / w
    return torch.stack([x.repeat(h), y.repeat_interleave(w)], dim=-1)


def place_code(places: Float[Tensor, "*B 2"]) -> Float[Tensor, "*B C"]:
    """phi: sines and cosines of x and y, each at 16 frequencies in a geometric row; (..., 2) -> (..., 64)."""
    steps = torch.arange(NUM_FREQUENCIES, device=places.device) / (NUM_FREQUENCIES - 1)
    angles = places.unsqueeze(-1) * (math.pi * 32**steps)  # (..., 2, 16)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def place_codes(queries: Queries, dtype: torch.dtype) -> Float[Tensor, "B T C"]:
    """phi of the tokens' places, 0 for those that have none."""
    return (place_code(queries.places) * queries.has_place.unsqueeze(-1)).to(dtype)


def squared_distances(queries: Queries) -> Float[Tensor, "B T T"]:
    """T |p_i - p_j|^2, 1 for neighbours of an even grid; 0 where one of the two has no place."""
    difference = queries.places.unsqueeze(2) - queries.places.unsqueeze(1)  # (B, T, T, 2)
    both = queries.has_place.unsqueeze(0) & queries.has_place.unsqueeze(1)  # (T, T)
    return difference.square().sum(-1) * both * queries.places.shape[1]


def patch_distances(queries: Queries, features: VisionFeatures) -> Float[Tensor, "B T L"]:
    """T |p_i - p_n|^2 of tokens and patches; 0 of prefix tokens, and for tokens without a place."""
    where = centres(features.grid, queries.places.device)  # (N, 2)
    apart = (queries.places.unsqueeze(2) - where).square().sum(-1)  # (B, T, 1, 2) - (N, 2) -> (B, T, N)
    apart = apart * queries.has_place.unsqueeze(-1) * queries.places.shape[1]
    return F.pad(apart, (features.num_prefix_tokens, 0))


class Stem(nn.Module):
    """R + SE(DW_3x3(LN(R))) over the patches; prefix tokens stay: half a block of the C-Abstractor's."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.squeeze_excite = SqueezeExcite(dim, max(1, round(dim / 4)))

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """The same with other tokens."""
        image = self.norm(features.patches).mT.unflatten(-1, features.grid)  # (B, N, D) -> (B, D, h, w)
        around = self.squeeze_excite(self.depthwise(image).movedim(1, -1)).flatten(1, 2)  # (B, h, w, D) -> (B, N, D)
        return _with_patches(features, features.patches + around)


class Block(nn.Module):
    """R + W_2 SE(SiLU(DW_3x3(SiLU(W_1 LN(R))))) over the patches, of half the width; W_2 starts at zero."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = dim // 2
        self.norm = nn.LayerNorm(dim)
        self.down = nn.Linear(dim, hidden, bias=False)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.squeeze_excite = SqueezeExcite(hidden, max(1, round(hidden / 4)))
        self.up = _zero_linear(hidden, dim)

    def forward(self, features: VisionFeatures) -> VisionFeatures:
        """The same with other tokens."""
        inner = F.silu(self.down(self.norm(features.patches)))  # (B, N, D / 2)
        image = self.depthwise(inner.mT.unflatten(-1, features.grid)).movedim(1, -1)  # (B, h, w, D / 2)
        around = self.up(self.squeeze_excite(F.silu(image)).flatten(1, 2))  # (B, N, D)
        return _with_patches(features, features.patches + around)


def _with_patches(features: VisionFeatures, patches: Tensor) -> VisionFeatures:
    prefix = features.tokens[:, : features.num_prefix_tokens]
    return features._replace(tokens=torch.cat([prefix, patches], dim=1))


class PlaceCodes(nn.Module):
    """W phi(p) for queries, for the values of every layer, and for what comes out; every W starts at zero."""

    def __init__(self, dim: int, inner: int, depth: int):
        super().__init__()
        self.to_queries = _zero_linear(CODE, dim)
        self.to_values = nn.ModuleList(_zero_linear(CODE, inner) for _ in range(depth))
        self.to_outputs = _zero_linear(CODE, dim)

    def values(self, layer: int, features: VisionFeatures) -> Float[Tensor, "L I"]:
        """What is added to the values of all tokens in a layer: nothing to those of the prefix."""
        patches = features.patches
        codes = place_code(centres(features.grid, patches.device)).to(patches.dtype)  # (N, CODE)
        return F.pad(self.to_values[layer](codes), (0, 0, features.num_prefix_tokens, 0))


def initial_locality(num_heads: int) -> nn.Parameter:
    """g of each head: half of the heads start everywhere, half local."""
    everywhere, local = -4.0, 0.5  # softplus: 0.02 and 0.97 for a distance of one cell
    start = torch.full((num_heads,), everywhere)
    start[num_heads // 2 :] = local
    return nn.Parameter(start)


def locality_penalty(locality: Float[Tensor, "H"], distances: Float[Tensor, "B T L"]) -> Float[Tensor, "B H T L"]:
    """-softplus(g) distance, in float32, to be added to the logits of attention."""
    weight = F.softplus(locality.float()).view(-1, 1, 1)  # (H, 1, 1)
    return -weight * distances.unsqueeze(1)  # (B, 1, T, L) -> (B, H, T, L)


class Talk(nn.Module):
    """Self-attention among the tokens, the further the less: half of the heads start local, half everywhere."""

    def __init__(self, dim: int, num_heads: int, head_dim: int):
        super().__init__()
        inner, self.num_heads = num_heads * head_dim, num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv_proj = nn.Linear(dim, 3 * inner, bias=False)
        self.o_proj = nn.Linear(inner, dim, bias=False)
        self.locality = initial_locality(num_heads)

    def forward(self, hidden: Float[Tensor, "B T D"], queries: Queries) -> Float[Tensor, "B T D"]:
        """(B, T, D) -> (B, T, D)."""
        qkv = self.qkv_proj(self.norm(hidden)).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, H, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        penalty = locality_penalty(self.locality, squared_distances(queries))  # (B, H, T, T)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=penalty.to(query.dtype))
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # (B, T, H d) -> (B, T, D)


def _zero_linear(dim: int, out: int) -> nn.Linear:
    linear = nn.Linear(dim, out, bias=False)
    nn.init.zeros_(linear.weight)
    return linear
