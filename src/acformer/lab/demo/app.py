"""The page itself, in gradio: what stands where, and which step of a session each event is.

It loads nothing from elsewhere: the system's fonts, no analytics, no remote images. Events wait for each other, since
an encoder takes one image at a time; so many at most, and only for clients that are still there.
"""

import atexit
import os
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

UPLOADS = Path(mkdtemp(prefix="acformer-demo-"))  # mode 0700, of this process alone
atexit.register(shutil.rmtree, UPLOADS, ignore_errors=True)
os.environ["GRADIO_TEMP_DIR"] = str(UPLOADS)  # else one folder for all users of the machine, which anybody can guess
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # else gradio asks its home page for news

import gradio as gr
from starlette.middleware import Middleware

from acformer.errors import AcFormerError
from acformer.images import DEFAULT_LIMITS
from acformer.lab.demo.canvas import View, draw
from acformer.lab.demo.page_html import INTRODUCTION, LEGEND, NO_MODEL, about, alert, cards, counted, table
from acformer.lab.demo.page_setup import PageSetup
from acformer.lab.demo.pins import Pins
from acformer.lab.demo.request_filter import ARRIVED, RequestFilter, is_waiting
from acformer.lab.demo.session import MAX_QUESTION, Session

FILES = files("acformer.lab.demo")
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "Consolas", "monospace"]
HOUR = 3600  # seconds that an upload, and a session without an event, are kept
MAX_QUEUE = 32  # events that wait; who comes then is sent away
Updates = dict[Any, Any]


def _theme() -> gr.themes.Base:
    """Amber with black on it, which can be read; the system's fonts."""
    theme = gr.themes.Default(primary_hue="amber", neutral_hue="slate", font=FONTS, font_mono=MONO)
    ink = "#1c1400"
    ground = "*primary_400"
    return theme.set(
        button_primary_text_color=ink,
        button_primary_text_color_dark=ink,
        button_primary_text_color_hover=ink,
        button_primary_text_color_hover_dark=ink,
        button_primary_background_fill=ground,
        button_primary_background_fill_dark=ground,
    )


class Controls(NamedTuple):
    """What a step knows: the event, the session, what stands in the controls."""

    event: gr.EventData
    session: Session
    num_anchors: int
    view: str
    head: str
    question: str
    budget: int


class Page:
    """The page for a `PageSetup`; `launch` serves it."""

    def __init__(self, setup: PageSetup):
        self.setup, self.controller = setup, setup.controller
        self.first = self.controller.open(next(iter(setup.images.values())))
        self.num_others = self.controller.models[0].num_others if self.controller.models else 0
        self.listening: Counter[str] = Counter()
        with gr.Blocks(title="Visual anchors", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as self.blocks:
            self.session = gr.State(None, time_to_live=HOUR)
            gr.HTML(INTRODUCTION, js_on_load=None, elem_id="introduction")
            self.notice = gr.HTML("", js_on_load=None, elem_id="notice")
            with gr.Row():
                with gr.Column(scale=3, min_width=300):
                    self._lay_out_image()
                with gr.Column(scale=2, min_width=300):
                    self._lay_out_answers()
            self.table = gr.HTML("", js_on_load=None, elem_id="table")
            gr.HTML(about(setup), js_on_load=None, elem_id="about")
            self._listen()

    def launch(self, host: str = "127.0.0.1", port: int | None = None, **options: Any) -> Any:
        """Serve it; takes further options of gradio's `launch` and returns what that returns."""
        self.blocks.queue(max_size=MAX_QUEUE)
        return self.blocks.launch(
            app_kwargs={"middleware": [Middleware(RequestFilter, host=host, listening=self.listening)]},
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=DEFAULT_LIMITS.max_bytes,
            state_session_capacity=50,
            theme=_theme(),
            css=(FILES / "page.css").read_text(encoding="utf-8"),
            js=(FILES / "page.js").read_text(encoding="utf-8"),
            **options,
        )

    def _lay_out_image(self) -> None:
        scores = self.first.image.features.cls_attention
        assert scores is not None  # `ImageEncoder` refuses encoders without
        with gr.Row(elem_id="images"):
            self.upload = gr.UploadButton("Choose or drop an image", elem_id="upload", variant="primary", size="md")
            _take_files_alone(self.upload)
            self.examples = {name: gr.Button(name, size="md", min_width=90) for name in self.setup.images}
        self.canvas = gr.HTML("", js_on_load=(FILES / "canvas.js").read_text(encoding="utf-8"), elem_id="canvas")
        most, chosen = self.first.image.num_patches, self.setup.num_anchors
        self.anchors = gr.Slider(1, most, min(chosen, most), step=1, label="Anchors", elem_id="anchors", buttons=[])
        self.view = gr.Radio([view.value for view in View], value=View.ANCHORS.value, label="Show", elem_id="view")
        heads = [str(head) for head in range(1, scores.shape[1] + 1)]
        self.head = gr.Radio(heads, value="1", label="Head", elem_id="head", visible=False)
        gr.HTML(LEGEND, js_on_load=None, elem_id="legend")
        self.unpin = gr.Button("Free all squares", size="sm", elem_id="unpin")

    def _lay_out_answers(self) -> None:
        models, most = self.controller.models, self.first.image.num_patches
        shown = {"visible": bool(models)}
        if not models:
            gr.HTML(NO_MODEL, js_on_load=None, elem_id="no-model")
        self.question = gr.Textbox(label="Question", max_length=MAX_QUESTION, elem_id="question", **shown)
        with gr.Row(elem_id="questions"):
            self.asked = {words: gr.Button(words, size="sm", min_width=60) for words in self.setup.questions}
        self.ask = gr.Button("Ask", variant="primary", elem_id="ask", **shown)
        self.budget = gr.Slider(
            1 + self.num_others,
            most + self.num_others,
            models[0].connector.num_tokens if models else 1,
            step=1,
            label="Token budget",
            info="Visual tokens that the language model reads. Move it, and the same weights answer again.",
            interactive=any(model.connector.elastic for model in models),
            elem_id="budget",
            buttons=[],
            **shown,
        )
        self.cards = gr.HTML("", js_on_load=None, elem_id="cards")

    def _listen(self) -> None:
        """Each event and its step."""
        self._on(self.blocks.load, self._begin)
        self._on(self.upload.upload, self._open, self.upload)
        for name, button in self.examples.items():
            self._on(button.click, partial(self._open, image=self.setup.images[name]))
        self._on(self.anchors.input, self._move_anchors, trigger_mode="always_last")
        self._on(self.view.change, self._turn)
        self._on(self.head.change, self._turn)
        self._on(self.canvas.patch, self._toggle)
        self._on(self.unpin.click, self._free_all)
        self._on(self.ask.click, self._ask)
        self._on(self.question.submit, self._ask)
        for words, button in self.asked.items():
            self._on(button.click, partial(self._ask, words=words))
        self._on(self.budget.input, self._move_budget, trigger_mode="always_last")
        self._on(self.budget.release, self._ask_again)

    def _on(self, event: Callable, step: Callable[..., Updates], *more: Any, trigger_mode: Any = "once") -> None:
        """Run a step at an event; it returns what changes, by component."""
        controls = [self.session, self.anchors, self.view, self.head, self.question, self.budget]
        event(
            self._guarded(step),
            inputs=[*controls, *more],
            outputs=[*controls, self.canvas, self.cards, self.table, self.notice],
            concurrency_limit=1,
            concurrency_id="one image at a time",
            trigger_mode=trigger_mode,
            show_progress="minimal",
            show_progress_on=[self.cards],
            api_visibility="private",
        )

    def _guarded(self, step: Callable[..., Updates]) -> Callable[..., Updates]:
        """The step for a client that still waits; what a visitor did wrong is shown on the page, which stays."""

        def act(event: gr.EventData, request: gr.Request, *values: Any) -> Updates:
            arrived = request.request.scope[ARRIVED]
            if not is_waiting(str(request.session_hash), arrived, self.listening):
                raise gr.Error("the client has left", print_exception=False)
            session, *others = values
            now = Controls(event, self.first if session is None else session, *others[:5])
            try:
                return {self.notice: "", **step(now, *others[5:])}
            except AcFormerError as error:
                return {self.notice: alert(error)}

        return act

    # The steps: what a visitor did -> what changes on the page.

    def _begin(self, now: Controls) -> Updates:
        return self._all(self.first, now)

    def _open(self, now: Controls, image: Any) -> Updates:
        try:
            return self._all(self.controller.open(image), now)
        finally:
            if isinstance(image, str):  # an upload, of which nothing is kept
                Path(image).unlink(missing_ok=True)

    def _move_anchors(self, now: Controls) -> Updates:
        return {self.canvas: self._drawn(now.session, now), self.budget: now.num_anchors + self.num_others}

    def _move_budget(self, now: Controls) -> Updates:
        now = now._replace(num_anchors=now.budget - self.num_others)
        return {self.canvas: self._drawn(now.session, now), self.anchors: now.num_anchors}

    def _turn(self, now: Controls) -> Updates:
        head = gr.update(visible=now.view == View.HEAD)
        return {self.canvas: self._drawn(now.session, now), self.head: head}

    def _toggle(self, now: Controls) -> Updates:
        return self._all(self.controller.toggle(now.session, int(now.event.patch), now.budget), now)

    def _free_all(self, now: Controls) -> Updates:
        return self._all(self.controller.pin(now.session, Pins(), now.budget), now)

    def _ask(self, now: Controls, words: str | None = None) -> Updates:
        question = now.question if words is None else words
        return {self.question: question, **self._written(self.controller.ask(now.session, question, now.budget))}

    def _ask_again(self, now: Controls) -> Updates:
        return self._written(self.controller.pin(now.session, now.session.pins, now.budget))

    def _all(self, session: Session, now: Controls) -> Updates:
        return {self.canvas: self._drawn(session, now), **self._written(session)}

    def _written(self, session: Session) -> Updates:
        return {self.session: session, self.cards: cards(session), self.table: table(session)}

    def _drawn(self, session: Session, now: Controls) -> str:
        chosen = session.anchors(now.num_anchors)
        drawn = draw(session.image, chosen, session.pins, View(now.view), int(now.head))
        count = counted(sum(map(len, chosen)), session.image.num_patches, session.pins)
        return f'{drawn}{count}<p class="where" aria-live="polite"></p>'


def _take_files_alone(button: gr.UploadButton) -> None:
    """Else gradio fetches a URL that a client sends for a file. (Beside a subclass it would write a stub file.)"""
    move = button.async_move_resource_to_block_cache

    async def move_file(source: Any) -> str | None:
        if "://" in str(source):
            raise gr.Error("remote URLs are off: download the image and choose the file", print_exception=False)
        return await move(source)

    button.async_move_resource_to_block_cache = move_file
