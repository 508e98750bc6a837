"""`download_wheel` against a package index on 127.0.0.1 that misbehaves in every way we know."""

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from acformer.errors import DataError, UsageError
from acformer.fetch import download
from acformer.fetch.download import configured_index, download_wheel
from acformer.files import whole_folder

NAME = "tiny_wheel-1.0-py3-none-any.whl"
BODY = bytes(range(256)) * 2000  # half a megabyte, several chunks
SHA = hashlib.sha256(BODY).hexdigest()
JSON = "application/vnd.pypi.simple.v1+json"


@dataclass
class FakeIndex:
    """What the server does, and what it was asked."""

    body: bytes = BODY
    kind: str = JSON
    page: str | None = None
    ranges: bool = True
    range_shift: int = 0
    length: bool = True
    endless: bool = False
    cuts: list[int] = field(default_factory=list)  # bytes of the body to send before hanging up, per request
    failures: list[int] = field(default_factory=list)  # HTTP codes to answer first
    login: str | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def simple_page(self) -> str:
        if self.page is not None:
            return self.page
        if self.kind == JSON:
            files = [
                {"filename": f"old-{NAME}", "url": "../../files/old"},
                {"filename": NAME, "url": f"../../files/{NAME}"},
            ]
            return json.dumps({"files": files})
        return f'<!DOCTYPE html><a name="x">no</a><a href="../../files/{NAME}#sha256={SHA}"\n>{NAME}</a>'

    def files_asked(self) -> list[str | None]:
        return [ranged for path, ranged in self.asked if path.startswith("/files/")]


class Handler(BaseHTTPRequestHandler):
    index: FakeIndex

    def do_GET(self) -> None:
        index = self.index
        index.asked.append((self.path, self.headers["Range"]))
        if index.login is not None and self.headers["Authorization"] != index.login:
            return self.answer(401, b"who are you", {})
        if self.path == "/simple/tiny-wheel/":
            return self.answer(200, index.simple_page().encode(), {"Content-Type": index.kind})
        if index.failures:
            return self.answer(index.failures.pop(0), b"", {})
        if self.path == f"/files/{NAME}":
            return self.file(index)
        return self.answer(404, b"nothing here", {})

    def file(self, index: FakeIndex) -> None:
        start = int((self.headers["Range"] or "bytes=0-")[6:-1]) if index.ranges else 0
        if start and start >= len(index.body):
            return self.answer(416, b"", {})
        shown = f"bytes {start + index.range_shift}-{len(index.body) - 1}/{len(index.body)}"
        self.answer(
            206 if start else 200,
            index.body[start:],
            {"Content-Range": shown} if start else {},
            cuts=index.cuts,
        )

    def answer(self, code: int, body: bytes, headers: dict[str, str], cuts: list[int] | None = None) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        if self.index.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.index.endless and cuts is not None:
            with suppress(OSError):  # until nobody reads
                while True:
                    self.wfile.write(body)
        self.wfile.write(body[: cuts.pop(0)] if cuts else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeIndex]:
    monkeypatch.setattr(download, "BACKOFF", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = FakeIndex()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"index": state}))
    state.url = f"http://127.0.0.1:{server.server_port}/simple"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def get(index: FakeIndex, folder: Path, sha256: str = SHA) -> Path:
    return download_wheel("tiny-wheel", NAME, sha256, folder, index_url=index.url, progress=False)


def assert_whole(path: Path) -> None:
    assert path.read_bytes() == BODY
    assert sorted(file.name for file in path.parent.iterdir()) == [NAME]


@pytest.mark.parametrize("kind", [JSON, "text/html", "application/vnd.pypi.simple.v1+html"])
@pytest.mark.parametrize("length", [True, False])
def test_downloads_through_either_kind_of_index(index, tmp_path, kind, length):
    index.kind, index.length = kind, length
    assert_whole(get(index, tmp_path / "new" / "folder"))
    assert index.files_asked() == [None]


def test_a_whole_file_is_not_downloaded_again(index, tmp_path):
    get(index, tmp_path)
    index.asked.clear()
    get(index, tmp_path)
    assert index.asked == []


def test_a_damaged_file_is_downloaded_again(index, tmp_path):
    (tmp_path / NAME).write_bytes(BODY[:-1])
    assert_whole(get(index, tmp_path))


def test_a_cut_connection_is_resumed_where_it_broke(index, tmp_path):
    index.cuts = [200_000, 100_000]
    assert_whole(get(index, tmp_path))
    assert index.files_asked() == [None, "bytes=200000-", "bytes=300000-"]


def test_the_part_of_an_earlier_run_is_resumed(index, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(BODY[:1234])
    assert_whole(get(index, tmp_path))
    assert index.files_asked() == ["bytes=1234-"]


def test_a_server_without_ranges_starts_over(index, tmp_path):
    index.ranges, index.cuts = False, [200_000]
    assert_whole(get(index, tmp_path))
    assert index.files_asked() == [None, "bytes=200000-"]


def test_a_server_that_sends_another_range_starts_over(index, tmp_path):
    index.range_shift, index.cuts = 1, [200_000]
    assert_whole(get(index, tmp_path))
    assert index.files_asked() == [None, "bytes=200000-", None]


@pytest.mark.parametrize("part", [BODY, BODY + b"more", b"x" * len(BODY), b"x" * 1000], ids=len)
def test_whatever_lies_in_the_part_the_file_is_right(index, tmp_path, part):
    (tmp_path / f"{NAME}.part").write_bytes(part)
    assert_whole(get(index, tmp_path))


def test_a_server_that_is_busy_is_asked_again(index, tmp_path):
    index.failures = [503, 429]
    assert_whole(get(index, tmp_path))


def test_gives_up_after_a_bounded_number_of_cuts_and_keeps_the_part(index, tmp_path):
    index.cuts = [1000] * 100
    with pytest.raises(DataError, match="broke off; 6,000 bytes are kept, run the same command"):
        get(index, tmp_path)
    assert len(index.files_asked()) == download.FILE_ATTEMPTS
    assert [file.name for file in tmp_path.iterdir()] == [f"{NAME}.part"]
    index.cuts = []
    assert_whole(get(index, tmp_path))


def test_another_file_than_pinned_is_deleted_and_both_sums_are_named(index, tmp_path):
    index.body = BODY[:-1] + b"!"
    with pytest.raises(DataError) as caught:
        get(index, tmp_path)
    assert index.url.replace("simple", "files") in str(caught.value)
    assert SHA in str(caught.value)
    assert hashlib.sha256(index.body).hexdigest() in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [JSON, "text/html"])
def test_an_index_without_the_file_says_so(index, tmp_path, kind):
    index.kind, index.page = kind, json.dumps({"files": []})
    with pytest.raises(DataError, match=f"no file {NAME} there; set PIP_INDEX_URL"):
        get(index, tmp_path)


NESTED = "[" * 200_000


@pytest.mark.parametrize(
    "page",
    ["<html>log in</html>", "[]", '{"files": 3}', '{"files": [{}]}', NESTED, f'{{"files": {NESTED}'],
    ids=lambda page: page[:20],
)
def test_something_else_than_an_index_says_so(index, tmp_path, page):
    index.page = page
    with pytest.raises(DataError, match="not a page of a package index"):
        get(index, tmp_path)


@pytest.mark.parametrize("url", [3, "http://[bad"])
def test_a_link_that_is_none_says_so(index, tmp_path, url):
    index.page = json.dumps({"files": [{"filename": NAME, "url": url}]})
    with pytest.raises(DataError, match="not a page of a package index"):
        get(index, tmp_path)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/a", "data:,x"])
def test_a_link_to_something_else_than_the_web_is_not_followed(index, tmp_path, url):
    index.page = json.dumps({"files": [{"filename": NAME, "url": url}]})
    with pytest.raises(DataError, match="no file"):
        get(index, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_with_letters_that_no_address_has(index, tmp_path):
    index.page = json.dumps({"files": [{"filename": NAME, "url": f"../../files/\ud800{NAME}"}]})
    with pytest.raises(DataError, match="not an address"):
        get(index, tmp_path)


@pytest.mark.parametrize("length", [True, False])
def test_a_larger_file_than_expected_is_refused_before_it_is_written(index, tmp_path, length):
    index.length = length
    with pytest.raises(DataError, match=r"larger than the 100,000 bytes expected") as caught:
        download_wheel("tiny-wheel", NAME, SHA, tmp_path, index_url=index.url, max_bytes=100_000, progress=False)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert len(index.files_asked()) == 1


def test_an_endless_file_is_refused(index, tmp_path):
    index.endless, index.length = True, False
    with pytest.raises(DataError, match="larger than the 1,000,000 bytes expected"):
        download_wheel("tiny-wheel", NAME, SHA, tmp_path, index_url=index.url, max_bytes=1_000_000, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_larger_part_than_expected_is_begun_anew(index, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(BODY + BODY)
    wanted = "tiny-wheel", NAME, SHA, tmp_path
    assert_whole(download_wheel(*wanted, index_url=index.url, max_bytes=len(BODY), progress=False))
    assert index.files_asked() == [None]


def test_an_index_page_is_read_up_to_a_limit(index, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_PAGE", 10_000)
    index.page = json.dumps({"files": [{"filename": "x" * 50_000, "url": "y"}]})
    with pytest.raises(DataError, match="an index page of more than 10,000 bytes"):
        get(index, tmp_path)
    index.page = index.page[:9_000]
    monkeypatch.setattr(download, "MAX_PAGE_SECONDS", 0.0)
    with pytest.raises(DataError, match="or 0 seconds"):
        get(index, tmp_path)


def test_an_index_without_the_project_and_a_refused_file_say_so(index, tmp_path):
    with pytest.raises(DataError, match=r"/simple/other/: HTTP 404 .*PIP_INDEX_URL"):
        download_wheel("other", NAME, SHA, tmp_path, index_url=index.url)
    index.failures = [403]
    with pytest.raises(DataError, match=f"files/{NAME}: HTTP 403 Forbidden"):
        get(index, tmp_path)


def test_an_unreachable_index_is_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "BACKOFF", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/simple"
    with pytest.raises(DataError, match=r"cannot reach the package index .*; set PIP_INDEX_URL") as caught:
        download_wheel("tiny-wheel", NAME, SHA, tmp_path, index_url=url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["nonsense", "ftp://u:secret@host/simple", "http://[bad", "http://"])
def test_an_index_that_is_no_url_is_a_usage_error_and_shows_no_password(tmp_path, url):
    with pytest.raises(UsageError, match="PIP_INDEX_URL") as caught:
        download_wheel("tiny-wheel", NAME, SHA, tmp_path, index_url=url)
    assert "secret" not in str(caught.value)


def test_a_login_in_the_index_url_is_sent_and_never_shown(index, tmp_path):
    index.login = "Basic bWU6c0BjcmV0"  # me:s@cret
    index.url = index.url.replace("//", "//me:s%40cret@")
    assert_whole(get(index, tmp_path / "a"))
    index.body = b"other"
    with pytest.raises(DataError) as caught:
        get(index, tmp_path / "b")
    assert "cret" not in str(caught.value)


def test_the_index_is_found_where_pip_finds_it(monkeypatch, tmp_path):
    for name in ("PIP_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    config = tmp_path / "pip.conf"
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    config.write_text("[global]\nindex-url = https://mirror.example/%20simple\n")
    assert configured_index() == "https://mirror.example/%20simple"
    config.write_text("not a config file\n")
    assert configured_index() == download.PYPI
    monkeypatch.setenv("PIP_INDEX_URL", "https://own.example/simple")
    assert configured_index() == "https://own.example/simple"


def test_a_folder_is_whole_or_absent_and_replaced_at_the_end(tmp_path):
    folder = tmp_path / "folder"
    (tmp_path / ".folder.partial").mkdir()  # left by a killed run
    (tmp_path / ".folder.partial" / "stale").touch()
    for text in ("old", "new"):
        with whole_folder(folder) as staging:
            (staging / text).write_text(text)
        assert [path.name for path in folder.iterdir()] == [text]
    with pytest.raises(FileNotFoundError), whole_folder(folder) as staging:
        (staging / "no" / "half").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]
