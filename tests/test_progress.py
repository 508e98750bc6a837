"""What takes a while says what it does, and training without a terminal says a line now and then."""

import logging
import time
from types import SimpleNamespace

import pytest

from acformer.training import progress
from acformer.training.progress import ProgressLines, announced


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="acformer")
    return lambda: [record.getMessage() for record in caplog.records]


def test_only_what_takes_a_while_is_announced(said, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    with announced("quick"):
        pass
    with announced("slow"):
        time.sleep(0.3)
    time.sleep(0.1)
    assert said() == ["slow ..."]


def test_a_line_now_and_then(said, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = ProgressLines()
    state = SimpleNamespace(global_step=10, max_steps=210, is_world_process_zero=True, log_history=[])
    lines.on_train_begin(None, state, None)
    for step in range(11, 211):  # 200 steps of a second
        now[0] += 1
        state.global_step = step
        state.log_history.append({"loss": 2.5})
        lines.on_step_end(None, state, None)
    first, *rest = said()
    assert first == "training for 200 steps"
    assert rest[0] == "step 11 of 210, loss 2.5, 1 s a step, 3 min left"
    assert rest[-1] == "step 210 of 210, loss 2.5, 1 s a step, 0 s left"
    assert len(rest) == 8  # the first, six every 30 seconds, the last


def test_other_processes_are_silent(said):
    lines = ProgressLines()
    state = SimpleNamespace(global_step=0, max_steps=2, is_world_process_zero=False, log_history=[])
    lines.on_train_begin(None, state, None)
    lines.on_step_end(None, state, None)
    assert said() == []
