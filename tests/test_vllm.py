"""Models of ours in vLLM (its CPU build): token ids equal to generate's, whatever is batched, cached or streamed.

What transformers says is computed in a process of its own: vLLM patches transformers' classes.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
from serving_models import BUDGETS, MAX_TOKENS, messages, prompts
from serving_process import ROOT, environment, reference, serving

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
OPTIONS = "--dtype float32 --enforce-eager --max-model-len 1024 --gpu-memory-utilization 0.1 --max-num-seqs 8"
CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "ACFORMER_API_KEY": "sk-test",
}


@pytest.fixture(scope="module", params=["dinov2", "clip"])
def kind(request):
    """DINOv2, as the quickstart's model has, and CLIP."""
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    made = tmp_path_factory.mktemp(kind)
    reference(made, kind)
    return made


@pytest.fixture(scope="module")
def said(folder, kind):
    return json.loads((folder / f"{kind}.json").read_text())


@pytest.fixture(scope="module")
def client(folder, kind):
    """Of `acformer serve --engine vllm`."""
    import openai

    options = ("--engine", "vllm", "--engine-args", OPTIONS, "--max-images", "3", "--max-new-tokens", "64")
    with serving(folder / "log", str(folder / kind), *options, seconds=300, **CPU) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-test", max_retries=0, timeout=120)
        yield client
        client.close()


def ask(client, kind: str, number: int, budget: int | None, stream: bool) -> tuple[str, int]:
    """(text, tokens of the prompt)."""
    asked = {"model": kind, "messages": messages(*prompts()[number]), "max_tokens": MAX_TOKENS, "temperature": 0}
    extra = {} if budget is None else {"mm_processor_kwargs": {"num_image_tokens": budget}}
    answer = client.chat.completions.create(**asked, stream=stream, extra_body=extra)
    if not stream:
        return answer.choices[0].message.content, answer.usage.prompt_tokens
    chunks = list(answer)
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks[-1].usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_text_is_generates(client, kind, said, stream):
    """Twelve prompts, three budgets, through acformer's gate; the second round by the prefix cache."""
    for budget, number in product(BUDGETS, range(12)):
        row = said[str(budget)][number]
        assert ask(client, kind, number, budget, stream) == (row["text"], len(row["prompt"])), (budget, number)


def test_all_at_once(client, kind, said):
    """Requests of all budgets in one batch."""
    wanted = [(budget, number) for number, budget in product(range(12), BUDGETS)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda one: ask(client, kind, one[1], one[0], bool(one[1] % 2))[0], wanted))
    assert answers == [said[str(budget)][number]["text"] for budget, number in wanted]


def test_detail_and_what_cannot_be_given(client, kind):
    import openai

    def length(detail, **fields):
        asked = {"model": kind, "messages": messages("who?", [0], detail=detail), "max_tokens": 1}
        return client.chat.completions.create(**asked, **fields).usage.prompt_tokens

    assert length("auto") - length("low") == 3
    assert length("high") - length("auto") == 5
    for budget, message in ((18, "it can give 2 to 17"), ("x", "whole number"), ([3, 4], "2 values for 1 images")):
        with pytest.raises(openai.BadRequestError, match=message):
            length("auto", extra_body={"mm_processor_kwargs": {"num_image_tokens": budget}})
    url = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    with pytest.raises(openai.BadRequestError, match="data:image"):
        client.chat.completions.create(model=kind, messages=[{"role": "user", "content": [url]}])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="no").models.list()
    assert [model.id for model in client.models.list()] == [kind]


def test_clients_that_hang_up(client, kind, said):
    """Their places are free, and who comes then is answered."""

    def hang_up(number):
        asked = {"model": kind, "messages": messages("who?", [number % 4]), "max_tokens": 64, "stream": True}
        answer = client.chat.completions.create(**asked)
        if number % 2:
            next(iter(answer))
        answer.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(hang_up, range(48)))
    assert ask(client, kind, 3, 16, False)[0] == said["16"][3]["text"]


IN_PROCESS = """
import json, sys
from vllm import LLM, SamplingParams
import serving_models as made

def main(folder, out):
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=1024, gpu_memory_utilization=0.1,
              limit_mm_per_prompt={"image": 3}, enable_prefix_caching=True, max_num_seqs=8)
    sampling = SamplingParams(temperature=0, max_tokens=made.MAX_TOKENS)
    chats = [made.messages(*one) for one in made.prompts()]
    said = {}
    for turn in (0, 1):  # the second time from the caches
        for budget in made.BUDGETS:
            options = {} if budget is None else {"mm_processor_kwargs": {"num_image_tokens": budget}}
            rows = llm.chat(chats, sampling, use_tqdm=False, **options)
            said[f"{turn} {budget}"] = [[list(r.prompt_token_ids), list(r.outputs[0].token_ids)] for r in rows]
    refused = []
    for budget in (18, [3]):
        try:
            llm.chat(chats[:2], sampling, use_tqdm=False, mm_processor_kwargs={"num_image_tokens": budget})
        except ValueError as error:
            refused.append(str(error))
    said["refused"] = refused
    open(out, "w").write(json.dumps(said))

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def test_token_ids_without_a_server(folder, kind, said):
    """`LLM(FOLDER).chat`, whole batches, nothing of ours but the plug-in."""
    script = folder / "in_process.py"
    script.write_text(IN_PROCESS)
    out = folder / "ids.json"
    command = [sys.executable, str(script), str(folder / kind), str(out)]
    done = subprocess.run(command, env=environment(**CPU), capture_output=True, text=True, timeout=600, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    got = json.loads(out.read_text())
    for turn, budget in product((0, 1), BUDGETS):
        wanted = [[row["prompt"], row["ids"]] for row in said[str(budget)]]
        assert got[f"{turn} {budget}"] == wanted, (turn, budget)
    assert "it can give 2 to 17" in got["refused"][0]
    assert "one budget for all images" in got["refused"][1]


def test_gated_fusion_is_refused_at_the_start(tmp_path):
    """By acformer serve in one line, and by vLLM itself."""
    make = (
        "import sys, tiny; m = tiny.model(fusion='gated_cross_attention'); m.save_pretrained(sys.argv[1]);"
        "tiny.processor(1, fusion='gated_cross_attention', budgets=m.config.budgets).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", make, str(tmp_path / "gated")], env=environment(), check=True)
    serve = [sys.executable, "-m", "acformer.cli", "serve", str(tmp_path / "gated"), "--engine", "vllm"]
    done = subprocess.run(serve, env=environment(**CPU), capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 2
    assert "acformer: error: vLLM cannot serve fusion 'gated_cross_attention'" in done.stderr.splitlines()[-1]
    plain = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "gated")]
    bare = subprocess.run(
        [*plain, *OPTIONS.split()], env=environment(**CPU), capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert bare.returncode != 0
    assert "vLLM cannot serve fusion 'gated_cross_attention'" in bare.stdout + bare.stderr
