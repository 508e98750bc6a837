"""SIGTERM, workers that die or hang, memory that runs out, two runs in one folder: what is left, what is said."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_train import data, recipe, weights  # noqa: F401 (fixtures)

from acformer.errors import DataError, UsageError
from acformer.hf.checkpoints import verify_folder
from acformer.training import failures, stopping
from acformer.training.stages import train
from acformer.training.trainer import AcFormerTrainer

ONE = ["stage=finetune", "pretrain=null", "finetune.training.max_steps=5", "model.text.attention_dropout=0.1"]


class Terminated(Exception):
    """What the handler of whoever called raises."""


@pytest.fixture(autouse=True)
def caller():
    """A handler of SIGTERM that was there before."""

    def handler(signum, frame):
        raise Terminated

    before = signal.signal(signal.SIGTERM, handler)
    yield handler
    assert signal.getsignal(signal.SIGTERM) is handler, "it is there again"
    signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def at_step(monkeypatch):
    """A function: what is called in the midst of the n-th batch of the run."""
    loss = AcFormerTrainer.compute_loss

    def arrange(number, action) -> None:
        calls = []

        def watched(self, *args, **kwargs):
            calls.append(1)
            result = loss(self, *args, **kwargs)
            if len(calls) == number:
                action()
            return result

        monkeypatch.setattr(AcFormerTrainer, "compute_loss", watched)

    return arrange


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_stop_and_resume(recipe, tmp_path, step, *overrides):  # noqa: F811
    """A run that is terminated leaves a checkpoint of that step alone, and comes to what it would have come to."""
    stopped = recipe(*ONE, *overrides)
    with pytest.raises(Terminated):
        train(stopped, progress=False)
    folder = tmp_path / "run/finetune"
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert verify_folder(folder / f"checkpoint-{step}") is None
    assert not (folder / "model").exists()
    after = weights(train(stopped, progress=False))
    assert same(after, weights(train(recipe(*ONE, *overrides, f"output_dir={tmp_path}/whole"), progress=False)))
    assert not list(folder.glob("checkpoint-*")), "with save_strategy: no, nothing is left of them"


def test_a_checkpoint_is_saved_though_the_strategy_is_no(recipe, tmp_path, at_step):  # noqa: F811
    at_step(3, terminate)
    check_stop_and_resume(recipe, tmp_path, 3)


@pytest.mark.slow
def test_between_the_batches_of_a_step_the_last_whole_step_is_saved(recipe, tmp_path, at_step):  # noqa: F811
    at_step(5, terminate)  # the first batch of the third step
    accumulate = ["gradient_accumulation_steps=2", "per_device_train_batch_size=2"]
    check_stop_and_resume(recipe, tmp_path, 2, *[f"finetune.training.{key}" for key in accumulate])


def test_a_batch_that_does_not_end_is_left(recipe, tmp_path, at_step, monkeypatch):  # noqa: F811
    monkeypatch.setattr(stopping, "GRACE", 0.3)
    monkeypatch.setattr(stopping, "AGAIN", 0.1)

    def hang() -> None:
        terminate()
        start = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt):  # the first is lost, as in a callback of C
            time.sleep(60)
        time.sleep(60)
        pytest.fail(f"nobody came for {time.monotonic() - start} s")

    at_step(3, hang)
    check_stop_and_resume(recipe, tmp_path, 2)


def test_a_signal_in_a_fork_is_not_lost(recipe, tmp_path):  # noqa: F811
    """A loader's worker is forked: Python ignores what a hook raises then."""
    armed = [True]

    def before_fork() -> None:
        if armed:
            armed.clear()
            terminate()

    os.register_at_fork(before=before_fork)
    with pytest.raises(Terminated):
        train(recipe(*ONE, "finetune.training.dataloader_num_workers=1"), progress=False)
    assert not armed
    assert verify_folder(tmp_path / "run/finetune/checkpoint-1") is None


@pytest.mark.slow
def test_a_signal_to_the_workers_too_is_a_stop(recipe, tmp_path, at_step):  # noqa: F811
    """As a scheduler sends it to all processes of a job; the workers happen to be first."""

    def terminate_all() -> None:
        threading.Timer(0.3, terminate).start()
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
        time.sleep(30)

    at_step(3, terminate_all)
    check_stop_and_resume(recipe, tmp_path, 2, "finetune.training.dataloader_num_workers=2")


def test_before_the_first_step_there_is_nothing_to_save(recipe, tmp_path, at_step, monkeypatch):  # noqa: F811
    monkeypatch.setattr(stopping, "GRACE", 0.0)
    at_step(1, terminate)
    with pytest.raises(Terminated):
        train(recipe(*ONE), progress=False)
    assert not list((tmp_path / "run/finetune").glob("*"))


def test_a_signal_in_the_last_step_keeps_the_model(recipe, tmp_path, at_step):  # noqa: F811
    at_step(5, terminate)
    with pytest.raises(Terminated):
        train(recipe(*ONE), progress=False)
    assert verify_folder(tmp_path / "run/finetune/model") is None


def test_ctrl_c_ends_at_once(recipe, tmp_path, at_step):  # noqa: F811
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(recipe(*ONE), progress=False)
    assert not list((tmp_path / "run/finetune").glob("*"))


def test_nobody_listens_in_another_thread(recipe, tmp_path):  # noqa: F811
    chosen, folders = recipe(*ONE), []
    thread = threading.Thread(target=lambda: folders.append(train(chosen, progress=False)))
    thread.start()
    thread.join()
    assert verify_folder(folders[0]) is None


# What is said


def run_out(error: Exception):
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    "action",
    [run_out(MemoryError()), run_out(torch.OutOfMemoryError("CUDA out of memory.")), lambda: torch.empty(1 << 58)],
    ids=["python", "device", "cpu"],
)
def test_memory_that_runs_out(recipe, at_step, action):  # noqa: F811
    at_step(2, action)
    with pytest.raises(UsageError, match=r"out of memory: lower per_device_train_batch_size .* or max_length"):
        train(recipe(*ONE), progress=False)


def in_a_worker(monkeypatch, action) -> None:
    """What the encoding of a sample does where it is not done in this process."""
    from acformer.data import collate

    encode, here = collate.encode_conversation, os.getpid()

    def encode_elsewhere(*args, **kwargs):
        if os.getpid() != here:
            action()
        return encode(*args, **kwargs)

    monkeypatch.setattr(collate, "encode_conversation", encode_elsewhere)


WORKER = "finetune.training.dataloader_num_workers=1"


def test_a_worker_whose_memory_runs_out(recipe, monkeypatch):  # noqa: F811
    in_a_worker(monkeypatch, run_out(MemoryError()))
    with pytest.raises(UsageError, match="out of memory: lower per_device_train_batch_size"):
        train(recipe(*ONE, WORKER), progress=False)


@pytest.mark.slow
def test_a_worker_that_is_killed(recipe, monkeypatch):  # noqa: F811
    in_a_worker(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UsageError, match=r"a loader's worker was killed, .*: lower dataloader_num_workers"):
        train(recipe(*ONE, WORKER), progress=False)


@pytest.mark.slow
def test_a_worker_that_hangs(recipe, monkeypatch):  # noqa: F811
    monkeypatch.setattr("acformer.training.trainer.LOADER_TIMEOUT", 1.0)
    in_a_worker(monkeypatch, lambda: time.sleep(20))
    with pytest.raises(DataError, match="a loader's worker has given no batch for 600 s"):
        train(recipe(*ONE, WORKER), progress=False)


@pytest.mark.slow
def test_other_failures_keep_their_traceback(recipe, at_step):  # noqa: F811
    at_step(2, run_out(RuntimeError("a bug of ours")))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        train(recipe(*ONE), progress=False)


@pytest.mark.parametrize(
    "message",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:29",
        "NCCL communicator was aborted on rank 1.",
    ],
)
def test_the_process_without_the_fault(message):
    with pytest.raises(failures.AcFormerError, match="another process of this run has stopped"), failures.explained():
        raise RuntimeError(message)


# From outside


@pytest.fixture
def command(recipe, tmp_path):  # noqa: F811
    """A function that starts a long run on the command line, and waits until its first step is done."""
    recipe(*ONE)  # writes the file
    started = []

    def start(*overrides: str, wait: bool = True) -> subprocess.Popen:
        words = ["train", str(tmp_path / "two.yaml"), "stage=finetune", "pretrain=null", *overrides]
        environment = {**os.environ, "ACFORMER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "acformer.cli", *words], stderr=subprocess.PIPE, text=True, env=environment
        )
        started.append(process)
        if wait:
            lines = iter(process.stderr.readline, "")
            assert any("step 1 of" in line for line in lines), process.wait()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_run_and_a_second_one_in_its_folder(command, tmp_path):
    """Both on the command line: the second is refused in one line, the first saves on SIGTERM and says how to go on."""
    long = "finetune.training.max_steps=100000"
    first = command(long)
    second = command(long, "seed=3", wait=False)
    _, said = second.communicate(timeout=120)
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert line.startswith(f"acformer: error: another run is at work in {tmp_path}/run; wait")
    assert second.returncode == 2
    assert first.poll() is None, "the first goes on"
    start = time.monotonic()
    first.terminate()
    _, said = first.communicate(timeout=60)
    assert first.returncode == 75, said
    assert time.monotonic() - start < 25
    assert "the same command goes on" in said
    assert "Traceback" not in said
    (checkpoint,) = Path(tmp_path / "run/finetune").glob("checkpoint-*")
    assert verify_folder(checkpoint) is None
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["finetune", "processes.json", "recipe.yaml"]


# Several processes


def torchrun(tmp_path, *overrides: str) -> subprocess.Popen:
    program = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = ["train", str(tmp_path / "two.yaml"), "stage=finetune", "pretrain=null", *overrides]
    environment = {**os.environ, "ACFORMER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [*program, "-m", "acformer.cli", *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_several_processes_stop_at_the_same_step(recipe, tmp_path):  # noqa: F811
    recipe(*ONE)  # writes the file
    process = torchrun(tmp_path, "finetune.training.max_steps=100000")
    try:
        lines = iter(process.stderr.readline, "")
        assert any("step 1 of" in line for line in lines)
        start = time.monotonic()
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - start < 25
    (checkpoint,) = (tmp_path / "run/finetune").glob("checkpoint-*")
    assert verify_folder(checkpoint) is None, said
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.slow
def test_the_process_without_the_fault_says_so(recipe, data, tmp_path):  # noqa: F811
    """One of two reads a sample that it cannot use, where none may be bad."""
    import json

    records = json.loads((data / "questions.json").read_text())
    (data / "torn-only.png").write_bytes((data / "0.png").read_bytes()[:40])
    records[1]["image"] = "torn-only.png"
    (data / "one-torn.json").write_text(json.dumps(records))
    recipe(*ONE)
    sequential = "finetune.training.train_sampling_strategy=sequential"
    process = torchrun(tmp_path, f"finetune.data={data}/one-torn.json", "finetune.max_bad_fraction=0", sequential)
    _, said = process.communicate(timeout=200)
    errors = [line for line in said.splitlines() if "acformer: error" in line]
    assert any("torn-only.png" in line for line in errors), said
    assert "third_party/gloo" not in said
