"""The processes that torchrun has started, if any, and waiting for one another."""

import os
from datetime import timedelta
from types import TracebackType

import torch

LONGEST_WAIT = timedelta(days=7)
"""One process may be done long before another."""


class Processes:
    """`rank` of `count`; alone without torchrun. `with Processes() as processes:` joins and leaves the others."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._joined = False

    def __enter__(self) -> "Processes":
        if self.count > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
            self._joined = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._joined:
            torch.distributed.destroy_process_group()

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()
