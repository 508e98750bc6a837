"""T tokens laid out as a grid: which h' x w' an average pool or a convolution over the patches ends in.

Unlike pooling by a whole kernel, h' and w' need not divide the patch grid: adaptive pooling takes any that fit in it.
"""

from acformer.errors import UsageError


def token_grid(num_tokens: int, grid: tuple[int, int], extra: int = 0) -> tuple[int, int]:
    """(h', w') with h' w' = T - extra, h' <= h, w' <= w, and h' / w' by ratio nearest to h / w; ties: more columns.

    144 of 24 x 24 patches are 12 x 12; 32 of 16 x 16 are 4 x 8.

    Args:
        num_tokens: T.
        grid: (h, w), the patches.
        extra: how many of the T stand outside the layout, as [CLS] does; the error speaks of T all the same.

    Raises:
        UsageError: no such grid, for example T prime and larger than a side; names the nearest numbers that have one.
    """
    layouts = [(rows, cols) for rows, cols in _layouts(grid) if rows * cols == num_tokens - extra]
    if not layouts:
        neighbours = _neighbours(num_tokens - extra, grid)
        nearest = " and ".join(str(number + extra) for number in neighbours if number is not None)
        (h, w), beside = grid, f"{extra} + " if extra else ""
        raise UsageError(
            f"{num_tokens} tokens cannot be laid out as {beside}rows x columns within {h} x {w} patches; "
            f"nearest: {nearest}"
        )
    return min(layouts, key=lambda layout: (_distortion(layout, grid), -layout[1]))


def nearest_num_tokens(num_tokens: int, grid: tuple[int, int]) -> int:
    """The T nearest to `num_tokens` with a grid at most 1.5 times too flat or too high for (h, w); the lower of two."""
    even = [layout for layout in _layouts(grid) if _distortion(layout, grid) <= 1.5]
    return min((rows * cols for rows, cols in even), key=lambda number: (abs(number - num_tokens), number))


def grid_sizes(grid: tuple[int, int]) -> list[int]:
    """Every T that has a grid, ascending."""
    return sorted({rows * cols for rows, cols in _layouts(grid)})


def _layouts(grid: tuple[int, int]) -> list[tuple[int, int]]:
    return [(rows, cols) for rows in range(1, grid[0] + 1) for cols in range(1, grid[1] + 1)]


def _distortion(layout: tuple[int, int], grid: tuple[int, int]) -> float:
    """How many times too flat or too high, at least 1; equal ratios of integers are equal as floats too."""
    flat, high = layout[1] * grid[0], layout[0] * grid[1]
    return max(flat, high) / min(flat, high)


def _neighbours(num_tokens: int, grid: tuple[int, int]) -> tuple[int | None, int | None]:
    numbers = grid_sizes(grid)
    below = max((number for number in numbers if number < num_tokens), default=None)
    return below, min((number for number in numbers if number > num_tokens), default=None)
