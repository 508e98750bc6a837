"""A screenshot of `acformer demo`, taken by a real browser: the images of docs/demo.md and the README.

    python examples/demo_screenshot.py docs/images/demo.webp --question "what is the color of the shape?"
    python examples/demo_screenshot.py docs/images/demo-anchors.webp --picture "A photograph" --model none
    python examples/demo_screenshot.py docs/images/demo-phone.webp --width 390 --dark --picture "A scene" \
        --question "is there a red shape?"

Needs `pip install 'acformer[demo]' playwright`, and chromium on the PATH. Prints the machine that the times in the
image come from.
"""

import argparse
import shutil
from dataclasses import replace
from io import BytesIO

import torch
from PIL import Image
from playwright.sync_api import Page as Tab
from playwright.sync_api import sync_playwright

from acformer.lab.demo import page_setup
from acformer.lab.demo.app import Page
from acformer.provenance import machine

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def ask(tab: Tab, question: str) -> None:
    """What a visitor would do: ask, then pin the square in the middle."""
    tab.get_by_role("textbox", name="Question").fill(question)
    tab.get_by_role("textbox", name="Question").press("Enter")
    tab.wait_for_selector("#cards .card")
    tab.locator("#canvas svg").focus()
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#canvas circle.pinned")
    tab.locator("#canvas svg").blur()


def main() -> None:
    """Serve, look, save."""
    parser = argparse.ArgumentParser(description="Take a screenshot of the page.")
    parser.add_argument("out")
    parser.add_argument("--model", help="default: as `acformer demo`; `none` for the encoder alone")
    parser.add_argument("--compare")
    parser.add_argument("--picture", help="the example to begin with, by name")
    parser.add_argument("--question")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    asked = parser.parse_args()
    if asked.model == "none":
        asked.model, page_setup.RUNS, page_setup.fetched_model = None, page_setup.RUNS / "none", lambda: None
    setup = page_setup.set_up_page(asked.model, asked.compare, "auto", torch.device("cpu"))
    names = sorted(setup.images, key=lambda name: name != asked.picture)
    page = Page(replace(setup, images={name: setup.images[name] for name in names}))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        scheme = "dark" if asked.dark else "light"
        tab = browser.new_page(viewport={"width": asked.width, "height": 844}, color_scheme=scheme)
        tab.goto(url)
        tab.wait_for_selector("#canvas svg")
        if asked.question:
            ask(tab, asked.question)
        tab.wait_for_timeout(500)  # gradio's own fading
        taken = tab.screenshot(full_page=asked.width > 640)  # a phone shows a window of the page
        browser.close()
    Image.open(BytesIO(taken)).convert("RGB").save(asked.out, quality=90)
    page.blocks.close()
    print(asked.out, machine())


if __name__ == "__main__":
    main()
