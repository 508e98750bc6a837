"""Which requests the page answers: those of its own pages, by an address of this machine; and who waits for an answer.

Without it any web site that a visitor has open could send images and questions to the page: a browser lets a foreign
page send what it may not read, and a name that is pointed at 127.0.0.1 (DNS rebinding) makes the page its own.
"""

import socket
import time
from collections import Counter
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs, urlsplit

ARRIVED = "acformer.arrived"
ANSWERS = "/queue/data"
"""The stream on which a client gets its answers, with `session_hash` in its query."""
PATIENCE = 3.0
"""Seconds after its request in which a client must open that stream."""


class RequestFilter:
    """ASGI middleware around gradio's app.

    host: the address that the page serves. listening: the sessions that wait for answers now, counted here.
    """

    def __init__(self, app: Any, host: str, listening: "Counter[str]"):
        self.app, self.listening = app, listening
        name = socket.gethostname()
        self.names = {"localhost", host.lower(), name.lower(), f"{name}.local".lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve or refuse (403) one request."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        if reason := self.refusal(headers.get("host", ""), headers.get("origin")):
            await _refuse(scope, send, reason)
            return
        scope[ARRIVED] = time.monotonic()
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        waits = scope["path"].endswith(ANSWERS)
        self.listening[session] += waits
        try:
            await self.app(scope, receive, send)
        finally:
            self.listening[session] -= waits
            self.listening += Counter()  # forgets those at 0

    def refusal(self, host: str, origin: str | None) -> str:
        """Why a request with these headers is refused; empty where it is not."""
        try:
            name, page = urlsplit(f"//{host}").hostname or "", urlsplit(origin or "").netloc
        except ValueError:  # brackets that are no address
            name, page = "", ""
        if "@" in host or not self._is_here(name):
            return f"this page is not served as {host!r}: open it by an IP address of the machine, or as localhost"
        if origin is not None and page != host:
            return f"requests from pages of {origin!r} are refused"
        return ""

    def _is_here(self, name: str) -> bool:
        try:
            ip_address(name)
        except ValueError:
            return name in self.names
        return True  # a number needs no name server that could lie


def is_waiting(session: str, arrived: float, listening: "Counter[str]") -> bool:
    """Whether a client waits for the answer to a request of that time; until `PATIENCE` is over it may still begin."""
    while not listening[session] and time.monotonic() < arrived + PATIENCE:
        time.sleep(0.05)
    return listening[session] > 0


async def _refuse(scope: Any, send: Any, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})
