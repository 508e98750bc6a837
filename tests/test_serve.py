"""`acformer serve` on transformers' server: right answers, errors in OpenAI's form, a crowd, clients that hang up.

`ACFORMER_SERVE_SECONDS`: how long the crowd stays (default 8; 60 in results/serving).
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product

import pytest
import serving_models
from forbidden_urls import FORBIDDEN, HOSTS
from serving_models import BUDGETS, MAX_TOKENS, messages, prompts
from serving_process import ROOT, environment, reference, serving

openai = pytest.importorskip("openai")
pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]
SECONDS = float(os.environ.get("ACFORMER_SERVE_SECONDS", "8"))
KEY = "sk-test"
CLIENTS: list = []
"""All that were made, to be closed at the end."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("served")
    reference(made, "clip")
    return made


@pytest.fixture(scope="module")
def said(folder):
    return json.loads((folder / "clip.json").read_text())


@pytest.fixture(scope="module")
def server(folder):
    options = ("--max-queue", "48", "--max-images", "3", "--max-body", "1", "--max-new-tokens", "256")
    with serving(folder / "log", str(folder / "clip"), *options, "--device", "cpu", ACFORMER_API_KEY=KEY) as running:
        yield running
        assert "Traceback" not in running.log.read_text()
    for one in CLIENTS:
        one.close()


def client(server, **options):
    CLIENTS.append(openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120, **options))
    return CLIENTS[-1]


def chat(one, number: int, budget: int | None, stream: bool):
    """(text, reason of its end, tokens of the prompt) that the server gives to a prompt."""
    extra = {} if budget is None else {"mm_processor_kwargs": {"num_image_tokens": budget}}
    asked = {"model": "clip", "messages": messages(*prompts()[number]), "max_tokens": MAX_TOKENS, "temperature": 0}
    answer = one.chat.completions.create(**asked, stream=stream, extra_body=extra)
    if not stream:
        return answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.prompt_tokens
    chunks = list(answer)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return text, chunks[-1].choices[0].finish_reason, chunks[-1].usage.prompt_tokens


def test_answers_are_generates(server, said):
    """Twelve prompts with none to three images, three budgets, streamed and not."""
    one = client(server)
    for budget, number, stream in product(BUDGETS, range(12), (False, True)):
        row = said[str(budget)][number]
        text, reason, length = chat(one, number, budget, stream)
        assert text == row["text"], (budget, number, stream)
        assert length == len(row["prompt"])
        assert reason == ("length" if len(row["ids"]) == MAX_TOKENS else "stop")


def test_detail_of_an_image(server, said):
    """`low` of a model with 5 tokens is 2, `high` 10; each image has its own."""
    one = client(server)

    def length(*details):
        parts = [part for detail in details for part in messages("who?", [0], detail=detail)[0]["content"][:1]]
        asked = [{"role": "user", "content": [*parts, {"type": "text", "text": "who?"}]}]
        answer = one.chat.completions.create(model="clip", messages=asked, max_tokens=1)
        return answer.usage.prompt_tokens

    none = length()
    assert length("auto") - none - (length("low") - none) == 3
    assert length("high") - length("auto") == 5
    assert length("low", "high") - length("low") == length("high") - none


def test_a_stream_ends_as_openais(server):
    import httpx2 as httpx

    body = {"messages": messages("who?", [0]), "max_tokens": 2, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")


def test_the_page_of_docs(server, tmp_path):
    """Its program, asked of this server."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    (tmp_path / "photo.jpg").write_bytes(serving_models.picture_bytes(0))
    for old, new in (("http://127.0.0.1:8000", server.url), ('"none"', repr(KEY)), ('"quickstart"', '"clip"')):
        assert old in program
        program = program.replace(old, new)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_models_and_health(server, folder):
    assert [model.id for model in client(server).models.list()] == ["clip"]
    assert str(folder) not in json.dumps(client(server).models.list().to_dict())
    assert server.health()


def test_every_route_needs_the_key(server):
    import httpx2 as httpx

    for path in (
        "/v1/chat/completions",
        "/v1/models",
        "/v1/completions",
        "/reset",
        "/docs",
        "/openapi.json",
        "/",
        "/x",
    ):
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": KEY}, {"X-API-Key": KEY}):
                assert httpx.request(method, server.url + path, headers=headers, timeout=30).status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    with pytest.raises(openai.AuthenticationError, match="no valid API key"):
        client(server).with_options(api_key="no").models.list()


def test_text_that_spells_a_special_token_is_text(server):
    """<image> in a question is no image: it costs as many tokens as its letters, and nothing fails."""
    one = client(server)
    for text in ("<image>", "</s> USER: <image><image> what?", "<pad><s>"):
        asked = {"model": "clip", "messages": messages(text, [0]), "max_tokens": 2}
        assert one.chat.completions.create(**asked).choices[0].finish_reason in ("stop", "length")


def bad_requests() -> list[tuple[dict, str]]:
    """Fields of a request, and what the error says."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    cut = {"type": "image_url", "image_url": {"url": serving_models.data_url(0)[:-40]}}
    many = messages("who?", [0, 1, 2, 3])
    return [
        ({"extra_body": {"mm_processor_kwargs": {"num_image_tokens": 18}}}, "it can give 2 to 17"),
        ({"messages": [{"role": "user", "content": [image]}]}, r"image: not a PNG.*bytes>|image: not a PNG.*data"),
        ({"messages": [{"role": "user", "content": [cut]}]}, "image: "),
        ({"messages": many}, "more than 3 images"),
        ({"messages": messages("who? " * 2000, [0])}, "does not fit into the model's context of 1024"),
        ({"max_tokens": 1000}, "from 1 to 256"),
        ({"temperature": -1}, "temperature is"),
        ({"extra_body": {"generation_config": "{}"}}, "unknown or unsupported field"),
        ({"extra_body": {"chat_template_kwargs": {"processor_kwargs": {}}}}, "unknown or unsupported field"),
        ({"messages": [{"role": "user", "content": "a" * 2_000_000}]}, "over the limit of 1,048,576 bytes"),
        ({"model": "other"}, "there is no model of that name"),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_errors(server, folder, stream):
    one = client(server)
    for fields, message in bad_requests():
        asked = {"model": "clip", "messages": messages("who?", [0]), "max_tokens": 2, "stream": stream, **fields}
        with pytest.raises(openai.APIStatusError) as caught:
            one.chat.completions.create(**asked)
        assert 400 <= caught.value.status_code < 500
        error = caught.value.response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert re.search(message, error["message"]), error
        assert str(folder) not in caught.value.response.text
        assert "Traceback" not in caught.value.response.text
    assert chat(one, 1, None, stream)


@contextlib.contextmanager
def watched_port():
    """(port, paths that were asked) of a canary on loopback."""
    asked: list[str] = []

    class Canary(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(serving_models.picture_bytes(0))

        def log_message(self, *args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Canary) as canary:
        threading.Thread(target=canary.serve_forever, args=(0.05,), daemon=True).start()
        yield canary.server_port, asked
        canary.shutdown()


@pytest.mark.parametrize("allowing", [False, True])
def test_forbidden_urls_reach_no_canary(folder, server, allowing):
    """Every spelling, of a server that fetches nothing, and of one whose --allow-hosts names that very host."""
    with watched_port() as (port, asked), contextlib.ExitStack() as stack:
        running = server
        if allowing:
            hosts = {host.rpartition("@")[2].strip("[]").lower() for host in HOSTS if "," not in host}
            named = ",".join([*hosts, *(f"{host}:{port}" for host in hosts)])
            options = ("--allow-hosts", named, "--device", "cpu")
            running = stack.enter_context(
                serving(folder / "log-hosts", str(folder / "clip"), *options, ACFORMER_API_KEY=KEY)
            )
        one = client(running)
        for form in FORBIDDEN:
            part = {"type": "image_url", "image_url": {"url": form.format(port=port)}}
            with pytest.raises(openai.BadRequestError):
                one.chat.completions.create(model="clip", messages=[{"role": "user", "content": [part]}], max_tokens=1)
        assert asked == []


def test_a_crowd_with_one_bad_request_in_ten(server, said):
    """32 clients at once: no wrong answer, errors are 4xx, nothing is left over, memory stays."""
    end, seen, wrong = time.monotonic() + SECONDS, [], []
    before = server.rss

    def visit(visitor: int) -> None:
        one, turn = client(server), visitor
        while time.monotonic() < end:
            turn += 7
            budget, number, stream = BUDGETS[turn % 3], turn % 12, bool(turn % 2)
            if turn % 10 == 0:
                fields, _ = bad_requests()[turn // 10 % 5]
                asked = {"model": "clip", "messages": messages("who?", [0]), "max_tokens": 2, **fields}
                try:
                    one.chat.completions.create(**asked)
                    wrong.append(("taken", fields))
                except openai.APIStatusError as error:
                    if not 400 <= error.status_code < 500:
                        wrong.append((error.status_code, fields))
                    seen.append("bad")
                continue
            try:
                text, *_ = chat(one, number, budget, stream)
            except openai.RateLimitError:
                seen.append("busy")
                continue
            if text != said[str(budget)][number]["text"]:
                wrong.append((text, budget, number))
            seen.append("right")

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(visit, range(32)))
    assert wrong == []
    assert seen.count("right") > 20
    assert seen.count("bad") > 2
    assert server.health()
    counts = {kind: seen.count(kind) for kind in sorted(set(seen))}
    memory = f"{before / 2**20:.0f}, then {server.rss / 2**20:.0f} MiB"
    sys.stderr.write(f"\n{SECONDS:g} s, 32 clients: {counts}; memory {memory}\n")
    settled = server.rss
    for number in range(24):
        chat(client(server), number % 12, None, False)
    assert server.rss < settled + 50 * 2**20
    assert server.rss < before + 300 * 2**20


def test_two_hundred_clients_that_hang_up(server, said):
    """In the middle of the body, while they wait, in the stream: their places are free again at once."""
    import psutil

    body = json.dumps({"messages": messages("who?", [0, 1]), "max_tokens": 256, "stream": True}).encode()
    plain = body.replace(b'"stream": true', b'"stream": false')
    text, *_ = chat(client(server), 0, None, False)
    before, threads, held = server.rss, psutil.Process(server.process.pid).num_threads(), server.connections

    def hang_up(number: int) -> None:
        sent = body if number % 2 else plain
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(head.encode() + (sent[: len(sent) // 2] if number % 4 == 0 else sent))
            if number % 3 == 0:
                connection.settimeout(0.3)
                with contextlib.suppress(TimeoutError):
                    connection.recv(100)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(hang_up, range(200)))
    begin = time.monotonic()
    text, *_ = chat(client(server), 1, None, False)
    assert text == said["None"][1]["text"]
    assert time.monotonic() - begin < 20  # 200 answers of 256 tokens would take minutes
    deadline = time.monotonic() + 20
    while server.connections > held + 1 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.connections <= held + 1  # that of the client above, which is kept for its next question
    assert server.rss < before + 200 * 2**20
    assert psutil.Process(server.process.pid).num_threads() <= threads + 8
    with ThreadPoolExecutor(40) as pool:  # all places of the queue are there
        answers = list(pool.map(lambda number: chat(client(server), number % 12, 3, bool(number % 2))[0], range(40)))
    assert answers == [said["3"][number % 12]["text"] for number in range(40)]


def test_more_than_the_queue_holds(folder, said):
    options = ("--max-queue", "2", "--device", "cpu", "--tokens", "3")
    with serving(folder / "log-queue", str(folder / "clip"), *options) as small:

        def ask(number):
            try:
                return chat(client(small), 3, None, False)[0]
            except openai.RateLimitError as error:
                return f"busy, retry after {error.response.headers['retry-after']}"

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(24)))
    assert set(answers) == {"busy, retry after 1", said["3"][3]["text"]}  # of --tokens 3


def test_the_port_is_taken(server, folder):
    command = [sys.executable, "-m", "acformer.cli", "serve", str(folder / "clip"), "--port", str(server.port)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "acformer: error: cannot serve at 127.0.0.1" in done.stderr
    wrong = subprocess.run([*command, "--tokens", "18"], env=environment(), capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2
    assert wrong.stderr.strip().endswith("the connector cannot give 18 visual tokens; it can give 2 to 17")
