"""What LLaVA's mix at its true size costs before the first step: seconds and memory, to resume, records a second.

    python examples/llava_mix.py FOLDER
    python examples/large_data.py FOLDER [RUNS]      (a table on stdout; RUNS: of each of the trainings, default 1)

Trainings are `acformer train` in processes of their own, of a model of a few thousand weights on batches of like
length, so that what is measured is the data. "more": than the same training on the first 1000 records.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = """
model:
  vision: {work}/vision
  text: {work}/text
  connector: acformer
  connector_kwargs: {{num_anchors: 4, depth: 1, num_heads: 2, head_dim: 8}}
output_dir: {work}/run
finetune:
  data: {data}
  max_length: 256
  learning_rates: {{connector: 1.0e-3}}
  training: {{max_steps: {steps}, per_device_train_batch_size: 8, save_strategy: steps, save_steps: 2,
             train_sampling_strategy: group_by_length, logging_steps: 1}}
"""
READ, ENCODED = 20_000, 2000


def main(folder: str, runs: str = "1") -> None:
    """Print a table of Markdown."""
    data = Path(folder) / "mix.json"
    with tempfile.TemporaryDirectory(dir=folder) as work:
        os.environ["ACFORMER_CACHE"] = f"{work}/cache"
        _tiny_parts(Path(work))
        few = Path(work) / "few.json"
        few.write_text(json.dumps(_first(data, 1000)))
        for name in {record["image"].rpartition("/")[0] for record in _first(data, 1000) if "image" in record}:
            (Path(work) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(work) / name).symlink_to((Path(folder) / name).absolute())
        print("| what | wall s | CPU s | peak MiB | MiB more |\n|---|---|---|---|---|")
        floor = _train(Path(work), few, "1000 records")
        for _ in range(int(runs)):
            subprocess.run(["rm", "-rf", f"{work}/cache"], check=True)
            _train(Path(work), data, "all, the first time: to step 1", floor)
            _train(Path(work), data, "all, again: to step 1", floor)
            _train(Path(work), data, "all, resumed from step 2: to step 3", floor, resume=True)
        _records_a_second(data, Path(work))


def _first(data: Path, count: int) -> list[dict]:
    from acformer.data.datasets import load_samples

    numbers = {sample.record for sample in load_samples(data, limit=count)}
    decoder, text = json.JSONDecoder(), data.open(encoding="utf-8").read(30_000 * count // 8)
    records, at = [], text.index("{")
    while len(records) < len(numbers):
        record, end = decoder.raw_decode(text, at)
        records.append(record)
        at = text.index("{", end)
    return records


def _tiny_parts(work: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    config = tiny.config()
    CLIPVisionModel(config.vision_config).save_pretrained(work / "vision")
    tiny.processor().image_processor.save_pretrained(work / "vision")
    AutoModelForCausalLM.from_config(config.text_config).save_pretrained(work / "text")
    tiny.tokenizer().save_pretrained(work / "text")


def _train(work: Path, data: Path, what: str, floor: float = 0.0, resume: bool = False) -> float:
    """A line of seconds and CPU seconds until the first new step, and the peak of memory until then, which it gives."""
    recipe = work / "recipe.yaml"
    recipe.write_text(RECIPE.format(work=work, data=data, steps=2 if not resume else 4))
    if not resume:
        subprocess.run(["rm", "-rf", f"{work}/run"], check=True)
    else:  # as if it had been stopped after step 2 of 4
        state = work / "run/finetune/checkpoint-2/trainer_state.json"
        state.write_text(state.read_text().replace('"max_steps": 2', '"max_steps": 4'))
        subprocess.run(["rm", "-rf", f"{work}/run/finetune/model", f"{work}/run/recipe.yaml"], check=True)
        _sign(state.parent)
    begun = time.time()
    command = [sys.executable, "-m", "acformer.cli", "train", str(recipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    told, seconds, peak = [], 0.0, 0.0
    assert process.stderr is not None
    for line in process.stderr:
        told.append(line)
        if f"step {3 if resume else 1} of" in line:
            seconds = time.time() - begun
            peak = _peak(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    assert seconds, f"{status}: {''.join(told)}"
    more = f"{peak - floor:,.0f}" if floor else ""
    print(f"| {what} | {seconds:.1f} | {usage.ru_utime + usage.ru_stime:.1f} | {peak:,.0f} | {more} |", flush=True)
    return peak


def _peak(pid: int) -> float:
    """Of a process that runs (what `wait4` says begins with its parent's)."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def _sign(checkpoint: Path) -> None:
    from acformer.hf.checkpoints import write_manifest

    write_manifest(checkpoint)


def _records_a_second(data: Path, work: Path) -> None:
    import tiny

    from acformer.data.collate import ConversationDataset
    from acformer.data.datasets import open_samples

    samples, chance = open_samples(str(data)), random.Random(0)
    chosen = chance.sample(range(len(samples)), min(READ, len(samples)))
    begun = time.process_time()
    for index in chosen:
        samples.sample(index)
    read = len(chosen) / (time.process_time() - begun)
    dataset = ConversationDataset(samples, tiny.processor())
    begun = time.process_time()
    for index in chosen[:ENCODED]:
        dataset[index]
    encoded = min(ENCODED, len(chosen)) / (time.process_time() - begun)
    print(f"\n{len(samples):,} records; a second of one core: {read:,.0f} read at random, {encoded:,.0f} encoded")


if __name__ == "__main__":
    main(*sys.argv[1:])
