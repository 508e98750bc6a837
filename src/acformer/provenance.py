"""Where and with what a figure was measured: no number of ours stands without it."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

SOURCES = Path(__file__).parent
PROC = Path("/proc")
"""What Linux tells of the machine."""


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, memory, threads and, for a `device` that is no CPU, its name; versions; the commit of the sources.

    `changes` is there when the sources differ from that commit, be it by a file that git does not know.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    facts = {
        "machine": f"{processor()}, {platform.machine()}, {torch.get_num_threads()} threads, {capability}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _git("rev-parse", "--short", "HEAD").stdout.strip() or "not in a git checkout",
    }
    if device is not None and device.type != "cpu":
        facts["device"] = device_name(device)
    if _git("status", "--porcelain", "--", ".").stdout:
        facts["changes"] = "the sources had changes that were not committed"
    return facts


def processor() -> str:
    """Its model and the memory beside it, as far as the system tells."""
    model = _proc("cpuinfo").get("model name") or platform.processor() or "processor unknown"
    memory = _proc("meminfo").get("MemTotal")
    return f"{model}, {int(memory.split()[0]) / 2**20:.0f} GiB" if memory else model


def peak_resident_bytes() -> int:
    """The most memory that this process has held so far, as the system counts it."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def device_name(device: torch.device) -> str:
    """`cpu`, or what an accelerator calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _proc(name: str) -> dict[str, str]:
    """The lines `key : value` of a file of Linux, none elsewhere."""
    lines = (PROC / name).read_text(encoding="utf-8").splitlines() if (PROC / name).exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(SOURCES), *arguments], capture_output=True, text=True)
