"""`acformer serve` in a process of its own, and clients for it."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths.rstrip(os.pathsep)}
    return {**os.environ, **quiet, **more}


def reference(folder: Path, kind: str) -> None:
    """A model and what transformers says to its prompts (`serving_models`)."""
    script = ROOT / "tests/serving_models.py"
    subprocess.run([sys.executable, str(script), str(folder), kind], env=environment(), check=True, capture_output=True)


class Server:
    """One that runs: `url`, `process`, `log`."""

    def __init__(self, process: subprocess.Popen, port: int, log: Path):
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}"

    @property
    def rss(self) -> int:
        """Bytes of memory that it holds."""
        import psutil

        return psutil.Process(self.process.pid).memory_info().rss

    @property
    def connections(self) -> int:
        """Sockets of clients that it still holds."""
        import psutil

        return sum(one.status == "ESTABLISHED" for one in psutil.Process(self.process.pid).net_connections("tcp"))

    def health(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


@contextlib.contextmanager
def serving(log: Path, *arguments: str, seconds: float = 120, **more: str) -> Iterator[Server]:
    """`acformer serve ARGUMENTS --port PORT`, until it answers; ended with all that it started."""
    port = free_port()
    command = [sys.executable, "-m", "acformer.cli", "serve", *arguments, "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment(**more), stdout=file, stderr=file, start_new_session=True, cwd=log.parent
        )
        server = Server(process, port, log)
        try:
            deadline = time.monotonic() + seconds
            while not server.health():
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
