"""First token and throughput of `acformer serve` at 577, 145 and 65 visual tokens under eight clients, side by side.

    python examples/serving_load.py OUT.json [--engine vllm] [--rounds 3]

A model of random weights (what it says means nothing, what it costs is right): 336-pixel images in 24 x 24 patches, a
small encoder, `acformer` as connector, whose weights serve every budget, and a language model of 38 M parameters. One
server; a round asks it at each budget, in turn, so that what else the machine does falls on all of them. The server's
CPU time is taken, too: other processes change it little. Every request has an image of its own, so no cache of prompts
helps, and a round before those that count warms up. The floor of a request is its arithmetic at the rate of a matrix
product measured before; of a step of an answer the time to read the weights, where that is longer: once for all clients
in vLLM, which computes them together, once for each on transformers, which answers one after the other. Needs
`acformer[serve]` (or vLLM's environment) and psutil.
"""

import argparse
import base64
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import psutil
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaImageProcessorPil

from acformer.data.templates import TEMPLATES
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.hf.build import train_tokenizer
from acformer.lab.bench.roofline import counted_flops, encoder_flops, text_flops, text_weights
from acformer.lab.bench.timing import MeasuredPeak, Variant, measure
from acformer.provenance import machine

BUDGETS = (577, 145, 65)
CLIENTS, NEW_TOKENS, PORT = 8, 16, 8765
CPU_VLLM = "--dtype float32 --enforce-eager --max-model-len 1024 --gpu-memory-utilization 0.1 --max-num-seqs 8"


def save_model(folder: str) -> AcFormerForConditionalGeneration:
    """Builds it and saves it."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["what is in the image? a cat, a dog and a house"], 320)
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = AcFormerConfig(
        vision_config=vision,
        text_config=text,
        connector="acformer",
        connector_kwargs={"num_anchors": 144, "depth": 2, "num_heads": 4, "head_dim": 32},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = AcFormerForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        for number, word in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
            if not word.isascii() or "<" in word:  # letters alone, and no end before its time
                model.lm_head.weight[number] = 0
    model.generation_config.update(pad_token_id=tokenizer.pad_token_id, eos_token_id=[tokenizer.eos_token_id])
    model.save_pretrained(folder)
    AcFormerProcessor(
        LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer,
        TEMPLATES["vicuna_v1"],
        num_placeholders=config.num_placeholders,
        budgets=config.budgets,
    ).save_pretrained(folder)
    return model


def floor_seconds(
    model: AcFormerForConditionalGeneration, budget: int, prompt: int, peak: MeasuredPeak, together: int
) -> float:
    """Seconds of a request at least.

    prompt: its tokens, image included. together: requests for which a step reads the weights once.
    """
    config, connector = model.config, model.model.connector
    text = config.text_config
    connected = counted_flops(connector, lambda on_meta, features: on_meta(features, budget))
    first = encoder_flops(config.vision_config, (24, 24), config.feature_layer) + connected + text_flops(text, prompt)
    steps = [text_flops(text, 1, past) for past in range(prompt, prompt + NEW_TOKENS - 1)]
    read = torch.float32.itemsize * text_weights(text) / together
    parts = [(first, 0.0), *((flops, read) for flops in steps)]
    return sum(peak.roofline(Variant(lambda: None, flops, nbytes)) for flops, nbytes in parts)


@contextlib.contextmanager
def served(folder: str, engine: str) -> Iterator[tuple[openai.OpenAI, psutil.Process]]:
    """A client of the server while it runs, and its process."""
    command = [sys.executable, "-m", "acformer.cli", "serve", folder, "--name", "model", "--port", str(PORT)]
    command += ["--engine", "vllm", "--engine-args", CPU_VLLM] if engine == "vllm" else ["--device", "cpu"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0, timeout=600)
        try:
            for _ in range(600):
                with contextlib.suppress(openai.APIConnectionError):
                    client.models.list()
                    break
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read().decode()[-3000:])
                time.sleep(0.5)
            yield client, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


def image_url(seed: int) -> str:
    """Another image for every number."""
    file = BytesIO()
    small = Image.frombytes("RGB", (24, 24), random.Random(seed).randbytes(3 * 24 * 24))
    small.resize((336, 336)).save(file, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def ask(client: openai.OpenAI, budget: int, seed: int) -> tuple[float, int]:
    """Seconds until the first token; tokens of the prompt."""
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": image_url(seed)}}, {"type": "text", "text": "what?"}]
    begin, first, prompt = time.perf_counter(), 0.0, 0
    stream = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": parts}],
        max_tokens=NEW_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"mm_processor_kwargs": {"num_image_tokens": budget}},
    )
    for chunk in stream:
        if not first and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - begin
        if chunk.usage is not None and chunk.usage.completion_tokens != NEW_TOKENS:
            raise RuntimeError(f"{chunk.usage.completion_tokens} tokens came, not {NEW_TOKENS}")
        prompt = chunk.usage.prompt_tokens if chunk.usage is not None else prompt
    return first, prompt


def cpu_seconds(server: psutil.Process) -> float:
    """What it and its children have computed."""
    times = [one.cpu_times() for one in (server, *server.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def one_round(client: openai.OpenAI, server: psutil.Process, budget: int, number: int) -> dict[str, float]:
    """Eight clients at once, one request each."""
    begin, cpu = time.perf_counter(), cpu_seconds(server)
    with ThreadPoolExecutor(CLIENTS) as pool:
        times = list(pool.map(lambda seed: ask(client, budget, seed), range(number * CLIENTS, (number + 1) * CLIENTS)))
    seconds = time.perf_counter() - begin
    return {
        "first_token_s": statistics.median(first for first, _ in times),
        "requests_per_s": CLIENTS / seconds,
        "tokens_per_s": CLIENTS * NEW_TOKENS / seconds,
        "cpu_s_per_request": (cpu_seconds(server) - cpu) / CLIENTS,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rounds: dict[int, list[dict[str, float]]] = {budget: [] for budget in BUDGETS}
    peak = measure({}, torch.device("cpu"), torch.float32, 5).peak
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(folder)
        with served(folder, arguments.engine) as (client, server):
            prompts = {budget: ask(client, budget, 10_000 + budget)[1] for budget in BUDGETS}
            number = 0
            for budget in BUDGETS:
                one_round(client, server, budget, 1000 + budget)
            for turn in range(arguments.rounds):
                for budget in BUDGETS[turn % 3 :] + BUDGETS[: turn % 3]:
                    rounds[budget].append(one_round(client, server, budget, number))
                    number += 1
    together = CLIENTS if arguments.engine == "vllm" else 1
    floors = {budget: floor_seconds(model, budget, prompts[budget], peak, together) for budget in BUDGETS}
    names = list(rounds[577][0])
    medians = {b: {name: statistics.median(one[name] for one in rows) for name in names} for b, rows in rounds.items()}
    ratios = {
        b: {
            name: statistics.median(whole[name] / one[name] for whole, one in zip(rounds[577], rows, strict=True))
            for name in names
        }
        for b, rows in rounds.items()
    }
    found = {
        "command": " ".join(["python", *sys.argv]),
        **machine(),
        "threads_of_the_server": os.environ.get("OMP_NUM_THREADS", "all"),
        "engine": arguments.engine,
        "language_model_parameters": sum(one.numel() for one in model.model.language_model.parameters()),
        "gflop_per_s": peak.flops / 1e9,
        "gb_per_s": peak.nbytes / 1e9,
        "prompt_tokens": prompts,
        "floor_s_per_request": floors,
        "clients": CLIENTS,
        "new_tokens": NEW_TOKENS,
        "medians": medians,
        "577_over_it": ratios,
        "rounds": rounds,
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({"medians": medians, "577_over_it": ratios, "floor_s_per_request": floors}, indent=1))


if __name__ == "__main__":
    main()
