"""What every connector is: `VisionFeatures` in, T visual tokens of the language model's width out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from acformer.errors import UsageError
from acformer.vision.features import VisionFeatures


class Geometry(NamedTuple):
    """The sizes a connector stands between.

    vision_hidden_size: D, text_hidden_size: E, grid: (h, w) patches, num_prefix_tokens: P.
    """

    vision_hidden_size: int
    text_hidden_size: int
    grid: tuple[int, int]
    num_prefix_tokens: int

    @classmethod
    def of(cls, features: VisionFeatures, text_hidden_size: int) -> "Geometry":
        """That between an encoder which gave these features and a language model of that width."""
        return cls(features.tokens.shape[-1], text_hidden_size, features.grid, features.num_prefix_tokens)

    @property
    def num_patches(self) -> int:
        """N = h * w."""
        return self.grid[0] * self.grid[1]

    @property
    def num_cls(self) -> int:
        """1, or 0 where the encoder has no [CLS]; further prefix tokens are registers."""
        return min(1, self.num_prefix_tokens)


class Connector(nn.Module, ABC):
    """Base of all connectors.

    A subclass takes `(geometry, *, its own keyword arguments)`, says its `num_tokens` and implements `aggregate`. The
    first line of its docstring is its line in the tables.

    elastic: its weights do not depend on the number of tokens, so a caller may ask for another one.
    hidden_layers: indices into the encoder's `hidden_states` of what it reads beside the feature layer, none above it
    (they come in `VisionFeatures.hidden_layers`).
    former_options: names that its options once had, and those that they have now; configs may still hold them.
    former_defaults: what options once were by default: of weights that do not say what they were.
    removed_options: options that it has no more, and the value with which they did nothing; configs may still hold it.
    """

    elastic = False
    hidden_layers: tuple[int, ...] = ()
    former_options: ClassVar[Mapping[str, str]] = MappingProxyType({})
    former_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    removed_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(self, geometry: Geometry):
        super().__init__()
        self.geometry = geometry

    @classmethod
    def for_budget(cls, geometry: Geometry, num_tokens: int) -> dict[str, Any]:
        """Options that make it give `num_tokens`, or the nearest it can; none where it has no choice."""
        return {}

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """T, the visual tokens an image costs: the one place where this number is known."""

    @property
    def budgets(self) -> Sequence[int]:
        """Every T that it can give, ascending; an elastic connector that does not say so is served at its own T."""
        return (self.num_tokens,)

    @property
    def input_grid(self) -> tuple[int, int]:
        """(h, w) patches that the encoder is to make; another than the geometry's: the model resizes the image."""
        return self.geometry.grid

    @abstractmethod
    def aggregate(self, features: VisionFeatures, num_tokens: int) -> Float[Tensor, "B T E"]:
        """The connector's idea: features -> (B, num_tokens, E)."""

    def zero_features(self) -> VisionFeatures:
        """Features of one image in the shapes that this connector reads, all zeros."""
        sizes, like, (h, w) = self.geometry, next(self.parameters()), self.input_grid
        tokens = like.new_zeros(1, sizes.num_prefix_tokens + h * w, sizes.vision_hidden_size)
        # (1, P+N, D) -> (1, K, P+N, D)
        hidden_layers = tokens.unsqueeze(1).repeat(1, len(self.hidden_layers), 1, 1) if self.hidden_layers else None
        return VisionFeatures(tokens, like.new_zeros(1, 1, h * w), (h, w), sizes.num_prefix_tokens, hidden_layers)

    def zero_loss(self) -> Float[Tensor, ""]:
        """0, as a function of every weight.

        Added to the loss of a step without images: every weight has a gradient then, as distributed training expects.
        """
        return 0 * self(self.zero_features()).sum()

    def forward(self, features: VisionFeatures, num_tokens: int | None = None) -> Float[Tensor, "B T E"]:
        """features -> (B, T, E); `num_tokens` overrides T where the connector is elastic, else `UsageError`."""
        num_tokens = self.num_tokens if num_tokens is None else num_tokens
        if num_tokens != self.num_tokens and not self.elastic:
            name = type(self).__name__
            raise UsageError(f"{name} always gives {self.num_tokens} tokens; it cannot give {num_tokens}")
        return self.aggregate(features, num_tokens)
