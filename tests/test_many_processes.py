"""Two processes (gloo) come to what one comes to: DDP and FSDP2, resumed with another number, LoRA, text alone, a kill.

FSDP2 is accelerate's own, which leaves CPUs out; `fsdp_on_cpu.py` lets it have them.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CLIPVisionModel

from acformer.hf.checkpoints import load_model, verify_folder

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "fsdp_on_cpu.py"
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
FSDP, TWICE = "finetune.training.fsdp=true", "finetune.training.gradient_accumulation_steps=2"
LORA = ["finetune.lora={r: 4, dropout: 0}", "finetune.learning_rates={connector: 0.01, language_model: 0.02}"]
LIMITS = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, an encoder, a language model and a recipe; its runs go there, too."""
    folder = tmp_path_factory.mktemp("many")
    records = []
    for number in range(16):
        name = list(COLOURS)[number % 3]
        Image.new("RGB", (20, 14), tuple(min(255, c + number) for c in COLOURS[name])).save(folder / f"{number}.png")
        answer = name + " indeed" * (number % 4)
        said = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    (folder / "data.json").write_text(json.dumps(records))
    for number, record in enumerate(records):
        if number % 4 > 1:  # batches of two: every second one, that of rank 1, is text alone
            del record["image"]
            record["conversations"][0]["value"] = "Which colour?"
    (folder / "mixed.json").write_text(json.dumps(records))
    CLIPVisionModel(tiny.config().vision_config).save_pretrained(folder / "vision")
    tiny.processor().image_processor.save_pretrained(folder / "vision")
    AutoModelForCausalLM.from_config(tiny.config().text_config).save_pretrained(folder / "text")
    tiny.tokenizer().save_pretrained(folder / "text")
    (folder / "recipe.yaml").write_text(f"""
model:
  vision: {folder}/vision
  text: {folder}/text
  connector: acformer
  connector_kwargs: {{num_anchors: 4, depth: 1, num_heads: 2, head_dim: 8}}
finetune:
  data: {folder}/data.json
  learning_rates: {{connector: 0.01, language_model: 0.002}}
  training: {{max_steps: 4, per_device_train_batch_size: 2, logging_steps: 1, save_strategy: steps, save_steps: 2}}
""")
    return folder


def command(processes: int, folder: Path, name: str, *overrides: str) -> list[str]:
    program = [sys.executable]
    if processes > 1:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = f"output_dir={folder}/{name}"
    return [*program, str(SCRIPT), "train", str(folder / "recipe.yaml"), "--quiet", run, *overrides]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACFORMER_CACHE": str(folder / "cache")}


def run(processes: int, folder: Path, name: str, *overrides: str) -> Path:
    """The stage's folder, once the run is done."""
    words = command(processes, folder, name, *overrides)
    result = subprocess.run(words, capture_output=True, text=True, timeout=250, env=environment(folder))
    if "SIGABRT" in result.stderr:  # of gloo, once in dozens of runs on a busy machine: going on is promised
        result = subprocess.run(words, capture_output=True, text=True, timeout=250, env=environment(folder))
    assert result.returncode == 0, [line for line in result.stderr.splitlines() if "rror" in line] or result.stderr
    stage = folder / name / "finetune"
    assert verify_folder(stage / "model") is None
    return stage


@pytest.fixture(scope="module")
def one(folder):
    """One process with twice the accumulation."""
    return run(1, folder, "one", TWICE)


@pytest.fixture(scope="module")
def sharded(folder):
    """Two processes under FSDP2."""
    return run(2, folder, "sharded", FSDP)


def losses(stage: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((stage / "log.json").read_text()) if "loss" in entry]


def check_same(stage: Path, expected: Path, file: str = "model.safetensors") -> None:
    assert losses(stage) == pytest.approx(losses(expected), rel=1e-5)
    ours, theirs = load_file(stage / "model" / file), load_file(expected / "model" / file)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], **LIMITS, msg=name)


def test_ddp(folder, one):
    check_same(run(2, folder, "ddp"), one)


def test_fsdp(sharded, one):
    check_same(sharded, one)
    assert not list(sharded.glob("checkpoint-*/*.bin"))  # whole safetensors, once
    ours, theirs = (torch.load(s / "checkpoint-4/optimizer.pt", weights_only=True) for s in (sharded, one))
    assert ours["param_groups"] == theirs["param_groups"]
    for number, state in theirs["state"].items():
        torch.testing.assert_close(ours["state"][number]["exp_avg"], state["exp_avg"], **LIMITS)


@pytest.mark.parametrize(
    ("begun", "processes", "settings"),
    [("sharded", 1, [TWICE]), ("one", 2, [FSDP]), ("one", 2, []), ("sharded", 2, [FSDP])],
)
def test_another_number_of_processes_goes_on(folder, one, request, begun, processes, settings):
    """From the checkpoint after two of four steps."""
    source = request.getfixturevalue(begun).parent
    name = f"{begun}-{processes}-{len(settings)}"
    shutil.copytree(source, folder / name)
    record = folder / name / "recipe.yaml"
    record.write_text(record.read_text().replace(f"output_dir: {source}", f"output_dir: {folder / name}"))
    for left in ("model", "checkpoint-4"):
        shutil.rmtree(folder / name / "finetune" / left)
    check_same(run(processes, folder, name, *settings), one)


def test_another_size_of_a_step_is_refused(folder, sharded):
    name = "refused"
    shutil.copytree(sharded.parent, folder / name)
    record = folder / name / "recipe.yaml"
    record.write_text(record.read_text().replace(str(sharded.parent), str(folder / name)))
    shutil.rmtree(folder / name / "finetune/model")
    result = subprocess.run(command(1, folder, name), capture_output=True, text=True, env=environment(folder))
    assert result.returncode == 2
    assert "holds a run of another recipe" in result.stderr
    assert "not the same: finetune" in result.stderr


@pytest.mark.parametrize("settings", [[], [FSDP]], ids=["ddp", "fsdp"])
def test_text_alone_on_one_rank_does_not_hang_the_others(folder, settings):
    mixed = [f"finetune.data={folder}/mixed.json", "finetune.training.train_sampling_strategy=sequential"]
    kind = "fsdp" if settings else "ddp"
    expected = run(1, folder, f"mixed-one-{kind}", *mixed, TWICE)
    check_same(run(2, folder, f"mixed-{kind}", *mixed, *settings), expected)


@pytest.mark.parametrize("settings", [[], [FSDP]], ids=["ddp", "fsdp"])
def test_adapters(folder, settings):
    kind = "fsdp" if settings else "ddp"
    expected = run(1, folder, f"lora-one-{kind}", *LORA, TWICE)
    stage = run(2, folder, f"lora-{kind}", *LORA, *settings)
    check_same(stage, expected, "adapter_model.safetensors")
    assert not (stage / "model/model.safetensors").exists()
    assert load_model(str(stage.parent))
    for left in ("model", "checkpoint-4"):
        shutil.rmtree(stage / left)
    check_same(run(2, folder, stage.parent.name, *LORA, *settings), expected, "adapter_model.safetensors")


def test_rank_0_alone_reads_the_weights(folder, one):
    efficient = "finetune.training.fsdp_config={cpu_ram_efficient_loading: true}"
    words = command(2, folder, "efficient", FSDP, efficient)
    variables = {**environment(folder), "TELL_META": str(folder / "meta")}
    result = subprocess.run(words, capture_output=True, text=True, timeout=250, env=variables)
    assert result.returncode == 0, result.stderr
    check_same(folder / "efficient/finetune", one)
    shares = {int(path.suffix[1:]): float(path.read_text()) for path in folder.glob("meta.*")}
    assert shares == {0: 0.0, 1: 1.0}  # of the weights that have no memory before they are sharded


@pytest.mark.parametrize("settings", [[], [FSDP]], ids=["ddp", "fsdp"])
def test_mixed_precision_and_checkpointing(folder, settings):
    """What learns is in float32, all else in bf16; activations are made again in the backward pass."""
    half = ["finetune.training.bf16=true", "finetune.training.activation_checkpointing=true"]
    half += ["finetune.learning_rates={connector: 0.01}"]
    kind = "fsdp" if settings else "ddp"
    stage = run(2, folder, f"half-{kind}", *half, *settings)
    expected = run(1, folder, f"half-one-{kind}", *half, TWICE)
    assert losses(stage) == pytest.approx(losses(expected), rel=2e-2)
    for name, weight in load_file(stage / "model/model.safetensors").items():
        learns = name.startswith("model.connector.")
        assert weight.dtype == (torch.float32 if learns else torch.bfloat16), name
    assert next(load_model(str(stage.parent))[0].parameters()).dtype == torch.float32


@pytest.mark.parametrize("settings", [[], [FSDP]], ids=["ddp", "fsdp"])
def test_a_rank_that_is_killed_ends_all_and_is_named(folder, settings):
    name = f"killed-{'fsdp' if settings else 'ddp'}"
    words = command(2, folder, name, "finetune.training.max_steps=100000", *settings)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment(folder))
    checkpoint = folder / name / "finetune/checkpoint-2/manifest.json"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert checkpoint.exists()
    (victim,) = [
        pid for pid in children(process.pid) if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    start = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - start < 60
    assert process.returncode != 0
    assert re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: -9", said)


def variables(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
