"""`vllm --trust-remote-code` with a self-contained export, in a process where this package cannot be imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from serving_models import MAX_TOKENS, messages, prompts
from serving_process import environment, reference

from acformer.export.self_contained import export_self_contained

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
NUMBERS = (0, 1, 2, 7)
WITHOUT_US = """
import json, sys
for name in ("acformer", "jaxtyping"): sys.modules[name] = None
from vllm import LLM, SamplingParams

asked = json.load(open("asked.json"))
greedy = SamplingParams(temperature=0, max_tokens={max_tokens})
model = LLM("exported", trust_remote_code=True, enforce_eager=True, dtype="float32", max_model_len=512,
            gpu_memory_utilization=0.1, max_num_seqs=4, limit_mm_per_prompt={{"image": 3}})
said = {{}}
for budget in (None, 3):
    options = {{}} if budget is None else {{"mm_processor_kwargs": {{"num_image_tokens": budget}}}}
    outputs = model.chat(asked, greedy, use_tqdm=False, **options)
    said[str(budget)] = [list(output.outputs[0].token_ids) for output in outputs]
json.dump(said, open("said.json", "w"))
"""
CPU = {
    "VLLM_PLUGINS": "",  # ours would be found where it is installed
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def without_the_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def test_ids_are_generates_where_this_package_is_not(tmp_path: Path):
    reference(tmp_path, "clip")
    export_self_contained(str(tmp_path / "clip"), tmp_path / "exported")
    asked = [messages(*prompts()[number]) for number in NUMBERS]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-c", WITHOUT_US.format(max_tokens=MAX_TOKENS)]
    options = environment(**CPU, HF_MODULES_CACHE=str(tmp_path / "modules"))
    result = subprocess.run(command, cwd=tmp_path, env=options, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    said, wanted = (json.loads((tmp_path / name).read_text()) for name in ("said.json", "clip.json"))
    end = json.loads((tmp_path / "exported/generation_config.json").read_text())["eos_token_id"]
    end = end if isinstance(end, int) else end[0]
    for budget, found in said.items():
        rows = [wanted[budget][number]["ids"] for number in NUMBERS]
        assert [without_the_end(ids, end) for ids in found] == [without_the_end(ids, end) for ids in rows], budget
