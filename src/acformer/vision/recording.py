"""What one pass through a vision tower leaves behind: the tokens after the blocks that were asked for, the [CLS] row.

transformers returns all hidden states or none, and timm and open_clip none. Here hooks on the blocks hand what comes
by to the pass under way in their thread, so that threads which share a tower cannot read each other's images; outside
of a pass they do nothing. A `threading.local`, since torch.compile follows it and not a `ContextVar`.
"""

import threading
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn


class Recording:
    """Of one pass.

    wanted: numbers of blocks after which the tokens are kept; 0 is what the first block reads.
    tokens: (B, P+N, D) by that number. row: (B, H, P+N) of the [CLS] attention.
    """

    def __init__(self, wanted: Iterable[int]):
        self.wanted = frozenset(wanted)
        self.tokens: dict[int, Tensor] = {}
        self.row: Tensor | None = None


class _Thread(threading.local):
    recording: Recording | None = None


THREAD = _Thread()
"""`THREAD.recording` is that of the pass under way in this thread, None outside of one."""


def keep_row(row: Tensor) -> None:
    """Hand a [CLS] row to the pass under way."""
    if THREAD.recording is not None:
        THREAD.recording.row = row


def record_blocks(blocks: Any) -> None:
    """Let the blocks of a tower, an `nn.ModuleList`, hand over their tokens."""
    blocks[0].register_forward_pre_hook(_keep_input)
    for number, block in enumerate(blocks, start=1):
        block.register_forward_hook(partial(_keep_output, number))


def _keep(number: int, tokens: Tensor) -> None:
    recording = THREAD.recording
    if recording is not None and number in recording.wanted:
        recording.tokens[number] = tokens


def _keep_input(module: nn.Module, args: tuple) -> None:
    _keep(0, args[0])


def _keep_output(number: int, module: nn.Module, args: tuple, output: Any) -> None:
    _keep(number, output[0] if isinstance(output, tuple) else output)
