"""One training step of stage 1 at the paper's size, random weights in bfloat16, on this machine: baseline and AcFormer.

    python examples/step_of_7b.py OUT.json [--rounds 3] [--words 32] [--layers 32]

The model is that of the recipe `llava15-7b-mlp577`, built once (13.5 GB); its connector is exchanged for the recipe
`llava15-7b-acformer145`'s at each number of visual tokens. A step is an image of noise through CLIP-L/336, the
connector, the language model, the loss of `words` tokens, gradients of the connector and an AdamW step of it. The rows
take turns in every round; seconds are medians, beside them the floor: FLOP of the step by torch's counter, which
does not see attention on a CPU.
"""

import argparse
import json
import resource
import statistics
import threading
import time
from pathlib import Path

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.initialization import no_init_weights

from acformer.connectors import build_connector
from acformer.hf import AcFormerForConditionalGeneration
from acformer.provenance import machine
from acformer.training.recipe import load_recipe
from acformer.training.skeleton import model_config

ACFORMER = "llava15-7b-acformer145"
ROWS = {"mlp577": "llava15-7b-mlp577", "acformer257": ACFORMER, "acformer145": ACFORMER, "acformer65": ACFORMER}
TILE = 2**20


def random_model(config) -> AcFormerForConditionalGeneration:
    """In bfloat16, weights of standard deviation 0.02 (norms 1), the connector alone to be trained."""
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = AcFormerForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    fill(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".connector." in name)
    return model.train()


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    """A matrix is a short piece of noise again and again: 7 billion draws would take minutes."""
    tile = torch.randn(TILE, generator=torch.Generator().manual_seed(0)).mul(0.02).to(torch.bfloat16)
    for parameter in module.parameters():
        flat = parameter.view(-1)
        if parameter.ndim < 2:
            flat.fill_(1)
            continue
        for start in range(0, flat.numel(), TILE):
            flat[start : start + TILE] = tile[: flat.numel() - start]


def step(model, words: int, optimizer) -> None:
    """Forward, backward, update; labels are the words behind the image."""
    count = model.model.connector.num_tokens
    ids = torch.full((1, count + words), 5)
    ids[0, :count] = model.config.image_token_id
    labels = ids.clone()
    labels[0, :count] = -100
    pixels = torch.randn(1, 3, 336, 336, dtype=torch.bfloat16)
    model(input_ids=ids, pixel_values=pixels, labels=labels, supervised_only=True).loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Peak:
    """`with Peak() as peak:` the largest resident size of the process inside, looked at ten times a second."""

    def __enter__(self) -> "Peak":
        self.bytes, self.over = 0, threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.over.wait(0.1):
            self.bytes = max(self.bytes, psutil.Process().memory_info().rss)

    def __exit__(self, *error) -> None:
        self.over.set()
        self.thread.join()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    config = model_config(load_recipe("llava15-7b-mlp577"))
    config.text_config.num_hidden_layers = arguments.layers
    config.image_token_id = 32000
    model = random_model(config)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    connectors = {}
    for name, recipe in ROWS.items():
        spec, tokens = load_recipe(recipe).model, int(name.removeprefix("mlp").removeprefix("acformer"))
        options = dict(spec.connector_kwargs) | ({"num_anchors": tokens - 1} if spec.connector == "acformer" else {})
        connector = build_connector(spec.connector, config.geometry, **options).to(torch.bfloat16)
        fill(connector)
        connectors[name] = connector, torch.optim.AdamW(connector.parameters(), lr=1e-4)
        assert connector.num_tokens in (tokens, tokens - 1), (name, connector.num_tokens)
    seconds = {name: [] for name in ROWS}
    peaks = dict.fromkeys(ROWS, 0)
    flops = {}
    for number in range(arguments.rounds + 1):  # the first warms up, and is counted
        for name, (connector, optimizer) in connectors.items():
            model.model.connector = connector
            started = time.perf_counter()
            if number == 0:
                with FlopCounterMode(display=False) as counter:
                    step(model, arguments.words, optimizer)
                flops[name] = counter.get_total_flops()
            else:
                with Peak() as peak:
                    step(model, arguments.words, optimizer)
                seconds[name].append(round(time.perf_counter() - started, 2))
                peaks[name] = max(peaks[name], peak.bytes)
            print(number, name, round(time.perf_counter() - started, 1), "s", flush=True)
            arguments.out.write_text(json.dumps(result(arguments, weights, seconds, peaks, flops), indent=1) + "\n")


def result(arguments, weights: int, seconds: dict, peaks: dict, flops: dict) -> dict:
    """What is known so far, each row beside the baseline."""
    medians = {name: statistics.median(times) for name, times in seconds.items() if times}
    rows = {}
    for name in flops:
        rows[name] = {"seconds": seconds[name], "tera_flop": round(flops[name] / 1e12, 3)}
        rows[name]["peak_rss_bytes"] = peaks[name]
        rows[name]["floor"] = round(flops["mlp577"] / flops[name], 2)
        if name in medians:
            rows[name]["faster_than_mlp577"] = round(medians["mlp577"] / medians[name], 2)
    return {
        "command": f"python examples/step_of_7b.py {arguments.out.name} --rounds {arguments.rounds} "
        f"--words {arguments.words} --layers {arguments.layers}",
        **machine(),
        "load_average": psutil.getloadavg(),
        "weights_bytes": weights,
        "max_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
