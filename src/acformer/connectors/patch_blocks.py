"""The patch grid cut into equal blocks, one a token: `token_packer` reads each, `pixel_shuffle` stacks each.

Unlike an adaptive pool (`token_grid`), blocks must divide the grid.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from acformer.errors import UsageError


def as_block(option: str, value: int | Sequence[int], grid: tuple[int, int]) -> tuple[int, int]:
    """The option's value as (rows, columns) of a block; s means (s, s).

    Raises:
        UsageError: not one or two positive whole numbers, or they do not divide the grid.
    """
    sides = (value, value) if type(value) is int else value
    if not isinstance(sides, Sequence) or len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise UsageError(f"{option} must be a positive int or two of them (rows, columns), got {value!r}")
    rows, cols = sides
    if grid[0] % rows or grid[1] % cols:
        raise UsageError(
            f"{option}={value!r} does not divide {grid[0]} x {grid[1]} patches; "
            f"choose rows among {_divisors(grid[0])} and columns among {_divisors(grid[1])}"
        )
    return rows, cols


def nearest_block(num_tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The block whose number in the grid is nearest to `num_tokens`; of several, the squarest, then the flattest."""
    blocks = [(rows, cols) for rows in _divisors(grid[0]) for cols in _divisors(grid[1])]
    return min(blocks, key=lambda block: (abs(_count(block, grid) - num_tokens), max(block) / min(block), block))


def split_blocks(
    patches: Float[Tensor, "B N C"], grid: tuple[int, int], block: tuple[int, int]
) -> Float[Tensor, "B T S C"]:
    """(B, N, C) -> (B, T, S, C): T blocks of S patches, blocks in raster order and patches within one too."""
    (h, w), (rows, cols) = grid, block
    image = patches.unflatten(1, (h // rows, rows, w // cols, cols))  # (B, h/r, r, w/c, c, C)
    return image.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, h/r, w/c, r, c, C) -> (B, T, S, C)


def _count(block: tuple[int, int], grid: tuple[int, int]) -> int:
    return grid[0] // block[0] * (grid[1] // block[1])


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
