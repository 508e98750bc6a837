"""`bench growth`: encoder and selector as N grows, ours and the authors' way, until that no longer fits.

Every N is a child process with a limit to its memory, so that what does not fit ends the child and not the machine.
"""

import copy
import math
import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from acformer.errors import UsageError
from acformer.lab.bench.encoder import encoder_variants
from acformer.lab.bench.presets import random_model
from acformer.lab.bench.settings import Settings
from acformer.lab.bench.timing import Result, Variant, timed_rows


def rows(settings: Settings) -> list[Result]:
    """One a batch, N and way; `ratio` is to ours in the same round. N / 4 anchors; the encoder is built for its N.

    Where the authors' way needs more than the limit, its row says so instead of a time.
    """
    limit = settings.memory_limit * 2**30
    found = []
    for batch in settings.batch:
        for patches in settings.patches:
            run = partial(run_child, replace(settings, patches=(patches,), batch=(batch,)), limit)
            try:
                found += in_child(run, authors=True)
            except BrokenProcessPool:  # killed from outside, as an allocator may be
                found += [*in_child(run, authors=False), _out_of_memory(batch, patches, limit)]
    return found


def in_child(run: Callable[..., list[Result]], **kwargs: Any) -> list[Result]:
    """Its result, from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, **kwargs).result()


def run_child(settings: Settings, limit: int, *, authors: bool) -> list[Result]:
    """Rows of one N, measured in the process that calls; first the authors' way is tried within `limit` bytes."""
    (patches,), (batch,) = settings.patches, settings.batch
    config = square_config(settings.preset.config.vision_config, patches)
    tower = random_model(config, settings.device, settings.dtype)
    pixels = torch.randn(batch, 3, *[config.image_size] * 2, device=settings.device, dtype=settings.dtype)
    known = encoder_variants(tower, settings.preset.config.feature_layer, pixels, max(1, patches // 4))
    labels = {"batch": batch, "patches": patches}
    variants = [({**labels, "way": "ours"}, known["anchors"])]
    with torch.inference_mode():
        fit = authors and fits(known["authors"], limit, settings.device)
        if fit:
            variants.append(({**labels, "way": "authors"}, known["authors"]))
        rows = timed_rows(settings, variants, {"way": "ours"}, label=(f"{patches} patches",))
    return rows if fit else [*rows, _out_of_memory(batch, patches, limit)]


def fits(variant: Variant, limit: int, device: torch.device) -> bool:
    """Whether it runs through in `limit` bytes on top of what the process has."""
    try:
        with limited_memory(limit, device):
            variant.run()
    except (MemoryError, torch.OutOfMemoryError):
        return False
    except RuntimeError as error:
        if "allocate memory" in str(error) or "not enough memory" in str(error):
            return False
        raise
    return True


@contextmanager
def limited_memory(limit: int, device: torch.device) -> Iterator[None]:
    """No more than `limit` bytes inside: of a GPU's memory, or of addresses as Linux counts them; else no limit."""
    addresses = Path("/proc/self/statm")
    try:
        if device.type == "cuda":
            share = (torch.cuda.memory_reserved(device) + limit) / torch.cuda.mem_get_info(device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        elif addresses.exists():
            import resource  # not on Windows

            taken = int(addresses.read_text(encoding="ascii").split()[0]) * mmap.PAGESIZE
            resource.setrlimit(resource.RLIMIT_AS, (taken + limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        elif addresses.exists():
            import resource

            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def square_config(config: PreTrainedConfig, patches: int) -> PreTrainedConfig:
    """The same encoder built for so many patches; `UsageError` unless they make a square."""
    side = math.isqrt(patches)
    if side**2 != patches:
        raise UsageError(f"--patches {patches} is no square: take {side**2} or {(side + 1) ** 2}")
    other = copy.deepcopy(config)
    other.image_size = side * config.patch_size
    return other


def _out_of_memory(batch: int, patches: int, limit: int) -> Result:
    labels = {"batch": batch, "patches": patches, "way": "authors"}
    return {**labels, "error": f"does not fit in {limit / 2**30:.0f} GiB"}
