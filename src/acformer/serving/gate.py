"""The gate before an engine's server: who may enter, how many, with what; ASGI middleware, the same for both engines.

It answers for everything but the chat itself: key, routes, sizes, the queue, errors in OpenAI's form. It reads the body
and hands the engine a checked one; it watches the client while the engine works, and a client that hangs up frees its
place at once.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from acformer.errors import AcFormerError, one_line
from acformer.hf.budgets import Budgets
from acformer.serving.request import ChatRequest, Limits, RefusedError, parse

logger = logging.getLogger("acformer")
CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"
ROUTES = {CHAT: "POST", MODELS: "GET", HEALTH: "GET"}
GONE = 499
"""Status of a request whose client has hung up; nobody reads it."""
FAILED = "the server failed at this request; its log says more"
Send = Callable[[dict], Awaitable[None]]
Receive = Callable[[], Awaitable[dict]]


@dataclass
class Service:
    """What the gate needs to know of the model behind it.

    name: under which it is served. sizes, default_budget: what an image may cost. key: without it, no one enters but
    for `/health`. host: the name or address that is served. rewrite: makes a checked request the body that the engine
    gets; it runs in a thread.
    """

    name: str
    sizes: Budgets
    rewrite: Callable[[ChatRequest], bytes]
    limits: Limits = field(default_factory=Limits)
    default_budget: int | None = None
    key: str | None = None
    host: str = "localhost"


@dataclass
class Place:
    """One chat on its way: what was asked, and whether anyone still waits for the answer."""

    request: ChatRequest
    gone: threading.Event = field(default_factory=threading.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)


PLACE: ContextVar[Place] = ContextVar("acformer_place")
"""The chat in whose context an engine runs."""


class Gate:
    """ASGI middleware: `Gate(app, service)`. `waiting`: chats inside, from the first byte read to the last sent."""

    def __init__(self, app: Any, service: Service):
        self.app, self.service = app, service
        self.names = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower(), service.host.lower()}
        self.waiting = 0
        self.created = int(time.time())

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        """Serve or refuse one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        sent = _Sent(send)
        try:
            self._admit(scope)
            if scope["path"] == CHAT:
                await self._chat(scope, receive, sent)
            elif scope["path"] == MODELS:
                model = {"id": self.service.name, "object": "model", "created": self.created, "owned_by": "acformer"}
                await _answer(sent, 200, json.dumps({"object": "list", "data": [model]}).encode())
            else:
                await self.app(scope, receive, sent)
        except RefusedError as refused:
            await sent.refuse(refused)
        except AcFormerError as error:
            await sent.refuse(RefusedError(400, one_line(error)))
        except Exception:
            logger.exception("a request failed")
            await sent.refuse(RefusedError(500, FAILED))

    def _admit(self, scope: dict) -> None:
        """`RefusedError` for a request without the key, from a foreign web page, or to a route that is not served."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path, method = scope["path"], scope["method"]
        if self.service.key is not None and (path, method) != (HEALTH, "GET"):
            kind, _, given = headers.get(b"authorization", "").partition(" ")
            if kind.lower() != "bearer" or not _equal(given.strip(), self.service.key):
                raise RefusedError(401, "no valid API key: send Authorization: Bearer KEY", code="invalid_api_key")
        host, origin = headers.get(b"host"), headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise RefusedError(403, "requests from pages of other sites are refused")
        if self.service.key is None and host and not self._is_here(host):
            raise RefusedError(403, "this server does not go by that name: ask it by its address, or set a key")
        if path not in ROUTES:
            raise RefusedError(404, f"there is no such route; those served are {', '.join(ROUTES)}")
        if method != ROUTES[path]:
            raise RefusedError(405, f"{path} takes {ROUTES[path]}")

    def _is_here(self, host: str) -> bool:
        """Whether a Host header is an address, or a name of this machine: a page whose name leads here has another."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self.names or bool(ip_address(name))
        except ValueError:
            return False

    async def _chat(self, scope: dict, receive: Receive, send: "_Sent") -> None:
        limits = self.service.limits
        if self.waiting >= limits.max_queue:
            raise RefusedError(429, f"{limits.max_queue} requests are waiting: try again later", code="queue_full")
        self.waiting += 1
        try:
            body = await _read(scope, receive, limits)
            if body is None:
                return
            parts = self.service.name, limits, self.service.sizes, self.service.default_budget
            place = Place(await asyncio.to_thread(parse, body, *parts))
            del body
            watch = asyncio.create_task(_watch(receive, place))
            entered = PLACE.set(place)
            try:
                ready = await asyncio.to_thread(self.service.rewrite, place.request)
                if not place.gone.is_set():
                    await self.app(_with_length(scope, len(ready)), _replay(ready, place), send)
            finally:
                PLACE.reset(entered)
                watch.cancel()
        finally:
            self.waiting -= 1


class _Sent:
    """`send`, which knows whether an answer has begun, and hides what a server error says."""

    def __init__(self, send: Send):
        self.send, self.started, self.failed = send, False, False

    async def __call__(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            self.failed = message["status"] >= 500 and message["status"] != 503
            if self.failed:
                await self.refuse(RefusedError(500, FAILED))
                return
            self.started = True
        elif self.failed:
            return
        await self.send(message)

    async def refuse(self, refused: RefusedError) -> None:
        """The error, unless an answer has begun: then the connection ends there."""
        if not self.started:
            self.started = True
            await _answer(self.send, refused.status, refused.body())


async def _answer(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"retry-after", b"1")] if status == 429 else []
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    headers += [(b"connection", b"close")] if status in (408, 413) else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _read(scope: dict, receive: Receive, limits: Limits) -> bytes | None:
    """The body; None where the client hung up before its end."""
    length = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"0")
    too_large = RefusedError(413, f"the body is over the limit of {limits.max_body:,} bytes", code="body_too_large")
    if not length.isdigit() or int(length) > limits.max_body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.read_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > limits.max_body:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError as error:
        raise RefusedError(408, f"the body did not arrive within {limits.read_seconds:g} seconds") from error


async def _watch(receive: Receive, place: Place) -> None:
    """Until the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    place.gone.set()
    place.left.set()


def _replay(body: bytes, place: Place) -> Receive:
    """The checked body, and then what becomes of the client."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict:
        if waiting:
            return waiting.pop()
        await place.left.wait()
        return {"type": "http.disconnect"}

    return receive


def _with_length(scope: dict, length: int) -> dict:
    own = (b"content-length", b"content-type", b"transfer-encoding", b"content-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in own]
    headers += [(b"content-length", str(length).encode()), (b"content-type", b"application/json")]
    return {**scope, "headers": headers}


def _equal(given: str, key: str) -> bool:
    """In a time that does not tell how much of it was right."""
    return hmac.compare_digest(hashlib.sha256(given.encode()).digest(), hashlib.sha256(key.encode()).digest())
