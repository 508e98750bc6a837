"""What takes longer than two seconds says what it does; without a terminal, training says a line now and then."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger("acformer")

PATIENCE = 2.0
INTERVAL = 30.0
"""Seconds of silence before something says what it does, and between two lines of training."""


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Logs what is done inside, if that takes a while."""
    timer = threading.Timer(PATIENCE, logger.info, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_terminal() -> bool:
    """Whether a bar can be drawn: a file or a pipe would get one line for each of its states."""
    return sys.stderr.isatty()


class ProgressLines(TrainerCallback):
    """The first step, the last, and one every `INTERVAL` seconds: its number, the loss, what is left."""

    def __init__(self) -> None:
        self._start = self._said = 0.0
        self._first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first step takes longest."""
        self._start, self._said, self._first = time.monotonic(), 0.0, state.global_step
        if state.is_world_process_zero:
            logger.info("training for %d steps", state.max_steps - state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A line, unless one was said just now."""
        now, step, last = time.monotonic(), state.global_step, state.max_steps
        if not state.is_world_process_zero or (self._said and now - self._said < INTERVAL and step < last):
            return
        self._said = now
        seconds = (now - self._start) / (step - self._first)
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        loss = f", loss {losses[-1]:.4g}" if losses else ""
        left = _span(seconds * (last - step))
        logger.info("step %d of %d%s, %.3g s a step, %s left", step, last, loss, seconds, left)


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
