"""SIGTERM while a stage trains: a checkpoint on the way out, whatever the save strategy, so that the run can go on.

A scheduler gives some 30 seconds. The handler only notes the signal, and it is looked at after each batch: an exception
raised in a handler may be lost, in a fork or a callback of C. Only where no batch ends within `GRACE` seconds (a long
one, a loader that hangs) is one raised after all, and the last step that was whole is saved.
"""

import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

GRACE = 10.0
AGAIN = 3.0
"""Seconds from the signal to the exception, and to the next one, should it be lost."""


class StopOnSignal(TrainerCallback):
    """Ends training soon after SIGTERM, with a checkpoint of the last step; several processes end at the same one.

    trainer: an `AcFormerTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.requested = False
        self.saved_step = 0  # the last one of which there is a checkpoint, or nothing to be saved
        self._requested_at = 0.0
        self._is_updating = False  # from before the optimizer's step until the step is counted
        self._rng: tuple = ()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Notes SIGTERM inside, and hands it on to whoever listened before once all that can be saved is saved."""
        if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note) or signal.SIG_DFL
        left = threading.Event()
        threading.Thread(target=self._hurry, args=(left,), daemon=True).start()
        try:
            yield
        except (KeyboardInterrupt, RuntimeError) as error:
            if not self._is_stop(error):
                raise
            self._save_last_step()
        finally:
            left.set()
            signal.signal(signal.SIGTERM, before)
        if self.requested:
            signal.raise_signal(signal.SIGTERM)

    def _note(self, signum: int, frame: Any) -> None:
        """The handler. It raises when the time is up, if nothing can be left half done by that."""
        if not self.requested:
            self.requested, self._requested_at = True, time.monotonic()
        is_late = time.monotonic() - self._requested_at >= GRACE
        if is_late and self._can_leave():
            raise KeyboardInterrupt(signum)

    def _can_leave(self) -> bool:
        """Of several processes, one that leaves alone would leave the others waiting."""
        trainer = self.trainer
        return trainer.is_in_train and trainer.args.world_size == 1 and not (self._is_updating or trainer.is_saving)

    def _hurry(self, left: threading.Event) -> None:
        """In a thread: the signal again, when the time is up. It ends the main thread's waiting, too."""
        main = threading.main_thread().ident
        while not left.wait(AGAIN):
            is_late = self.requested and time.monotonic() - self._requested_at >= GRACE
            if is_late and main is not None and hasattr(signal, "pthread_kill"):
                signal.pthread_kill(main, signal.SIGTERM)

    def _is_stop(self, error: BaseException) -> bool:
        """The handler's, or of a loader's worker that the same signal has ended: a scheduler may send it to all."""
        if isinstance(error, KeyboardInterrupt):
            return bool(error.args)  # Ctrl-C has none
        if "DataLoader worker" not in str(error):
            return False
        deadline = time.monotonic() + 1
        while not self.requested and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.requested

    def _save_last_step(self) -> None:
        if self.trainer.state.global_step != self.saved_step and self._can_leave():
            _set_rng_states(self._rng)
            self.trainer._save_checkpoint(self.trainer.model, trial=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Whatever it starts or goes on from need not be saved."""
        self.saved_step, self._rng = state.global_step, _rng_states()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights are about to change."""
        self._is_updating = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is counted, and can be saved."""
        self._is_updating, self._rng = False, _rng_states()
        self._stop_if_requested(state, control)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Between the batches of a step: it will be done anew, with the same random numbers."""
        if self._stop_if_requested(state, control):
            _set_rng_states(self._rng)

    def _stop_if_requested(self, state: Any, control: Any) -> bool:
        if self.trainer.args.world_size > 1:
            flag = torch.tensor(int(self.requested), device=self.trainer.args.device)
            self.requested = bool(self.trainer.accelerator.reduce(flag, "sum").item())
        if self.requested:
            control.should_training_stop = True
            control.should_save = state.global_step != self.saved_step
        return self.requested


def _rng_states() -> tuple:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return (*states, device.type, getattr(torch, device.type).get_rng_state()) if device else states


def _set_rng_states(states: tuple) -> None:
    python, numpy, cpu, *accelerator = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if accelerator:
        kind, state = accelerator
        getattr(torch, kind).set_rng_state(state)
