"""`acformer serve`: a model behind an OpenAI-compatible endpoint, of this machine alone unless told otherwise."""

import argparse
import os
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from acformer.commands.arguments import add_model, load, positive
from acformer.errors import CheckpointError, UsageError

KEY = "ACFORMER_API_KEY"
MIB = 2**20


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser(
        "serve",
        parents=[common],
        help="an OpenAI-compatible endpoint: chat completions, streaming and not",
        epilog=f"{KEY} in the environment is the key that clients must send; see docs/serving.md.",
    )
    add_model(sub, max_new_tokens=512)
    sub.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default 127.0.0.1)")
    sub.add_argument("--port", type=positive, default=8000)
    sub.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    sub.add_argument("--engine-args", default="", metavar="ARGS", help="further options of vLLM's server, in one word")
    sub.add_argument("--name", help="the model's name for clients (default: that of its folder)")
    about = "hosts, with commas between, from which images may be fetched (default: none)"
    sub.add_argument("--allow-hosts", default="", metavar="HOSTS", help=about)
    sub.add_argument("--max-images", type=positive, default=8, help="in a request (default 8)")
    sub.add_argument("--max-body", type=positive, default=32, metavar="MIB", help="of a request (default 32 MiB)")
    sub.add_argument("--max-queue", type=positive, default=64, help="requests inside at once (default 64)")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Serves until Ctrl-C."""
    from acformer.hf.checkpoints import model_folder
    from acformer.serving.request import Limits

    limits = Limits(
        max_body=arguments.max_body * MIB,
        max_images=arguments.max_images,
        max_new_tokens=arguments.max_new_tokens,
        max_queue=arguments.max_queue,
        allow_hosts=tuple(name.strip().lower() for name in arguments.allow_hosts.split(",") if name.strip()),
    )
    if not is_local(arguments.host) and not os.environ.get(KEY):
        sys.stderr.write(f"acformer: everyone who reaches {arguments.host} may ask: set {KEY} to ask for a key\n")
    name = arguments.name or served_name(arguments.model)
    if arguments.engine == "vllm":
        _become_vllm(arguments, model_folder(arguments.model), name, limits)
    _serve(arguments, name, limits)


def is_local(host: str) -> bool:
    """Whether it is an address of this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def served_name(model: str) -> str:
    """The folder's own name, or the run's for `RUN/finetune/model`: no path is told to clients."""
    parts = [part for part in Path(model).absolute().parts if part not in ("finetune", "pretrain", "model")]
    return model if not Path(model).exists() and model.count("/") == 1 else parts[-1]


def _serve(arguments: argparse.Namespace, name: str, limits: Any) -> None:
    try:
        import uvicorn

        from acformer.serving.transformers_app import build_app
    except ImportError as error:
        raise UsageError(f"it needs fastapi, uvicorn and openai ({error}): pip install 'acformer[serve]'") from error
    model, processor = load(arguments)
    if arguments.tokens is not None:
        processor.sizes.of("num_image_tokens", arguments.tokens)
        processor.num_image_tokens = arguments.tokens
    gate = build_app(model, processor, name, limits, os.environ.get(KEY) or None, arguments.host)
    config = uvicorn.Config(
        gate, host=arguments.host, port=arguments.port, log_level="warning", access_log=False, timeout_keep_alive=30
    )
    sys.stderr.write(f"{name} is served at http://{arguments.host}:{arguments.port}/v1 (Ctrl-C ends it)\n")
    try:
        uvicorn.Server(config).run()
    except SystemExit as error:  # uvicorn has said why on its log
        where = f"{arguments.host}:{arguments.port}"
        raise UsageError(f"cannot serve at {where}: choose another --port or --host") from error


def _become_vllm(arguments: argparse.Namespace, folder: str, name: str, limits: Any) -> None:
    from acformer.hf import AcFormerProcessor
    from acformer.hf.adapters import adapter_base
    from acformer.hf.connector_weights import read_parts
    from acformer.serving.vllm_server import SETTINGS, command, settings

    if adapter_base(Path(folder)) is not None or read_parts(Path(folder)) is not None:
        raise UsageError(
            f"{arguments.model} holds a part of a model, and vLLM reads whole ones: acformer merge {arguments.model} "
            "--out FOLDER, then serve that"
        )
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(f"no model in {arguments.model}: there is no config.json")
    processor = AcFormerProcessor.from_pretrained(folder)
    options = {} if arguments.tokens is None else {"num_image_tokens": arguments.tokens}
    processor._get_num_multimodal_tokens([(1, 1)], **options)  # says what vLLM cannot serve
    words = command(folder, name, arguments.host, arguments.port, arguments.tokens, limits, arguments.engine_args)
    os.environ[SETTINGS] = settings(folder, name, arguments.host, arguments.tokens, limits)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.execv(words[0], words)
