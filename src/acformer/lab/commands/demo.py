"""`acformer demo`: a page on which one drops an image, sees its anchors, moves them and asks."""

import argparse
import shutil
import sys
from typing import Any

from acformer.commands.arguments import MODEL_HELP, add_device, default_model, positive
from acformer.errors import UsageError


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("demo", parents=[common], help="a local page: see the anchors, move them, ask")
    ours = f"{default_model()} if it was fetched, else " if default_model() else ""
    default = f"{ours}the newest quickstart, else anchors alone"
    sub.add_argument("--model", help=f"{MODEL_HELP} (default: {default})")
    sub.add_argument("--compare", metavar="MODEL", help="a second model that answers beside the first")
    sub.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default 127.0.0.1)")
    sub.add_argument("--port", type=positive, help="default: the first free one from 7860 on")
    sub.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16, float16")
    add_device(sub)
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Serves until Ctrl-C."""
    try:
        from acformer.lab.demo.app import UPLOADS, Page
    except ImportError as error:
        raise UsageError(f"the page needs gradio ({error}): pip install 'acformer[demo]'") from error
    from acformer.hf.build import parse_device, parse_dtype
    from acformer.lab.demo.page_setup import set_up_page

    dtype = "auto" if arguments.dtype == "auto" else parse_dtype(arguments.dtype)
    page = Page(set_up_page(arguments.model, arguments.compare, dtype, parse_device(arguments.device)))
    try:
        _, url, _ = page.launch(arguments.host, arguments.port, prevent_thread_lock=True, quiet=True)
    except OSError as error:
        raise UsageError(f"cannot serve at {arguments.host}: {error}; choose another --port or --host") from error
    sys.stderr.write(f"the page is at {url} (Ctrl-C ends it)\n")
    try:
        page.blocks.block_thread()
    finally:
        shutil.rmtree(UPLOADS, ignore_errors=True)  # at once: gradio's threads may outlive the page
