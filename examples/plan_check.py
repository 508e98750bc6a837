"""`acformer plan` against what a training step really takes on this machine's CPU: `python examples/plan_check.py`.

Models of 20 to 60 M random weights, as sizes alone matter. Each case runs two optimizer steps of our own trainer in a
process of its own; its memory is the most that was resident, less what was before the model was made (glibc gives
large blocks back at once: MALLOC_MMAP_THRESHOLD_). FLOP are those that torch's counter sees in one more pass, its CPU
attention added. Frozen weights are held in the dtype of the arithmetic, as the plan has it.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
SMALL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8}
LARGE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8}
CASES: dict[str, dict[str, Any]] = {
    "stage 1, fp32": {"stage": "pretrain"},
    "stage 1, bf16": {"stage": "pretrain", "training": {"bf16": True}},
    "stage 1, bf16, checkpointing": {"stage": "pretrain", "training": {"bf16": True, "gradient_checkpointing": True}},
    "stage 2, fp32": {"stage": "finetune"},
    "stage 2, bf16": {"stage": "finetune", "training": {"bf16": True}},
    "stage 2, bf16, checkpointing": {"stage": "finetune", "training": {"bf16": True, "gradient_checkpointing": True}},
    "stage 2, bf16, 2 passes": {"stage": "finetune", "training": {"bf16": True, "gradient_accumulation_steps": 2}},
    "stage 2, bf16, LoRA": {"stage": "finetune", "training": {"bf16": True}, "lora": {"r": 16}},
    "60 M, stage 2, bf16, checkpointing": {
        "stage": "finetune",
        "text": LARGE,
        "training": {"bf16": True, "gradient_checkpointing": True},
    },
    "60 M, stage 2, fp32": {"stage": "finetune", "text": LARGE, "rows": 8},
}
WORDS = 128


def main() -> None:
    """The table of all cases, or one case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=CASES, help="one alone, as JSON")
    name = parser.parse_args().case
    if name is not None:
        print(json.dumps(measure(**CASES[name])))
        return
    print("| case | parameters | plan MiB | measured MiB | ratio | plan GFLOP | measured GFLOP | ratio | s a step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in CASES:
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, "-W", "ignore", __file__, "--case", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        print(line(name, json.loads(done.stdout.splitlines()[-1])), flush=True)


def line(name: str, found: dict[str, Any]) -> str:
    """One of the table."""
    memory = [found[key] / 2**20 for key in ("plan_bytes", "bytes")]
    flops = [found[key] / 1e9 for key in ("plan_flops", "flops")]
    cells = [name, f"{found['parameters'] / 1e6:.1f} M"]
    for values in (memory, flops):
        cells += [f"{values[0]:.0f}", f"{values[1]:.0f}", f"{values[0] / values[1]:.3f}"]
    return f"| {' | '.join([*cells, format(found['seconds'], '.1f')])} |"


def measure(stage: str, text: dict = SMALL, training: dict | None = None, lora: dict | None = None, rows: int = 16):
    """The plan of a case, and the case."""
    from transformers import CLIPVisionConfig, LlamaConfig

    from acformer.training.plan import Hardware, Texts, plan
    from acformer.training.recipe import load_recipe

    with TemporaryDirectory() as folder:
        CLIPVisionConfig(**VISION, image_size=168, patch_size=14).save_pretrained(f"{folder}/vision")
        LlamaConfig(**text, vocab_size=8000).save_pretrained(f"{folder}/text")
        settings = {"per_device_train_batch_size": rows, **(training or {})}
        recipe = load_recipe(
            "tiny",
            [
                f"stage={stage}",
                f"model.vision={folder}/vision",
                f"model.text={folder}/text",
                "model.connector=acformer",
                "model.connector_kwargs={num_anchors: 64, depth: 2}",
                "cache_features=false",
                f"{stage}.group=1",
                f"{stage}.template=plain",
                f"{stage}.training={json.dumps(settings)}",
                f"{stage}.lora={json.dumps(lora)}",
                *(["pretrain.learning_rates={connector: 1.0e-3}"] if stage == "pretrain" else []),
            ],
        )
        planned = plan(recipe, Hardware(), Texts(mean=WORDS, longest=WORDS))
        (of_stage,) = planned.stages
        found = run(recipe, stage, Path(folder))
    plans = {"plan_bytes": of_stage.total, "plan_flops": of_stage.flops_a_step}
    return {**plans, **found, "parameters": sum(planned.parameters.values()), "plan": asdict(of_stage)}


def run(recipe: Any, stage: str, folder: Path) -> dict[str, float]:
    """Two steps of the trainer: peak of the resident memory over what was there before, FLOP of a step, seconds."""
    import torch

    from acformer.training.skeleton import model_config

    config, spec = model_config(recipe), getattr(recipe, stage)
    trained(config, spec, folder, words=8, rows=1)  # all that is loaded and allocated once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, done = resident(), [0], threading.Event()
    watcher = threading.Thread(target=lambda: watch(peak, done))
    watcher.start()
    begun = time.perf_counter()
    trainer, batch = trained(config, spec, folder, WORDS, spec.training["per_device_train_batch_size"])
    seconds = (time.perf_counter() - begun) / 2
    done.set()
    watcher.join()
    trainer.model.gradient_checkpointing_disable()  # what it computes again is not in the plan's FLOP
    with torch.autocast("cpu", torch.bfloat16, enabled=trainer.args.bf16):
        flops = counted(lambda: trainer.model(**batch, supervised_only=True).loss.backward())
    return {"bytes": peak[0] - before, "flops": flops * trainer.args.gradient_accumulation_steps, "seconds": seconds}


def trained(config: Any, spec: Any, folder: Path, words: int, rows: int) -> tuple[Any, dict]:
    """The trainer after two steps on a made-up batch."""
    from transformers import TrainingArguments

    from acformer.hf import AcFormerForConditionalGeneration
    from acformer.training.lora import add_adapters
    from acformer.training.trainer import AcFormerTrainer, freeze

    model = AcFormerForConditionalGeneration(config)
    freeze(model, spec.learning_rates)
    if spec.lora is not None:
        add_adapters(model, spec.lora)
    args = TrainingArguments(
        str(folder),
        max_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        optim="adamw_torch_fused",
        **{**spec.training, "per_device_train_batch_size": rows},
    )
    for parameter in model.parameters():
        if args.bf16 and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    batch = made_up(config, rows, words)
    trainer = AcFormerTrainer(
        model=model,
        args=args,
        learning_rates=spec.learning_rates,
        train_dataset=[0] * rows * args.gradient_accumulation_steps,
        data_collator=lambda _: {key: value.clone() for key, value in batch.items()},
    )
    trainer.train()
    return trainer, batch


def made_up(config: Any, rows: int, words: int) -> dict[str, Any]:
    """Image tokens, then words that are all learned; the first row is padded by one, as some row always is."""
    import torch

    tokens = config.num_placeholders
    ids = torch.cat([torch.zeros(rows, tokens, dtype=torch.int64), torch.ones(rows, words, dtype=torch.int64)], dim=1)
    mask, labels = torch.ones_like(ids), torch.where(ids == 0, -100, ids)
    mask[0, -1], labels[0, -1] = 0, -100
    pixels = torch.randn(rows, 3, config.image_size, config.image_size)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def counted(do: Any) -> int:
    """FLOP by torch's counter."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten

    def forward(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        do()
    return counter.get_total_flops()


def watch(peak: list[int], done: threading.Event) -> None:
    """Keep the most that was resident."""
    while not done.wait(0.001):
        peak[0] = max(peak[0], resident())


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
