"""`acformer serve --engine vllm`: vLLM's own OpenAI server, in this process' place, with our gate as its middleware.

The gate reads in that process, from an environment variable, what the command line said in this one.
"""

import json
import os
import shlex
import sys
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from acformer.errors import UsageError
from acformer.images import ImageLimits
from acformer.serving.request import Limits

SETTINGS = "ACFORMER_SERVE"
"""The environment variable: JSON of `command`'s arguments that the gate needs."""


def command(folder: str, name: str, host: str, port: int, tokens: int | None, limits: Limits, extra: str) -> list[str]:
    """The command line of vLLM's server. `extra`: further options of its own.

    Raises:
        UsageError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise UsageError("--engine vllm needs vLLM, in an environment of its own (docs/serving.md)")
    words = ["--model", folder, "--served-model-name", name, "--host", host, "--port", str(port)]
    words += ["--middleware", "acformer.serving.vllm_server.VllmGate", "--disable-access-log-for-endpoints", "/health"]
    words += ["--limit-mm-per-prompt", json.dumps({"image": limits.max_images})]
    words += ["--trust-request-mm-kwargs"]  # the gate lets a checked budget through, and nothing else
    if tokens is not None:
        words += ["--mm-processor-kwargs", json.dumps({"num_image_tokens": tokens})]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, *shlex.split(extra)]


def settings(folder: str, name: str, host: str, tokens: int | None, limits: Limits) -> str:
    """What `VllmGate` reads."""
    return json.dumps({"folder": folder, "name": name, "host": host, "tokens": tokens, "limits": asdict(limits)})


class VllmGate:
    """The gate as vLLM wants its middleware: a class that takes the application alone."""

    def __init__(self, app: Any):
        from acformer.hf import AcFormerProcessor
        from acformer.serving.gate import Gate, Service
        from acformer.serving.prepare import VllmBody

        given = json.loads(os.environ[SETTINGS])
        told = given["limits"]
        limits = Limits(**{**told, "image": ImageLimits(**told["image"]), "allow_hosts": tuple(told["allow_hosts"])})
        processor = AcFormerProcessor.from_pretrained(given["folder"])
        rewrite = VllmBody(limits, processor.image_token)
        key, host = os.environ.get("ACFORMER_API_KEY") or None, given["host"]
        self.gate = Gate(app, Service(given["name"], processor.sizes, rewrite, limits, given["tokens"], key, host))

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Serve or refuse one request."""
        await self.gate(scope, receive, send)
