"""Several samples in one row, so that a batch holds no padding, and none sees another.

What keeps them apart are the position ids, which begin anew with each sample: without an attention mask transformers
takes them for the borders of sequences, and makes a block-diagonal mask of them, or the lengths that a varlen kernel
wants (as for its `DataCollatorWithFlattening`). A batch keeps its samples, its loss and its place in the order; it
is laid out in other rows. Padding at the end of a row is one more sequence, which nobody reads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from acformer.data.conversation import IGNORE

WIDTHS = 8
"""Lengths of rows that are tried."""


@dataclass(frozen=True)
class Packing:
    """`rows(lengths)` -> which samples stand in each row.

    longest: tokens of a row, where it holds more than one sample. hidden_size: of the language model. in_one_row: all
    of them, for kernels to which a row costs no more than its samples.
    """

    longest: int
    hidden_size: int
    in_one_row: bool = False

    def rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """Numbers of the samples, row by row; the cheapest of some widths, first fit of the longest first.

        With a mask, attention in a row of W tokens costs W^2: wide rows leave less padding and more masked scores.
        """
        if self.in_one_row or len(lengths) == 1:
            return [[*range(len(lengths))]]
        least = max(lengths)
        most = max(least, min(self.longest, sum(lengths)))
        widths = {least + (most - least) * step // (WIDTHS - 1) for step in range(WIDTHS)}
        return min((_first_fit(lengths, width) for width in sorted(widths)), key=lambda rows: self._cost(lengths, rows))

    def _cost(self, lengths: Sequence[int], rows: list[list[int]]) -> float:
        """Of a layer, in units of one token's matrices (24 E^2 FLOP, where a score and its value are 4 E)."""
        width = max(sum(lengths[number] for number in row) for row in rows)
        return len(rows) * width * (1 + width / (6 * self.hidden_size))


def _first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        place = next((i for i, free in enumerate(room) if free >= lengths[number]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(width)
        rows[place].append(number)
        room[place] -= lengths[number]
    return rows


def packed_text(items: Sequence[dict[str, Any]], counts: Iterable[int], pad: int) -> dict[str, Tensor]:
    """`input_ids`, `labels`, `position_ids` (rows, L) of items in the order of their rows, `counts` of them in each."""
    left = iter(items)
    rows = [[next(left) for _ in range(count)] for count in counts]
    ids = [torch.tensor([one for item in row for one in item["input_ids"]]) for row in rows]  # (tokens of a row,) each
    # The first token of a sample is never predicted: before it stands the sample before.
    labels = [torch.tensor([one for item in row for one in (IGNORE, *item["labels"][1:])]) for row in rows]
    length = max(map(len, ids))
    # 0, 1, ... of each sample, and of the padding behind them: (L,) a row.
    places = [
        torch.cat([torch.arange(n) for n in (*(len(item["input_ids"]) for item in row), length - len(row_ids))])
        for row, row_ids in zip(rows, ids, strict=True)
    ]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        "position_ids": torch.stack(places),  # (rows, L)
    }
