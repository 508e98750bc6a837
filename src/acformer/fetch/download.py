"""One wheel from a Python package index, and one folder in a cache: each whole or not at all.

The file is found through the simple index (PEP 691 JSON, else PEP 503 HTML), written to `<file>.part`,
resumed with a Range request after a cut, checked against a pinned sha256 and only then renamed. Unlike
`pip download` it resumes, needs no pip and runs nothing. Proxies and `SSL_CERT_FILE` are honoured. A server is not
trusted with more than the bytes that are expected of it.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from configparser import Error as ConfigError
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit
from urllib.request import (
    HTTPBasicAuthHandler,
    HTTPPasswordMgrWithPriorAuth,
    OpenerDirector,
    Request,
    build_opener,
)

from tqdm import tqdm

from acformer.errors import DataError, UsageError
from acformer.files import file_sha256

PYPI = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
TIMEOUT = 20.0  # seconds without a byte
BACKOFF = 0.5  # seconds before the second attempt; doubles
INDEX_ATTEMPTS, FILE_ATTEMPTS = 2, 6
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
CHUNK = 1 << 16
MAX_PAGE = 16 * 2**20  # bytes of an index page; a project with a thousand files has half a megabyte
MAX_PAGE_SECONDS = 120.0
MAX_FILE = 2**30

T = TypeVar("T")


class _Dropped(Exception):
    """The network failed in a way that another attempt may mend."""


def download_wheel(
    project: str,
    filename: str,
    sha256: str,
    folder: Path,
    *,
    index_url: str | None = None,
    max_bytes: int = MAX_FILE,
    progress: bool = True,
) -> Path:
    """`folder/filename`, downloaded unless it is there already with that `sha256`.

    Errors: `DataError` when the index cannot be reached, has no such file, or serves another one or one of more than
    `max_bytes`, of which no more is written.
    """
    target, part = folder / filename, folder / f"{filename}.part"
    if target.is_file() and file_sha256(target) == sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    index, opener = _open_index(index_url or configured_index())
    url = _find_file(opener, index, project, filename)
    while True:
        resumed = part.exists()
        _retry(lambda: _transfer(opener, url, part, max_bytes, progress), FILE_ATTEMPTS, _cut_message(url, part))
        if (got := file_sha256(part)) == sha256:
            part.replace(target)
            return target
        part.unlink()
        if not resumed:  # else the part of an earlier run was bad: once more from the start
            raise DataError(f"{url}: damaged or not the file: sha256 {got}, expected {sha256}; deleted it")


def configured_index() -> str:
    """The index that pip would use: `PIP_INDEX_URL`, else pip's configuration files, else PyPI."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    config_home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    files = [Path("/etc/pip.conf"), Path("~/.pip/pip.conf").expanduser(), config_home / "pip/pip.conf"]
    files += [Path(sys.prefix) / "pip.conf", Path(os.environ.get("PIP_CONFIG_FILE") or os.devnull)]
    config = ConfigParser(interpolation=None)
    try:
        config.read(files, encoding="utf-8")  # the later file wins
    except (ConfigError, UnicodeDecodeError):
        return PYPI
    return config.get("global", "index-url", fallback=PYPI)


def _open_index(url: str) -> tuple[str, OpenerDirector]:
    """The index address without a login in it, and an opener that sends the login to that host only."""
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"the package index is not an http(s) URL such as {PYPI}: see PIP_INDEX_URL")
    host = parts.netloc.rpartition("@")[2]
    logins = HTTPPasswordMgrWithPriorAuth()
    if parts.username is not None:
        login = unquote(parts.username), unquote(parts.password or "")
        logins.add_password(None, f"{parts.scheme}://{host}/", *login, is_authenticated=True)
    plain = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
    return plain, build_opener(HTTPBasicAuthHandler(logins))


def _find_file(opener: OpenerDirector, index: str, project: str, filename: str) -> str:
    """The address of exactly `filename` on the project's page of the index."""
    page = f"{index}/{project}/"
    todo = "set PIP_INDEX_URL (or the proxy and SSL_CERT_FILE), or run where it is reachable"
    try:
        base, kind, body = _retry(
            lambda: _get(opener, page),
            INDEX_ATTEMPTS,
            lambda: f"cannot reach the package index {index}; {todo}",
        )
    except HTTPError as error:
        raise DataError(f"{page}: HTTP {error.code} {error.reason}; set PIP_INDEX_URL to another index") from error
    try:
        links = _json_links(body) if "json" in kind else _html_links(body)
        urls = [urldefrag(urljoin(base, href)).url for name, href in links if name == filename]
        schemes = {urlsplit(url).scheme for url in urls}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{page}: not a page of a package index; see PIP_INDEX_URL") from error
    if urls and schemes <= {"http", "https"}:
        return urls[0]
    raise DataError(f"{page}: no file {filename} there; set PIP_INDEX_URL to an index such as {PYPI}")


def _get(opener: OpenerDirector, url: str) -> tuple[str, str, str]:
    """Final address, content type and text of a page."""
    body, started = bytearray(), time.monotonic()
    with _open(opener, url, {"Accept": ACCEPT}) as response:
        for chunk in _read(response):
            body += chunk
            if len(body) > MAX_PAGE or time.monotonic() - started > MAX_PAGE_SECONDS:
                raise DataError(
                    f"{url}: an index page of more than {MAX_PAGE:,} bytes or {MAX_PAGE_SECONDS:.0f} seconds; "
                    "set PIP_INDEX_URL to another index"
                )
        return response.geturl(), response.headers.get_content_type(), body.decode(errors="replace")


def _json_links(body: str) -> list[tuple[str, str]]:
    return [(file["filename"], file["url"]) for file in json.loads(body)["files"]]


def _html_links(body: str) -> list[tuple[str, str]]:
    links = []

    class Anchors(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "a" and (href := dict(attrs).get("href")):
                links.append((unquote(urlsplit(href).path.rpartition("/")[2]), href))

    Anchors().feed(body)
    return links


def _transfer(opener: OpenerDirector, url: str, part: Path, max_bytes: int, progress: bool) -> None:
    """Bring `part` to its full length, from where it stands."""
    start = part.stat().st_size if part.exists() else 0
    if start > max_bytes:
        part.unlink()
        start = 0
    try:
        response = _open(opener, url, {"Range": f"bytes={start}-"} if start else {})
    except HTTPError as error:
        if error.code == 416:  # nothing lies beyond `start`: whole already, or not ours; the sha256 decides
            return
        raise DataError(f"{url}: HTTP {error.code} {error.reason}") from error
    with response:
        if response.status != 206:
            start = 0  # the server does not do ranges
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink(missing_ok=True)
            raise _Dropped("the server sent another range than asked for")
        total = None if response.length is None else start + response.length
        if total is not None and total > max_bytes:
            raise _too_large(url, max_bytes, part)
        done = _append(part, start, total, _read(response), max_bytes, progress)
    if done > max_bytes:
        raise _too_large(url, max_bytes, part)
    if total is not None and done != total:
        raise _Dropped(f"got {done} of {total} bytes")


def _too_large(url: str, max_bytes: int, part: Path) -> DataError:
    part.unlink(missing_ok=True)
    return DataError(f"{url}: not the file: larger than the {max_bytes:,} bytes expected; set PIP_INDEX_URL to another")


def _append(part: Path, start: int, total: int | None, chunks: Iterator[bytes], max_bytes: int, progress: bool) -> int:
    """Write at most a chunk more than `max_bytes`; returns the length of the file."""
    quiet = None if progress else True  # None: only on a terminal
    bar = tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, disable=quiet)
    with bar, part.open("ab" if start else "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > max_bytes:
                break
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _open(opener: OpenerDirector, url: str, headers: dict[str, str]) -> Any:
    try:
        return opener.open(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code not in TRANSIENT:
            raise
        raise _Dropped(f"HTTP {error.code} {error.reason}") from error
    except UnicodeError as error:
        raise DataError(f"not an address: {url!a}") from error
    except (OSError, HTTPException) as error:
        raise _Dropped(str(getattr(error, "reason", error)) or type(error).__name__) from error


def _read(response: Any) -> Iterator[bytes]:
    """The body in chunks; only here does an `OSError` mean the network and not the disk."""
    try:
        while chunk := response.read1(CHUNK):  # what has come, where `read` would wait for all of it
            yield chunk
    except (OSError, HTTPException) as error:
        raise _Dropped(str(error) or type(error).__name__) from error


def _cut_message(url: str, part: Path) -> Callable[[], str]:
    def message() -> str:
        kept = part.stat().st_size if part.exists() else 0
        return f"{url}: the download broke off; {kept:,} bytes are kept, run the same command to go on"

    return message


def _retry(action: Callable[[], T], attempts: int, message: Callable[[], str]) -> T:
    """`action()`, again with growing pauses while the network drops it; then `DataError` with `message()`."""
    for attempt in range(attempts):
        try:
            return action()
        except _Dropped as error:
            dropped = error
        if attempt + 1 < attempts:
            time.sleep(BACKOFF * 2**attempt)
    raise DataError(f"{message()} ({dropped})") from dropped
