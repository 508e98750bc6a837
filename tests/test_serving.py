"""What `acformer serve` lets through: requests field by field, addresses, the gate; needs no server."""

import asyncio
import importlib
import itertools
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import serving_models
import tiny
from forbidden_urls import FORBIDDEN

from acformer import cli
from acformer.commands.serve import is_local, served_name
from acformer.errors import ImageError
from acformer.evaluate.generate import ask as converse_once
from acformer.evaluate.generate import decode
from acformer.hf.budgets import Budgets
from acformer.images import ImageLimits
from acformer.serving import remote
from acformer.serving.gate import CHAT, PLACE, Gate, Service
from acformer.serving.prepare import Preparation, VllmBody
from acformer.serving.request import Limits, RefusedError, parse
from acformer.serving.vllm_server import command, settings

SIZES = Budgets(5, ((2, 17),))
LIMITS = Limits()
IMAGE = {"type": "image_url", "image_url": {"url": serving_models.data_url(0)}}
TEXT = {"type": "text", "text": "who?"}


def body(*parts, **fields) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": [*parts, TEXT]}], **fields}).encode()


def read(*parts, limits=LIMITS, default=None, **fields):
    return parse(body(*parts, **fields), "model", limits, SIZES, default)


def refusal(data: bytes, limits: Limits = LIMITS) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        parse(data, "model", limits, SIZES)
    assert "\n" not in caught.value.message
    return caught.value


# What a request may ask


def test_a_request():
    fields = {"model": "model", "stream": True, "max_tokens": 7, "temperature": 0, "stop": ["x"], "user": "me", "n": 1}
    request = read(IMAGE, **fields, tools=None, frequency_penalty=0)
    assert request.messages == [{"role": "user", "content": [{"type": "image"}, TEXT]}]
    assert request.images == [IMAGE["image_url"]["url"]]
    assert (request.stream, request.max_new_tokens, request.budgets) == (True, 7, [5])
    assert request.options == {"temperature": 0, "stop": ["x"]}
    assert read().max_new_tokens == Limits().max_new_tokens


def test_budgets_of_a_request():
    def budgets(*details, default=None, **fields):
        parts = [{"type": "image_url", "image_url": {**IMAGE["image_url"], "detail": one}} for one in details]
        return read(*parts, default=default, **fields).budgets

    assert budgets("auto", "low", "high", None) == [5, 2, 10, 5]
    assert budgets("auto", "low", default=9) == [9, 2]
    assert budgets(None, None, mm_processor_kwargs={"num_image_tokens": 9}) == [9, 9]
    assert budgets(None, default=9, mm_processor_kwargs={"num_image_tokens": 5}) == [5]
    assert budgets(None, None, mm_processor_kwargs={"num_image_tokens": [9, 3]}) == [9, 3]
    assert budgets(None, mm_processor_kwargs={"images_kwargs": {"max_soft_tokens": 99}}) == [17]
    assert budgets(mm_processor_kwargs={"detail": "low"}) == []
    for options, said in (
        ({"num_image_tokens": 18}, "the connector cannot give 18 visual tokens; it can give 2 to 17"),
        ({"num_image_tokens": [2, 3]}, "2 values for 1 images"),
        ({"do_resize": False}, "'do_resize' is not an option of a request"),
        ({"images_kwargs": {"size": 1}}, "'images_kwargs' is not an option of a request"),
        ("low", "mm_processor_kwargs is an object"),
        ({"num_image_tokens": {}}, "whole number"),
    ):
        refused = refusal(body(IMAGE, mm_processor_kwargs=options))
        assert said in refused.message
        assert (refused.status, refused.param) == (400, "mm_processor_kwargs")
    assert "cannot give 18" in refusal(body(mm_processor_kwargs={"num_image_tokens": 18})).message
    low = {"type": "image_url", "image_url": {**IMAGE["image_url"], "detail": "low"}}
    assert "not both" in refusal(body(low, mm_processor_kwargs={"num_image_tokens": 9})).message
    bad = {"type": "image_url", "image_url": {**IMAGE["image_url"], "detail": "huge"}}
    assert "detail is one of low, auto, high" in refusal(body(bad)).message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"foo": 1}, "unknown or unsupported field 'foo'"),
        ({"n": 2}, "n is not supported"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"generation_config": "{}"}, "unknown or unsupported field 'generation_config'"),
        ({"chat_template_kwargs": {}}, "unknown or unsupported field"),
        ({"stream": 1}, "stream is true or false"),
        ({"max_tokens": 0}, "max_tokens is a whole number from 1 to 512"),
        ({"max_tokens": 513}, "from 1 to 512"),
        ({"max_completion_tokens": True}, "max_completion_tokens is a whole number"),
        ({"temperature": 3}, "temperature is a number from 0 to 2"),
        ({"temperature": "0"}, "temperature is a number"),
        ({"top_p": 0}, "top_p is a number above 0"),
        ({"seed": 2**63}, "seed is a whole number"),
        ({"stop": [""]}, "stop is one to four texts"),
        ({"messages": []}, "messages is a list"),
        ({"messages": "who"}, "messages is a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "a message has a role"),
        ({"messages": [{"role": "user", "content": 5}]}, "content is a text or a list"),
        ({"messages": [{"role": "user", "content": [5]}]}, "a part is a text or"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "a part is a text or"),
        ({"messages": [{"role": "system", "content": [IMAGE]}, {"role": "user", "content": "x"}]}, "a part is a text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "text is a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url has a url"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message must be the user's"),
    ],
)
def test_what_a_request_may_not_ask(fields, said):
    refused = refusal(body(**fields))
    assert (refused.status, said in refused.message) == (400, True), refused.message
    assert json.loads(refused.body())["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("data", [b"", b"{", b"\xff{}", b"[]", b"[" * 100_000, b'{"temperature": NaN}', b"5"])
def test_what_is_no_request(data):
    assert refusal(data).status == 400


def test_limits_of_a_request():
    limits = Limits(max_images=2, max_new_tokens=9)
    assert len(read(IMAGE, IMAGE, limits=limits).images) == 2
    assert "more than 2 images" in refusal(body(IMAGE, IMAGE, IMAGE), limits).message
    assert "from 1 to 9" in refusal(body(max_tokens=10), limits).message
    assert refusal(body(model="other")).status == 404


def test_files_and_urls_are_refused():
    for url in ("file:///etc/passwd", "/etc/passwd", "a.png", "", "ftp://h/a", "FILE:/a", "//h/a"):
        part = {"type": "image_url", "image_url": {"url": url}}
        assert "data:image/...;base64, URL" in refusal(body(part)).message
        assert refusal(body(part), Limits(allow_hosts=("h",))).param == "messages[0].content[0]"
    http = {"type": "image_url", "image_url": "http://h/a.png"}
    assert "this server fetches no images" in refusal(body(http)).message
    assert read(http, limits=Limits(allow_hosts=("h",))).images == ["http://h/a.png"]


def test_a_body_for_vllm():
    rewrite = VllmBody(Limits(), "<image>")
    request = read(IMAGE, max_tokens=3, temperature=0, mm_processor_kwargs={"num_image_tokens": 9})
    made = json.loads(rewrite(request))
    assert made["mm_processor_kwargs"] == {"num_image_tokens": 9}
    assert (made["max_tokens"], made["temperature"], made["stream"]) == (3, 0, False)
    assert made["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    with pytest.raises(ValueError, match="one budget for all images"):
        rewrite(read(IMAGE, IMAGE, mm_processor_kwargs={"num_image_tokens": [9, 3]}))
    spelt = parse(json.dumps({"messages": [{"role": "user", "content": "<image>"}]}).encode(), "m", Limits(), SIZES)
    with pytest.raises(RefusedError, match="text holds <image>"):
        rewrite(spelt)
    small = VllmBody(Limits(image=ImageLimits(max_pixels=100)), "<image>")
    with pytest.raises(RefusedError, match=r"image: .*over the limit of 100 pixels") as caught:
        small(read(IMAGE))
    assert caught.value.param == "messages[0].content[0]"
    assert json.loads(settings("folder", "name", "localhost", 9, Limits(allow_hosts=("h",))))["limits"][
        "allow_hosts"
    ] == ["h"]


@pytest.mark.parametrize("fusion", ["concat", "gated_cross_attention"])
def test_what_is_prepared_is_answered(fusion):
    """As by `ask`, at the model's own T and at half of it."""
    model = tiny.model(fusion=fusion)
    own = model.config.num_placeholders
    processor = tiny.processor(own, fusion=fusion, budgets=model.config.budgets)
    prepare = Preparation(model, processor, Limits())
    for budget in (None, 9):
        options = {} if budget is None else {"mm_processor_kwargs": {"num_image_tokens": budget}}
        request = parse(body(IMAGE, max_tokens=4, **options), "m", Limits(), processor.sizes)
        assert prepare(request) == b"{}"
        ids = model.generate(**request.inputs, max_new_tokens=4, do_sample=False)
        (said,) = decode(processor, ids[:, request.inputs["input_ids"].shape[1] :])
        image = serving_models.picture_bytes(0)
        assert said == converse_once(model, processor, image, "who?", num_visual_tokens=budget, max_new_tokens=4)
    long = parse(json.dumps({"messages": [{"role": "user", "content": "who? " * 2000}]}).encode(), "m", LIMITS, SIZES)
    with pytest.raises(RefusedError, match="does not fit into the model's context of 1024"):
        prepare(long)
    odd = parse(body(), "m", LIMITS, SIZES)
    processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RefusedError, match="the chat template refuses these messages: roles must alternate"):
        prepare(odd)


# Addresses


@pytest.fixture
def canary():
    """(port, list of the paths that were asked): an HTTP server on loopback that nobody may reach."""
    asked: list[str] = []

    class Canary(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            to = self.path.removeprefix("/to/")
            self.send_response(302 if to != self.path else 200)
            if to != self.path:
                self.send_header("Location", to)
            self.end_headers()
            self.wfile.write(serving_models.picture_bytes(0))

        def log_message(self, *args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Canary) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_port, asked
        server.shutdown()
        thread.join()


def test_forbidden_urls_never_reach_this_machine(canary):
    """Sixty spellings, each with its host named as one that is allowed."""
    port, asked = canary
    assert len(FORBIDDEN) >= 60
    for form in FORBIDDEN:
        url = form.format(port=port)
        host = url.split("//", 1)[-1].split("/")[0].rpartition("@")[2].lower()
        with pytest.raises(ImageError):
            remote.fetch(url, {host, host.rpartition(":")[0], host.strip("[]"), "localhost", "127.0.0.1"}, 10**6)
    assert asked == []


@pytest.fixture
def public(canary, monkeypatch):
    """The hosts `one.test` and `two.test`, which seem public and are the canary; the others are who they are."""
    port, asked = canary
    fake = {"one.test": "93.184.215.14", "two.test": "1.1.1.1", "inside.test": "10.0.0.7"}
    resolve, connect = socket.getaddrinfo, socket.create_connection

    def getaddrinfo(host, *args, **kwargs):
        return resolve(fake[host], *args, **kwargs) if host in fake else resolve(host, *args, **kwargs)

    def create_connection(address, *args, **kwargs):
        assert address[0] in fake.values(), address
        return connect(("127.0.0.1", port), *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    return asked


def test_a_named_host_is_asked(public):
    assert remote.fetch("http://one.test/a.png", ["ONE.test"], 10**6) == serving_models.picture_bytes(0)
    assert remote.fetch("http://one.test:8080/a.png?x=1", ["one.test:8080"], 10**6)
    assert len(remote.fetch("http://one.test/a.png", ["one.test"], 10)) == 11
    assert public == ["/a.png", "/a.png?x=1", "/a.png"]
    for url in ("http://two.test/a", "http://one.test:8080/a", "http://one.test.evil/a", "http://xone.test/a"):
        with pytest.raises(ImageError, match="--allow-hosts does not name it"):
            remote.fetch(url, ["one.test"], 10**6)
    assert len(public) == 3


def test_redirects_are_judged_anew(public, canary):
    port, _ = canary
    assert remote.fetch("http://one.test/to/http://two.test/b", ["one.test", "two.test"], 10**6)
    assert public == ["/to/http://two.test/b", "/b"]
    assert remote.fetch("http://one.test/to//c", ["one.test"], 10**6)
    public.clear()
    inside = [f"http://127.0.0.1:{port}/x", f"http://localhost:{port}/x", "http://two.test/x", "file:///etc/passwd"]
    inside += ["http://inside.test/x", "ftp://one.test/x", "http://[::1]/x", "//169.254.169.254/latest"]
    for target in inside:
        with pytest.raises(ImageError):
            remote.fetch(f"http://one.test/to/{target}", ["one.test", "inside.test", "localhost"], 10**6)
    assert public == [f"/to/{target}" for target in inside]
    with pytest.raises(ImageError, match="more than 3 redirects"):
        remote.fetch("http://one.test/to//to//to//to//to//x", ["one.test"], 10**6)


def test_a_name_that_is_public_and_private_is_private(monkeypatch):
    both = [(2, 1, 6, "", ("1.1.1.1", 80)), (2, 1, 6, "", ("192.168.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: both)
    with pytest.raises(ImageError, match="not at an address of the public network"):
        remote.public_address("x.test", 80)


def test_public_addresses():
    for address in ("1.1.1.1", "93.184.215.14", "2606:4700::1111"):
        assert remote.is_public(address), address
    for address in (
        *("127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
        *("0.0.0.0", "255.255.255.255", "224.0.0.1", "198.18.0.1", "192.0.0.1", "240.0.0.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::127.0.0.1"),
        *("64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "64:ff9b:1::1", "x", ""),
    ):
        assert not remote.is_public(address), address


def test_names():
    assert all(map(is_local, ("127.0.0.1", "::1", "localhost")))
    assert not any(map(is_local, ("0.0.0.0", "example.org", "192.168.0.1")))


def test_the_name_tells_no_path(tmp_path):
    (tmp_path / "run/finetune/model").mkdir(parents=True)
    assert served_name(str(tmp_path / "run")) == served_name(str(tmp_path / "run/finetune/model")) == "run"
    assert served_name("someone/model") == "someone/model"


# The gate


class Client:
    """One request to a gate: what it answered. `hang_up` after so many seconds."""

    def __init__(self, gate, path=CHAT, data=b"", method="POST", headers=(), chunks=None, hang_up=None, slow=0.0):
        self.gate, self.status, self.body, self.headers = gate, None, b"", {}
        names = [(name.lower().encode(), value.encode("latin-1")) for name, value in dict(headers).items()]
        self.scope = {"type": "http", "path": path, "method": method, "headers": names, "query_string": b""}
        self.chunks, self.hang_up, self.slow = [data] if chunks is None else list(chunks), hang_up, slow

    async def receive(self):
        if self.chunks:
            await asyncio.sleep(self.slow)
            return {"type": "http.request", "body": self.chunks.pop(0), "more_body": bool(self.chunks)}
        await asyncio.sleep(999 if self.hang_up is None else self.hang_up)
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.start":
            assert self.status is None
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.body += message["body"]

    async def __call__(self):
        await self.gate(self.scope, self.receive, self.send)
        return self

    @property
    def error(self) -> dict:
        return json.loads(self.body)["error"]


async def echo(scope, receive, send):
    """An engine that says what it was given, unless a question makes it do otherwise."""
    if scope["path"] == CHAT:
        question = PLACE.get().request.messages[-1]["content"][-1]["text"]
        given = (await receive())["body"]
        assert dict(scope["headers"])[b"content-length"] == str(len(given)).encode()
        if question == "wait":
            assert (await receive()) == {"type": "http.disconnect"}
            assert PLACE.get().gone.is_set()
        if question == "break":
            raise RuntimeError("/secret/path")
        status = 500 if question == "fail" else 200
    else:
        given, status = b"ok", 200
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": given})


def gate(**kwargs) -> Gate:
    return Gate(echo, Service("model", SIZES, lambda request: request.model.encode(), **kwargs))


def ask(question: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": question}]}).encode()


def run(*clients):
    async def all_of_them():
        return await asyncio.wait_for(asyncio.gather(*(client() for client in clients)), 20)

    return asyncio.run(all_of_them())


def test_the_gate_lets_through():
    service = gate()
    chat, models, health = run(
        Client(service, data=ask("who?")),
        Client(service, "/v1/models", method="GET"),
        Client(service, "/health", method="GET"),
    )
    assert (chat.status, chat.body) == (200, b"model")
    assert [one["id"] for one in json.loads(models.body)["data"]] == ["model"]
    assert (health.status, health.body) == (200, b"ok")
    assert service.waiting == 0


def test_no_one_enters_without_the_key():
    service = gate(key="secret")
    paths = (CHAT, "/v1/models", "/health", "/reset", "/docs", "/openapi.json", "/")
    for path, method in itertools.product(paths, ("GET", "POST", "OPTIONS", "DELETE")):
        for given in (None, "Bearer wrong", "secret", "Basic secret", "Bearer ", "Bearer secre\u00e9"):
            headers = {} if given is None else {"authorization": given}
            (client,) = run(Client(service, path, ask("who?"), method, headers))
            assert client.status == (200 if (path, method) == ("/health", "GET") else 401), (path, method)
    (client,) = run(Client(service, data=ask("who?"), headers={"Authorization": "bearer secret"}))
    assert client.status == 200


def test_other_routes_methods_and_pages():
    service = gate()
    for path in ("/reset", "/load_model", "/v1/completions", "/v1/responses", "/docs", "/v1/models/", "/v1//models"):
        assert run(Client(service, path))[0].status == 404
    assert run(Client(service, CHAT, method="GET"))[0].status == 405
    page = {"origin": "http://evil.example", "host": "127.0.0.1:8000"}
    assert run(Client(service, data=ask("who?"), headers=page))[0].status == 403
    own = {"origin": "http://127.0.0.1:8000", "host": "127.0.0.1:8000"}
    assert run(Client(service, data=ask("who?"), headers=own))[0].status == 200


def test_a_foreign_name_that_leads_here():
    """DNS rebinding: a page of evil.example, whose name was pointed at this machine; a key makes it harmless."""
    for host, status in (("evil.example:8000", 403), ("localhost:8000", 200), ("[::1]:8000", 200), ("[", 403)):
        (client,) = run(Client(gate(), data=ask("who?"), headers={"host": host}))
        assert client.status == status, host
    headers = {"host": "evil.example", "authorization": "Bearer secret"}
    assert run(Client(gate(key="secret"), data=ask("who?"), headers=headers))[0].status == 200
    assert run(Client(gate(host="my.example"), data=ask("who?"), headers={"host": "my.example"}))[0].status == 200


def test_the_body_has_a_limit_and_a_time():
    limits = Limits(max_body=200, read_seconds=0.2)
    service = gate(limits=limits)
    assert run(Client(service, data=ask("x" * 200)))[0].status == 413
    assert run(Client(service, data=b"", headers={"content-length": "201"}))[0].status == 413
    assert run(Client(service, data=b"", headers={"content-length": "-1"}))[0].status == 413
    assert run(Client(service, chunks=[b"x" * 90] * 3))[0].status == 413
    assert run(Client(service, chunks=[ask("x"), b""], slow=0.3))[0].status == 408
    assert run(Client(service, chunks=[b"{", b'"messages": []}']))[0].status == 400
    assert service.waiting == 0


def test_the_queue_has_an_end_and_the_gone_leave_it():
    service = gate(limits=Limits(max_queue=3))
    begin = time.monotonic()
    clients = run(*(Client(service, data=ask("wait"), hang_up=0.3) for _ in range(8)))
    assert sorted(str(client.status) for client in clients) == ["200"] * 3 + ["429"] * 5
    assert clients[-1].error["code"] == "queue_full"
    assert time.monotonic() - begin < 5
    assert service.waiting == 0
    left_early = Client(service, chunks=[])
    left_early.hang_up = 0
    assert run(left_early)[0].status is None
    assert service.waiting == 0


@pytest.mark.parametrize("question", ["break", "fail"])
def test_what_breaks_says_no_more_than_that(question, caplog):
    (client,) = run(Client(gate(), data=ask(question)))
    assert client.status == 500
    assert client.error == {
        "message": "the server failed at this request; its log says more",
        "type": "server_error",
        "param": None,
        "code": None,
    }


def test_errors_have_openais_form():
    (client,) = run(Client(gate(), data=b"{"))
    assert client.status == 400
    assert set(client.error) == {"message", "type", "param", "code"}
    assert client.headers[b"content-type"] == b"application/json"


def test_a_websocket_is_closed():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(gate()({"type": "websocket", "path": CHAT}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_clients_image_is_the_files(tmp_path):
    """A data: URL goes through `load_image` in the processor, too."""
    url = serving_models.data_url(1)
    inputs = tiny.processor()(url, "<image> who?", return_tensors="pt")
    (tmp_path / "a.png").write_bytes(serving_models.picture_bytes(1))
    by_file = tiny.processor()(tmp_path / "a.png", "<image> who?", return_tensors="pt")
    assert inputs["pixel_values"].equal(by_file["pixel_values"])


# The command


def test_without_the_packages(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "pip install 'acformer[serve]'" in capsys.readouterr().err
    model = tiny.model()
    model.save_pretrained(tmp_path)
    tiny.processor(budgets=model.config.budgets).save_pretrained(tmp_path)
    monkeypatch.setattr("acformer.serving.vllm_server.find_spec", lambda name: None)
    assert cli.main(["serve", str(tmp_path), "--engine", "vllm"]) == 2
    assert "needs vLLM, in an environment of its own" in capsys.readouterr().err
    assert cli.main(["serve", str(tmp_path / "none"), "--engine", "vllm"]) == 4
    assert cli.main(["serve", str(tmp_path), "--engine", "vllm", "--tokens", "18"]) == 2
    assert "cannot give 18 visual tokens; it can give 2 to 17" in capsys.readouterr().err


def test_others_are_let_in_with_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for key, warns in (("", True), ("secret", False)):
        monkeypatch.setenv("ACFORMER_API_KEY", key)
        cli.main(["serve", str(tmp_path), "--host", "0.0.0.0"])
        assert ("set ACFORMER_API_KEY" in capsys.readouterr().err) is warns


@pytest.mark.parametrize("part", ["adapter", "connector"])
def test_vllm_is_not_given_a_part_of_a_model(part, tmp_path, capsys):
    if part == "adapter":
        (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "me/model"}')
        (tmp_path / "adapter_model.safetensors").touch()
    else:
        tiny.model().config.save_pretrained(tmp_path)
        (tmp_path / "parts.json").write_text('{"vision": "me/encoder", "text": "me/text"}')
    assert cli.main(["serve", str(tmp_path), "--engine", "vllm"]) == 2
    assert f"vLLM reads whole ones: acformer merge {tmp_path} --out FOLDER" in capsys.readouterr().err


def test_the_command_line_of_vllm(monkeypatch):
    monkeypatch.setattr("acformer.serving.vllm_server.find_spec", lambda name: True)
    words = command("folder", "name", "127.0.0.1", 8000, 9, Limits(max_images=3), "--max-model-len 1024")
    assert words[1:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert words[-2:] == ["--max-model-len", "1024"]
    for option, value in (
        ("--limit-mm-per-prompt", '{"image": 3}'),
        ("--mm-processor-kwargs", '{"num_image_tokens": 9}'),
        ("--served-model-name", "name"),
        ("--middleware", "acformer.serving.vllm_server.VllmGate"),
    ):
        assert words[words.index(option) + 1] == value
    assert importlib.import_module("acformer.serving.vllm_server").VllmGate
