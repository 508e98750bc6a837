"""Tasks side by side in processes of their own, the costliest resource being cores: each process gets its share.

On a CPU two processes of one thread do more than one of two. A process ends with its task, so that memory is given
back and a crash (out of memory, say) is the failure of one run.
"""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch
from tqdm import tqdm

from acformer.lab.reproduce.execute import Task


def default_jobs() -> int:
    """One an accelerator's machine, one a core without one."""
    return 1 if torch.accelerator.is_available() else num_cores()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def run_tasks(tasks: Sequence[Task], jobs: int, bar: tqdm) -> None:
    """All tasks, `jobs` at a time; with one job in this process. Ctrl-C and SIGTERM end the processes started here."""
    if jobs == 1:
        for task in tasks:
            bar.set_postfix_str(task.job.name)
            task()
            bar.update(task.job.cost)
        return
    waiting, running = list(tasks), list[tuple[BaseProcess, Task]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append((_start(waiting[0], num_cores() // jobs), waiting.pop(0)))
            bar.set_postfix_str(", ".join(task.job.name for _, task in running))
            ended = wait([process.sentinel for process, _ in running])  # is_alive may lag behind: not asked
            for pair in [pair for pair in running if pair[0].sentinel in ended]:
                running.remove(pair)
                _finish(*pair)
                bar.update(pair[1].job.cost)
    finally:
        for process, _ in running:
            process.terminate()
        for process, _ in running:
            process.join()


def _start(task: Task, num_threads: int) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(task, num_threads))
    process.start()
    return process


def _finish(process: BaseProcess, task: Task) -> None:
    process.join()
    if process.exitcode != 0:
        task.fail(f"its process ended with code {process.exitcode} (a negative one is a signal)")


def _work(task: Task, num_threads: int) -> None:
    torch.set_num_threads(max(1, num_threads))
    try:
        task()
    except KeyboardInterrupt:  # Ctrl-C reaches the whole group: the parent says it
        os._exit(1)
