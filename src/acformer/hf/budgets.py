"""How many visual tokens an image gets: a number for a call, one for each image, and the names that others have for it.

`num_image_tokens` is an order: a number that the connector cannot give is an error that says which it can.
`max_soft_tokens` (Gemma's) is the most that an image may cost, `detail` (OpenAI's) a wish: half, once or twice the
model's own T, or what comes nearest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from acformer.connectors import Connector
from acformer.errors import UsageError
from acformer.vision.features import VisionFeatures

NAMES = ("num_visual_tokens", "num_image_tokens", "max_soft_tokens", "detail")
"""Options of the processor that ask for a budget; a call has one of them at most."""
DETAIL = {"low": 0.5, "auto": 1.0, "high": 2.0}
"""Of the model's own T."""
Run = tuple[int, int]


def runs(numbers: Sequence[int]) -> list[Run]:
    """Ascending whole numbers as (first, last) of each stretch without a gap."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return [(first, last) for first, last in found]


@dataclass(frozen=True)
class Budgets:
    """What an image of a model may cost.

    own: the model's T; None where the prompt does not tell it (`gated_cross_attention`).
    choices: what the connector can give, as runs (first, last); None where nobody said.
    """

    own: int | None
    choices: tuple[Run, ...] | None = None

    def __str__(self) -> str:
        """`2 to 577`, or `1, 2, 4, 6 to 9`."""
        return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in self.choices or ())

    def of(self, name: str, wanted: Any) -> int | None:
        """T for one value of an option in `NAMES`; None: the model's own.

        Raises:
            UsageError: a value that is none of the option's, or a number that the connector cannot give.
        """
        if wanted is None:
            return None
        if name == "detail":
            return self._of_detail(wanted)
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
            raise UsageError(f"{name} is a whole number from 1 on, got {wanted!r}")
        if wanted == self.own:
            return None
        if self.choices is None:
            if name == "num_visual_tokens":  # the model will say what it thinks of it
                return wanted
            raise UsageError(
                f"{name} {wanted}: this processor does not say what its model's connector can give; save it again "
                "(acformer.hf.checkpoints.load_model, then processor.save_pretrained)"
            )
        if name == "max_soft_tokens":
            below = [min(last, wanted) for first, last in self.choices if first <= wanted]
            if not below:
                raise UsageError(f"max_soft_tokens {wanted} is less than the connector can give: {self}")
            return None if below[-1] == self.own else below[-1]
        if not any(first <= wanted <= last for first, last in self.choices):
            raise UsageError(f"the connector cannot give {wanted} visual tokens; it can give {self}")
        return wanted

    def _of_detail(self, wanted: Any) -> int | None:
        if wanted not in DETAIL:
            raise UsageError(f"detail is one of {', '.join(DETAIL)}, got {wanted!r}")
        if self.own is None or self.choices is None or wanted == "auto":
            return None
        aim = round(self.own * DETAIL[wanted])
        nearest = [min(max(aim, first), last) for first, last in self.choices]
        found = min(nearest, key=lambda number: (abs(number - aim), number))
        return None if found == self.own else found


def take_request(options: dict[str, Any]) -> tuple[str, Any] | None:
    """Takes what asks for a budget out of a processor's options, also out of their `images_kwargs`: (name, value)."""
    groups = [options]
    if isinstance(options.get("images_kwargs"), Mapping):
        options["images_kwargs"] = dict(options["images_kwargs"])
        groups.append(options["images_kwargs"])
    taken = [(name, group.pop(name)) for group in groups for name in NAMES if name in group]
    found = [(name, value) for name, value in taken if value is not None]
    if len(found) > 1:
        raise UsageError(f"give one of {' and '.join(name for name, _ in found)}")
    return found[0] if found else None


def per_image(value: Any, num_images: int, name: str) -> list[Any]:
    """A value for each image: a list or tensor of as many, or one for all."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return [value] * num_images
    if len(value) != num_images:
        raise UsageError(f"{name} has {len(value)} values for {num_images} images")
    return list(value)


def visual_tokens(
    connector: Connector, features: VisionFeatures, index: Tensor | None, budget: int | Sequence[int] | Tensor | None
) -> list[Tensor]:
    """(T, E) of each image; the connector runs once for each T.

    Args:
        connector, features: features (U, ...) of images.
        index: (images,) which of the U is each image's; None where they are the images.
        budget: T of all images, or (images,) of them; None: the connector's own.

    Raises:
        UsageError: a T that the connector cannot give.
        ValueError: another number of them than of images.
    """
    if not isinstance(budget, Tensor | Sequence):
        tokens = connector(features, budget)  # (U, T, E)
        return list(tokens if index is None else tokens[index])
    budgets = [int(one) for one in budget]
    rows = list(range(len(features.tokens))) if index is None else index.tolist()
    if len(budgets) != len(rows):
        raise ValueError(f"num_visual_tokens has {len(budgets)} values for {len(rows)} images")
    made: dict[tuple[int, int], Tensor] = {}  # by row and T
    for wanted in sorted(set(budgets)):
        taken = sorted({row for row, one in zip(rows, budgets, strict=True) if one == wanted})
        made |= zip(((row, wanted) for row in taken), connector(features.rows(taken), wanted), strict=True)
    return [made[pair] for pair in zip(rows, budgets, strict=True)]
