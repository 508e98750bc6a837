"""The page in a real browser: everything that a visitor does, with a mouse, a keyboard and a phone's width.

Needs gradio, playwright and Debian's chromium (`make test-extras`). Screenshots go to runs/screenshots.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import tiny
from PIL import Image

# gradio 6.31, in its own thread, asks things of pandas that pandas 3 calls deprecated, and leaves sockets unclosed when
# it looks for a port. What is ours is tested with warnings as errors in test_demo.py.
pytestmark = [
    pytest.mark.extras,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
WHY = "the page's tests need gradio and playwright: make test-extras"
pytest.importorskip("gradio", reason=WHY)
sync_api = pytest.importorskip("playwright.sync_api", reason=WHY)

import httpx  # noqa: E402 (comes with gradio)

from acformer.errors import UsageError  # noqa: E402
from acformer.lab.commands import demo  # noqa: E402
from acformer.lab.demo import app, request_filter  # noqa: E402
from acformer.lab.demo.app import Page  # noqa: E402
from acformer.lab.demo.demo_model import DemoModel  # noqa: E402
from acformer.lab.demo.page_setup import PageSetup  # noqa: E402
from acformer.lab.demo.session import Controller  # noqa: E402

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "runs/screenshots"
IMAGES = {"First": tiny.picture(1, (60, 40)), "Second": tiny.picture(2, (40, 60))}
QUESTIONS = ("red or green", "blue")
expect = sync_api.expect


def demo_model(connector):
    model = tiny.model(connector)
    return DemoModel(f"{connector} (tiny)", model, tiny.processor(model.config.num_placeholders))


def serve(setup):
    page = Page(setup)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    return page, url


@pytest.fixture(scope="module")
def url():
    """Two models: `acformer` (elastic, 5 tokens) beside `downsample` (always 4)."""
    page, url = serve(PageSetup(Controller([demo_model("acformer"), demo_model("downsample")]), IMAGES, QUESTIONS, 4))
    yield url
    page.blocks.close()


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("the page's tests need a browser: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, url):
    """(width, height, colour scheme, address) -> an open page; at the end: nothing came from elsewhere or broke."""
    contexts, elsewhere, broken = [], [], []

    def open_page(width=1280, height=900, scheme="light", address=url):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)

        def here(route):
            if urlsplit(route.request.url).hostname == "127.0.0.1":
                route.continue_()
            else:
                elsewhere.append(route.request.url)
                route.abort()

        page.route(lambda asked: not asked.startswith(("data:", "blob:")), here)
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#canvas svg")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert elsewhere == []
    assert broken == []


def anchors(page):
    """Patches that the drawing has as anchors."""
    heads = page.get_attribute("#canvas svg", "data-heads").split()
    return [patch for patch, head in enumerate(heads) if head != "0"]


def wait_for_anchors(page, count):
    expect(page.locator("#canvas .count")).to_contain_text(f"{count} anchors of 16 squares")
    assert len(anchors(page)) == count


def wait_for_pins(page, pins):
    expect(page.locator("#canvas svg")).to_have_attribute("data-pins", pins)


def states(**patches):
    """`data-pins` of a drawing: states(_3="p") has patch 3 pinned."""
    given = {int(patch[1:]): state for patch, state in patches.items()}
    return "".join(given.get(patch, "-") for patch in range(16))


def click_patch(page, patch):
    """The image is 60 x 40, in the middle of a square of 4 x 4 patches of 15 x 15."""
    row, column = divmod(patch, 4)
    box = page.locator("#canvas svg").bounding_box()
    scale = box["width"] / 60
    page.mouse.click(box["x"] + (15 * column + 7.5) * scale, box["y"] + (15 * row - 10 + 7.5) * scale)


def rows(page):
    """The cells of the table, row by row."""
    return [row.locator("td").all_inner_texts() for row in page.locator("#table tbody tr").all()]


def wait_for_rows(page, count):
    expect(page.locator("#table tbody tr")).to_have_count(count)
    return rows(page)


def test_it_opens_with_anchors_and_words(visit):
    page = visit()
    wait_for_anchors(page, 4)
    expect(page.locator("#introduction")).to_contain_text("anchors are the few squares")
    expect(page.locator("#legend")).to_contain_text("pinned")
    assert page.title() == "Visual anchors"
    assert page.locator("#table table").count() == 0


def test_another_image(visit, tmp_path):
    page = visit()
    page.get_by_role("button", name="Second").click()
    expect(page.locator("#canvas svg")).to_have_attribute("viewBox", "0 0 40 60")
    tiny.picture(3, (32, 48)).save(path := tmp_path / "mine.png")
    page.set_input_files("#images input[type=file]", path)
    expect(page.locator("#canvas svg")).to_have_attribute("viewBox", "0 0 32 48")
    tiny.picture(4, (16, 24)).save(tmp_path / "dropped.png")
    numbers = list((tmp_path / "dropped.png").read_bytes())
    page.evaluate(
        """numbers => {
            const given = new DataTransfer();
            given.items.add(new File([new Uint8Array(numbers)], "dropped.png", { type: "image/png" }));
            const drop = { dataTransfer: given, bubbles: true, cancelable: true };
            document.body.dispatchEvent(new DragEvent("drop", drop));
        }""",
        numbers,
    )
    expect(page.locator("#canvas svg")).to_have_attribute("viewBox", "0 0 16 24")


def test_the_slider_moves_the_anchors(visit):
    page = visit()
    before = anchors(page)
    page.locator("#anchors input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    wait_for_anchors(page, 5)
    page.keyboard.press("Home")
    wait_for_anchors(page, 1)
    assert set(anchors(page)) <= set(before)  # the first head chooses first
    expect(page.locator("#budget input[type=number]")).to_have_value("2")
    assert page.locator("#table table").count() == 0  # nothing was asked


def test_views(visit):
    page = visit()
    expect(page.locator("#canvas .shade")).to_have_count(1)
    expect(page.locator("#head")).to_be_hidden()
    page.get_by_label("One head").check()
    expect(page.locator("#canvas image.map")).to_have_count(1)
    first = page.get_attribute("#canvas image.map", "href")
    page.locator("#head").get_by_label("3", exact=True).check()
    expect(page.locator("#canvas image.map")).not_to_have_attribute("href", first)
    page.get_by_label("Features as colours").check()
    expect(page.locator("#head")).to_be_hidden()
    expect(page.locator("#canvas image.head")).to_have_count(0)
    expect(page.locator("#canvas image.pca")).to_have_count(1)


def test_asking(visit):
    page = visit()
    page.get_by_label("Question", exact=True).fill("green")
    page.get_by_role("button", name="Ask").click()
    first, second = wait_for_rows(page, 2)
    assert (first[0], first[2], first[3], first[4]) == ("green", "acformer (tiny)", "5", "none")
    assert (second[2], second[3]) == ("downsample (tiny)", "4")
    assert all(cell.endswith((" ms", " s")) for cell in first[5:9])
    assert all(cell.endswith((" B", "KiB")) for cell in first[9:11])
    expect(page.locator("#cards .card")).to_have_count(2)
    page.get_by_role("button", name="blue").click()
    assert wait_for_rows(page, 4)[0][0] == "blue"
    expect(page.get_by_label("Question", exact=True)).to_have_value("blue")


def test_pins_change_anchors_and_ask_again(visit):
    page = visit()
    page.get_by_role("button", name="red or green").click()
    wait_for_rows(page, 2)
    patch = next(patch for patch in range(4, 12) if patch not in anchors(page))
    click_patch(page, patch)
    wait_for_pins(page, states(**{f"_{patch}": "p"}))
    assert patch in anchors(page)
    assert wait_for_rows(page, 4)[0][4] == "1 pinned"
    click_patch(page, patch)
    wait_for_pins(page, states(**{f"_{patch}": "r"}))
    assert patch not in anchors(page)
    assert wait_for_rows(page, 6)[0][4] == "1 removed"
    page.get_by_role("button", name="Free all squares").click()
    wait_for_pins(page, states())
    assert wait_for_rows(page, 8)[0][4] == "none"


def test_more_pins_than_anchors_are_told(visit):
    page = visit()
    page.locator("#anchors input[type=range]").focus()
    page.keyboard.press("Home")
    wait_for_anchors(page, 1)
    for patch in (5, 6):
        click_patch(page, patch)
        expect(page.locator("#canvas svg")).to_have_attribute(
            "data-pins", states(_5="p", _6="p" if patch == 6 else "-")
        )
    expect(page.locator("#canvas .count")).to_contain_text("1 of the pinned squares found no place")


@pytest.mark.parametrize("hand", ["mouse", "keys"])
def test_the_budget_answers_again(visit, hand):
    page = visit()
    page.get_by_role("button", name="blue").click()
    wait_for_rows(page, 2)
    slider = page.locator("#budget input[type=range]")
    if hand == "keys":
        slider.focus()
        page.keyboard.press("ArrowRight")
        tokens = 6
    else:
        box = slider.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2, steps=3)
        page.mouse.up()
        tokens = 17
    first, second, *_ = wait_for_rows(page, 4)
    assert (first[0], first[3], second[3]) == ("blue", str(tokens), "4")
    wait_for_anchors(page, tokens - 1)


def test_bad_files_are_told_in_words(visit, tmp_path):
    page = visit()
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    (tmp_path / "text.txt").write_text("no image")
    for name, words in (("bad.png", "damaged"), ("text.txt", "not a PNG, JPEG")):
        page.set_input_files("#images input[type=file]", tmp_path / name)
        expect(page.get_by_role("alert")).to_contain_text(words)
        expect(page.get_by_role("alert")).to_contain_text(name)
    wait_for_anchors(page, 4)
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_contain_text("no question")
    page.get_by_role("button", name="Second").click()
    expect(page.locator("#canvas svg")).to_have_attribute("viewBox", "0 0 40 60")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_with_the_keyboard_alone(visit):
    page = visit()
    focused = "document.activeElement.closest('#canvas, #question, #ask, #anchors, #view, #budget, #upload')?.id"
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        place = page.evaluate(focused)
        if place == "canvas" and place not in reached:
            for key in ("ArrowUp", "ArrowLeft", "ArrowLeft", "Enter"):  # the first reaches row 3, column 3
                page.keyboard.press(key)
            wait_for_pins(page, states(_8="p"))
            expect(page.locator(".where")).to_contain_text("Row 3, column 1: an anchor")
            page.keyboard.press("Enter")  # the focus has stayed
            wait_for_pins(page, states(_8="r"))
        if place == "question" and place not in reached:
            page.keyboard.type("red")
            page.keyboard.press("Enter")
            wait_for_rows(page, 2)
        reached.add(place)
    assert {"canvas", "question", "ask", "anchors", "view", "budget", "upload"} <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "width", "height"), [("desktop", 1280, 900), ("phone", 390, 844)])
def test_it_fits_and_can_be_read(visit, device, width, height, scheme):
    page = visit(width, height, scheme)
    page.get_by_role("button", name="red or green").click()
    wait_for_rows(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    is_dark = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(c => c < 60)"
    )
    assert is_dark == (scheme == "dark")
    for place in (
        ".lead",
        ".how",
        ".count",
        "#ask",
        "#upload",
        ".answer",
        ".cost",
        "#table td",
        "#table th",
        "#about",
    ):
        assert page.evaluate(CONTRAST, place) >= 4.5, place  # WCAG AA for text
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{device}-{scheme}.png", full_page=True)


# WCAG's contrast of an element's text to the first ground behind it that is not transparent.
CONTRAST = """place => {
    const numbers = (colour) => {
        const canvas = document.createElement("canvas").getContext("2d");
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (colour) => {
        const [r, g, b] = colour.map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const text = document.querySelector(place);
    let ground = text;
    const opaque = (element) => numbers(getComputedStyle(element).backgroundColor)[3] === 255;
    while (ground.parentElement && !opaque(ground)) ground = ground.parentElement;
    const [a, b] = [getComputedStyle(text).color, getComputedStyle(ground).backgroundColor].map(numbers).map(light);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


def test_visitors_do_not_meet(visit):
    one, other = visit(), visit()
    click_patch(one, 5)
    wait_for_pins(one, states(_5="p"))
    other.get_by_label("One head").check()  # drawn anew
    expect(other.locator("#canvas image.map")).to_have_count(1)
    wait_for_pins(other, states())


def event_of(url, component_type):
    """The event that components of that type set off: its number, and the component's."""
    config = httpx.get(f"{url}config").json()
    uploaded = next(each["id"] for each in config["components"] if each["type"] == component_type)
    return next(each["id"] for each in config["dependencies"] if uploaded in each["inputs"]), uploaded


def join(client, url, session, image):
    """Ask the page to open an image; what the page answers to that."""
    number, component = event_of(url, "uploadbutton")
    data = [None, 4, "Anchors", "1", "", 5, {"path": image, "meta": {"_type": "gradio.FileData"}}]
    body = {"data": data, "fn_index": number, "session_hash": session, "trigger_id": component}
    return client.post("gradio_api/queue/join", json=body)


def upload(client, **headers):
    content = BytesIO()
    tiny.picture().save(content, "PNG")
    return client.post("gradio_api/upload", files={"files": ("a.png", content.getvalue())}, headers=headers)


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


def test_a_remote_url_is_not_fetched(client, url):
    """A client of its own making sends a URL where the page would send the upload."""
    assert join(client, url, "stranger", "https://example.com/a.png").status_code == 200
    text = client.get("gradio_api/queue/data", params={"session_hash": "stranger"}).text
    assert "remote URLs are off" in text


@pytest.mark.parametrize(
    "headers", [{"origin": "http://evil.example"}, {"origin": "null"}, {"host": "evil.example:7860"}], ids=str
)
def test_foreign_pages_and_names_can_neither_upload_nor_ask(client, url, headers):
    before = sorted(app.UPLOADS.rglob("*"))
    refused = upload(client, **headers)
    assert refused.status_code == 403
    assert sorted(app.UPLOADS.rglob("*")) == before
    client.headers.update(headers)
    assert join(client, url, "foreign", "x.png").status_code == 403
    assert client.get("").status_code == 403


def test_uploads_are_private_and_not_kept(client, url):
    assert app.UPLOADS.stat().st_mode & 0o777 == 0o700
    (path,) = upload(client).json()
    assert Path(path).is_relative_to(app.UPLOADS)
    assert join(client, url, "mine", path).status_code == 200
    assert "process_completed" in client.get("gradio_api/queue/data", params={"session_hash": "mine"}).text
    assert not [each for each in app.UPLOADS.rglob("*") if each.is_file() and each.stat().st_size]  # gradio's are empty


def test_clients_that_left_are_not_computed_and_the_queue_is_bounded(monkeypatch):
    """With the page busy: as many events as the queue holds, whose clients then never listen."""
    opened, busy = [], threading.Event()
    controller = Controller([demo_model("acformer")])
    page, url = serve(PageSetup(controller, IMAGES, QUESTIONS, 4))

    def slow_open(source):
        opened.append(source)
        busy.wait(20)
        return Controller.open(controller, tiny.picture())

    monkeypatch.setattr(controller, "open", slow_open)
    monkeypatch.setattr(request_filter, "PATIENCE", 1.0)
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            with client.stream("GET", "gradio_api/queue/data", params={"session_hash": "patient"}):
                pass  # there is nothing to listen to yet
            assert join(client, url, "patient", upload(client).json()[0]).status_code == 200
            with client.stream("GET", "gradio_api/queue/data", params={"session_hash": "patient"}) as stream:
                lines = stream.iter_lines()
                next(line for line in lines if "process_starts" in line)
                codes = [join(client, url, f"gone{i}", upload(client).json()[0]).status_code for i in range(40)]
                assert codes == [200] * app.MAX_QUEUE + [503] * (40 - app.MAX_QUEUE)
                full = join(client, url, "late", "x.png")
                assert "Queue is full" in full.text
                time.sleep(1.1)
                busy.set()
                next(line for line in lines if "process_completed" in line)
            while len(page.blocks._queue):
                time.sleep(0.05)
        assert len(opened) == 1
    finally:
        busy.set()
        page.blocks.close()


def test_an_encoder_alone(visit):
    page, address = serve(PageSetup(Controller(image_encoder=demo_model("acformer").image_encoder), IMAGES, (), 4))
    try:
        shown = visit(address=address)
        wait_for_anchors(shown, 4)
        expect(shown.locator("#no-model")).to_contain_text("make quickstart")
        expect(shown.locator("#question")).to_be_hidden()
        expect(shown.locator("#budget")).to_be_hidden()
        click_patch(shown, 5)
        wait_for_pins(shown, states(_5="p"))
    finally:
        page.blocks.close()


def test_the_screenshot_of_the_documents(tmp_path):
    model, out = tmp_path / "model", tmp_path / "page.webp"
    tiny.model().save_pretrained(model)
    tiny.processor().save_pretrained(model)
    if shutil.which("chromium") is None:
        pytest.skip("the page's tests need a browser: apt-get install chromium")
    command = [sys.executable, str(ROOT / "examples/demo_screenshot.py"), str(out), "--model", str(model)]
    subprocess.run([*command, "--question", "red", "--width", "390"], check=True)
    assert Image.open(out).width == 390


def test_the_command(url, tmp_path):
    """Serves until it is interrupted; a port that is taken is told."""
    tiny.model().save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    options = {"model": str(tmp_path), "compare": None, "host": "127.0.0.1", "dtype": "auto", "device": "cpu"}
    with pytest.raises(UsageError, match="choose another --port"):
        demo.run(argparse.Namespace(**options, port=urlsplit(url).port))
    code = (
        "from argparse import Namespace as N; from acformer.lab.commands.demo import run; "
        f"run(N(**{options}, port=None))"
    )
    (temporary := tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = next(line for line in process.stderr if "the page is at" in line)
            assert httpx.get(line.split()[4]).status_code == 200
            assert len(list(temporary.iterdir())) == 1
            for _ in range(4):  # on a busy machine gradio's threads may outlive the first Ctrl-C
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=15)
                    break
            assert process.poll() is not None
            assert not list(temporary.iterdir()), "uploads are gone with the page"
        finally:
            process.kill()
