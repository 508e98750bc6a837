"""What ends a run though no setting is misspelt: memory, loaders, other processes. One line, and what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from acformer.errors import AcFormerError, DataError, UsageError

LOADER_TIMEOUT = 600.0
"""Seconds that training waits for a batch of a loader's worker: one that hangs would hang the run for ever."""

LESS_MEMORY = (
    "lower per_device_train_batch_size (and raise gradient_accumulation_steps by as much) or max_length, or give "
    "activation_checkpointing: true"
)
FEWER_WORKERS = "lower dataloader_num_workers, dataloader_prefetch_factor or per_device_train_batch_size"
KNOWN: tuple[tuple[str, type[AcFormerError], str], ...] = (
    (r"shared memory|Bus error", UsageError, f"no shared memory is left for a loader's worker: {FEWER_WORKERS}"),
    (
        r"DataLoader worker.*(killed by signal|exited unexpectedly)",
        UsageError,
        f"a loader's worker was killed, as the system does when memory runs out: {FEWER_WORKERS}",
    ),
    (
        r"DataLoader timed out",
        DataError,
        f"a loader's worker has given no batch for {LOADER_TIMEOUT:g} s: does the disk with the images hang? "
        "(dataloader_num_workers: 0 loads in the process itself)",
    ),
    (
        r"MemoryError|out of memory|not enough memory|n't allocate memory|ALLOC_FAILED",
        UsageError,
        f"out of memory: {LESS_MEMORY}",
    ),
    (
        r"[Gg]loo|NCCL|Connection (closed|reset) by peer|DistBackendError",
        AcFormerError,
        "another process of this run has stopped: what it says is the reason",
    ),
)
"""What an exception's class and message look like; what it is; what to say."""


@contextmanager
def explained() -> Iterator[None]:
    """A known failure inside becomes one line; any other exception stays as it is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
        for pattern, kind, message in KNOWN:
            if re.search(pattern, said, re.DOTALL):
                raise kind(message) from error
        raise
