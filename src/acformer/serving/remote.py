"""Images by http, of hosts that were named, at addresses of the public network: nothing else is ever asked.

The name is resolved once, all its addresses are judged, and the connection goes to the address that was judged; a
redirect is a new URL and is judged anew. So neither a number in another spelling, nor a name that points inside, nor
one that changes between the look and the call (DNS rebinding) reaches this machine or its network. No proxy is used.
"""

import http.client
import re
import socket
import ssl
import time
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import SplitResult, urljoin, urlsplit

from acformer.errors import ImageError

PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 3
SECONDS = 15.0
"""For all of it; a single step has a third."""
NAT64 = ip_network("64:ff9b::/96")


def fetch(url: str, allow_hosts: Collection[str], max_bytes: int) -> bytes:
    """The body of an image's URL, at most `max_bytes + 1` bytes of it.

    Args:
        url: http or https.
        allow_hosts: names, each with the port that its scheme has, or `name:port`.
        max_bytes: what the caller takes.

    Raises:
        ImageError: another host, an address that is not public, no answer in time, another status than 200.
    """
    deadline = time.monotonic() + SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        parts, host, port = _judged(url, allow_hosts)
        address = public_address(host, port)
        try:
            status, location, body = _get(parts, host, port, address, max_bytes, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ImageError(f"{host} did not answer") from error
        if status == 200:
            return body
        if status not in REDIRECTS or not location:
            raise ImageError(f"{host} answered with status {status}")
        url = urljoin(url, location)
    raise ImageError(f"more than {MAX_REDIRECTS} redirects")


def public_address(host: str, port: int) -> str:
    """An address of a host, all of whose addresses are of the public network; `ImageError` otherwise."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ImageError(f"there is no host {host}") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise ImageError(f"{host} is not at an address of the public network")
    return addresses[0]


def is_public(text: str) -> bool:
    """Whether an address belongs to the public network, also the IPv4 one that an IPv6 address stands for."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return False
    inner: list[IPv4Address | IPv6Address] = [address]
    if isinstance(address, IPv6Address):
        if address.is_site_local:
            return False
        inner += [one for one in (address.ipv4_mapped, address.sixtofour, *(address.teredo or ())) if one is not None]
        if address in NAT64 or int(address) < 2**32:
            inner.append(IPv4Address(int(address) & 0xFFFFFFFF))
    return all(one.is_global and not one.is_multicast and not one.is_reserved for one in inner)


def _judged(url: str, allow_hosts: Collection[str]) -> tuple[SplitResult, str, int]:
    """The URL's parts, host and port; `ImageError` unless they were named."""
    if re.search(r"[^!-~]|\\", url):
        raise ImageError("not a URL: characters that a URL has no place for")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:
        raise ImageError("not a URL") from error
    if parts.scheme not in PORTS or not re.fullmatch(r"[a-z0-9.:-]+", host) or "@" in parts.netloc:
        raise ImageError("not an http URL")
    named = {one.lower() for one in allow_hosts}
    usual = PORTS[parts.scheme]
    if f"{host}:{port or usual}" not in named and not (host in named and port in (None, usual)):
        raise ImageError("images are not fetched from that host: --allow-hosts does not name it")
    return parts, host, port or usual


def _get(
    parts: SplitResult, host: str, port: int, address: str, max_bytes: int, deadline: float
) -> tuple[int, str | None, bytes]:
    """(status, where a redirect leads, body) of one request to that address."""
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS / 3)
    raw = socket.create_connection((address, port), timeout=SECONDS / 3)
    try:
        secure = parts.scheme == "https"
        connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if secure else raw
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        answer = connection.getresponse()
        body = bytearray()
        while answer.status == 200 and len(body) <= max_bytes:
            if time.monotonic() > deadline:
                raise TimeoutError
            part = answer.read1(min(65536, max_bytes + 1 - len(body)))
            if not part:
                break
            body += part
        return answer.status, answer.getheader("Location"), bytes(body)
    finally:
        connection.close()
        raw.close()
