"""The page without its gradio: pins are obeyed, costs are what they are said to be, images and words hold no trap."""

import argparse
import asyncio
import base64
import os
import socket
import sys
import time
from collections import Counter
from dataclasses import replace
from io import BytesIO
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from acformer.anchors.search import select_anchors, select_anchors_reference
from acformer.anchors.selectors import SELECTORS
from acformer.data.datasets import DATASETS
from acformer.errors import CheckpointError, ImageError, UsageError
from acformer.evaluate.generate import ask
from acformer.lab.bench.roofline import kv_bytes
from acformer.lab.commands import demo
from acformer.lab.demo import request_filter
from acformer.lab.demo.canvas import View, draw
from acformer.lab.demo.demo_model import DemoModel
from acformer.lab.demo.encoded_image import ImageEncoder
from acformer.lab.demo.examples import ANY_MODEL, images, questions, trained_on
from acformer.lab.demo.page_html import about_model, cards, duration, size, table
from acformer.lab.demo.page_setup import newest_run, set_up_page
from acformer.lab.demo.pins import Pins, apply_pins
from acformer.lab.demo.request_filter import RequestFilter, is_waiting
from acformer.lab.demo.session import MAX_QUESTION, MAX_ROUNDS, Controller
from acformer.training.recipe import load_recipe
from acformer.vision.features import VisionFeatures
from acformer.viz.find import anchors_by_head
from acformer.viz.overlay import patch_box

QUESTION = "red or green"


def demo_model(connector="acformer", **kwargs):
    model = tiny.model(connector, **kwargs)
    processor = tiny.processor(model.config.num_placeholders, model.config.image_size, fusion=model.config.fusion)
    return DemoModel(f"{connector} <tiny>", model, processor)


def features(scores):
    """(H, N) scores of one image; tokens do not matter."""
    num_patches = scores.shape[1]
    return VisionFeatures(torch.zeros(1, num_patches + 1, 8), scores[None], (1, num_patches), 1)


def svg(drawn):
    return ElementTree.fromstring(drawn)


def of_class(drawn, name):
    return [part for part in svg(drawn).iter() if part.get("class") == name]


# Pins.


def test_a_patch_goes_through_three_states():
    pins = Pins().toggled(3)
    assert (pins, str(pins)) == (Pins(frozenset({3})), "1 pinned")
    pins = pins.toggled(3).toggled(5)
    assert (pins, str(pins)) == (Pins(frozenset({5}), frozenset({3})), "1 pinned, 1 removed")
    assert not pins.toggled(3).toggled(5).toggled(5)


@st.composite
def scores_and_pins(draw):
    """Scores of 1 to 6 heads, with ties, zeros and numbers below the smallest normal one; pins that can be obeyed."""
    num_heads, num_patches = draw(st.integers(1, 6)), draw(st.integers(2, 20))
    values = st.sampled_from([0.0, 1e-42, 1e-38, 0.1, 0.25, 0.9999999, 1.0]) | st.floats(0, 1, width=32)
    rows = draw(
        st.lists(st.lists(values, min_size=num_patches, max_size=num_patches), min_size=num_heads, max_size=num_heads)
    )
    pinned, removed = draw(st.sets(st.integers(0, num_patches - 1))), draw(st.sets(st.integers(0, num_patches - 1)))
    removed -= pinned
    num = draw(st.integers(max(len(pinned), 1), max(num_patches - len(removed), 1)))
    return torch.tensor(rows), Pins(frozenset(pinned), frozenset(removed)), num


@given(scores_and_pins(), st.sampled_from(["anchors", "cls_topk", "spaced"]))
@example((torch.tensor([[1.0, 0.0]]), Pins(frozenset({1})), 1), "anchors")  # 0 + 1 would only tie with 1
@example((torch.tensor([[0.0, 0.0]]), Pins(removed=frozenset({0})), 1), "anchors")  # nothing lies below 0
def test_pinned_patches_are_anchors_and_removed_ones_are_not(case, selector):
    scores, pins, num = case
    steered = apply_pins(features(scores), pins)
    chosen = set(SELECTORS[selector](steered, num)[0].tolist())
    assert pins.pinned <= chosen
    if num <= scores.shape[1] - len(pins.removed):
        assert not pins.removed & chosen
    assert (steered.cls_attention >= 0).all()


@given(scores_and_pins())
def test_free_patches_keep_their_order(case):
    scores, pins, _ = case
    scores = scores.clamp_min(1e-20)  # what lies below it ties
    free = sorted(set(range(scores.shape[1])) - pins.pinned - pins.removed)
    assert torch.equal(apply_pins(features(scores), pins).cls_attention[0][:, free], scores[:, free])


def test_without_pins_nothing_is_touched():
    seen = features(torch.rand(2, 6))
    assert apply_pins(seen, Pins()) is seen
    before = seen.cls_attention.clone()
    apply_pins(seen, Pins(frozenset({1})))
    assert torch.equal(seen.cls_attention, before)


def test_pins_that_cannot_be_are_told():
    with pytest.raises(UsageError, match="patch 6 is outside the image's 6 patches"):
        apply_pins(features(torch.rand(2, 6)), Pins(frozenset({6})))
    with pytest.raises(UsageError, match="no anchors to pin"):
        apply_pins(features(torch.rand(2, 6))._replace(cls_attention=None), Pins(frozenset({1})))


# Encoding.


@given(st.integers(1, 5), st.integers(1, 12), st.data())
def test_heads_choose_what_the_search_chooses(num_heads, num_patches, data):
    scores = torch.rand(num_heads, num_patches, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    num = data.draw(st.integers(1, num_patches))
    by_head = anchors_by_head(scores, num)
    assert sorted(sum(by_head, ())) == select_anchors_reference(scores[None], num)[0].tolist()
    assert [len(chosen) for chosen in by_head] == [num // num_heads + (h < num % num_heads) for h in range(num_heads)]
    assert by_head[0] == tuple(scores[0].topk(len(by_head[0])).indices.sort().values.tolist())


def test_an_image_is_encoded_as_the_model_does():
    model = demo_model()
    encoded = model.image_encoder(tiny.picture(1))
    pixels = model.processor.image_processor(tiny.picture(1), return_tensors="pt")["pixel_values"]
    assert torch.equal(encoded.features.tokens, model.model.get_vision_features(pixels).tokens)
    assert (encoded.num_patches, encoded.pad_to_square) == (16, True)
    assert encoded.seconds > 0


def test_an_encoder_without_scores_is_refused():
    blind = ImageEncoder(
        lambda pixels: features(torch.rand(1, 4))._replace(cls_attention=None),
        tiny.processor().image_processor,
        torch.zeros(1),
    )
    with pytest.raises(UsageError, match="no anchors"):
        blind(tiny.picture())


# Answers and their cost.


@pytest.mark.parametrize("num_tokens", [5, 3, 17])
def test_answers_are_those_of_ask(num_tokens, tmp_path):
    one = demo_model()
    tiny.picture(3).save(path := tmp_path / "image.png")
    answer = one.answer(one.image_encoder(tiny.picture(3)), QUESTION, num_tokens, Pins(), max_new_tokens=8)
    expected = ask(one.model, one.processor, path, QUESTION, num_visual_tokens=num_tokens, max_new_tokens=8)
    assert (answer.text, answer.num_tokens) == (expected, num_tokens)


@pytest.mark.parametrize(
    ("connector", "fusion"), [("acformer", "concat"), ("acformer", "gated_cross_attention"), ("mlp", "concat")]
)
def test_costs_add_up(connector, fusion):
    one = demo_model(connector, fusion=fusion)
    answer = one.answer(one.image_encoder(tiny.picture()), QUESTION, 5, Pins(), max_new_tokens=8)
    assert answer.num_tokens == (16 if connector == "mlp" else 5)  # mlp has no choice
    assert 0 < answer.prefill <= answer.language_model
    assert answer.connector > 0
    assert answer.first_token == answer.encoder + answer.connector + answer.prefill
    positions = 1 if fusion != "concat" else answer.num_tokens
    assert answer.image_kv_bytes == kv_bytes(one.model.config.text_config, positions, torch.float32)
    assert answer.image_kv_bytes < answer.kv_bytes


@torch.inference_mode()
def test_kv_bytes_are_those_of_the_cache():
    one = demo_model()
    encoded = one.image_encoder(tiny.picture())
    answer = one.answer(encoded, QUESTION, 5, Pins(), max_new_tokens=8)
    image = one.model.get_image_features(vision_features=encoded.features, num_visual_tokens=5)
    ids = torch.tensor([one._prompt(QUESTION, 5)])
    output = one.model.generate(
        ids, mm_encoder_outputs={"image": image}, do_sample=False, max_new_tokens=8, return_dict_in_generate=True,
        eos_token_id=one.processor.tokenizer.eos_token_id, pad_token_id=one.processor.tokenizer.pad_token_id,
    )  # fmt: skip
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    assert answer.kv_bytes == held


@torch.inference_mode()
def test_pins_reach_the_connector():
    one = demo_model()
    encoded = one.image_encoder(tiny.picture(2))
    own = select_anchors(encoded.features.cls_attention, 4)[0].tolist()
    other = next(patch for patch in range(16) if patch not in own)
    pins = Pins(frozenset({other}), frozenset(own[:1]))
    chosen = one.connector.queries.choose(apply_pins(encoded.features, pins), 4)[0].tolist()
    assert other in chosen
    assert own[0] not in chosen
    tokens = [
        one.model.get_image_features(vision_features=apply_pins(encoded.features, p)).pooler_output[0]
        for p in (Pins(), pins)
    ]
    assert not torch.equal(*tokens)
    assert one.answer(encoded, QUESTION, 5, pins).pins == pins


def test_what_a_model_tells_of_its_connector():
    assert (demo_model().selector, demo_model().num_others) == ("anchors", 1)
    assert (demo_model("e_vit").selector, demo_model("e_vit").num_others) == ("anchors", 2)
    assert demo_model("mlp").selector == ""
    for connector, told in (
        ("acformer", "what it reads are the anchors"),
        ("acformer_v2", "its patches are chosen by spaced: pins count"),
        ("random_pr", "pins do not reach it"),
        ("mlp", "pins do not reach it"),
    ):
        assert told in about_model(demo_model(connector))


# Sessions.


def test_a_session_from_image_to_changed_answer():
    controller = Controller([demo_model()])
    session = controller.open(tiny.picture(1))
    assert sum(map(len, session.anchors(4))) == 4
    assert controller.toggle(session, 3, 5).rounds == ()  # nothing was asked
    session = controller.ask(session, QUESTION, 5)
    pinned = controller.toggle(session, 3, 5)
    assert [len(rounds) for rounds in (session.rounds, pinned.rounds)] == [1, 2]
    assert pinned.rounds[-1][0].question == QUESTION
    assert 3 in sum(pinned.anchors(4), ())
    assert session.pins == Pins()  # a step makes a new one
    assert controller.open(tiny.picture(2)).rounds == ()


def test_more_anchors_than_patches_are_not_drawn():
    session = Controller([demo_model()]).open(tiny.picture())
    assert sum(map(len, session.anchors(99))) == 16


def test_the_answer_before_is_that_to_the_same_question():
    controller = Controller([demo_model()])
    session = controller.ask(controller.open(tiny.picture(1)), QUESTION, 17)
    assert session.changed_from(0) is None
    first = session.rounds[0][0].text
    for num_tokens in range(2, 17):  # weights are random: some budget changes what is said
        again = controller.ask(session, QUESTION, num_tokens)
        if again.rounds[-1][0].text != first:
            break
    assert again.changed_from(0).text == first
    assert "before: <s>" in cards(again)
    assert controller.ask(again, "blue", 17).changed_from(0) is None


@pytest.mark.parametrize("question", ["", "  \n ", "x" * (MAX_QUESTION + 1)])
def test_questions_that_are_none(question):
    controller = Controller([demo_model()])
    with pytest.raises(UsageError, match=r"no question|characters"):
        controller.ask(controller.open(tiny.picture()), question, 5)


def test_a_question_may_hold_anything():
    controller = Controller([demo_model()])
    session = controller.ask(controller.open(tiny.picture()), "<image></s> <b>red</b> \U0001f600", 5)
    assert "<b>red" not in table(session)
    assert "&lt;b&gt;red" in table(session)


def test_bad_images_and_patches_are_told(tmp_path):
    controller = Controller([demo_model()])
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad\.png"):
        controller.open(tmp_path / "bad.png")
    with pytest.raises(ImageError, match="remote URLs are off"):
        controller.open("http://127.0.0.1/image.png")
    with pytest.raises(UsageError, match="outside"):
        controller.toggle(controller.open(tiny.picture()), 16, 5)
    with pytest.raises(UsageError, match="a model or an encoder"):
        Controller()


def test_two_models_answer_side_by_side():
    controller = Controller([demo_model(), demo_model("downsample")])
    session = controller.toggle(controller.ask(controller.open(tiny.picture()), QUESTION, 3), 2, 3)
    assert [answer.num_tokens for answer in session.rounds[-1]] == [3, 4]
    assert cards(session).count("<article") == 2
    assert table(session).count("<tr>") == 1 + 4
    assert '<th scope="col">Model</th>' in table(session)


def test_pins_mean_nothing_to_a_model_with_other_patches():
    controller = Controller([demo_model(), demo_model(image_size=24)])
    session = controller.toggle(controller.ask(controller.open(tiny.picture()), QUESTION, 5), 15, 5)
    assert [str(answer.pins) for answer in session.rounds[-1]] == ["1 pinned", ""]


def test_old_answers_are_forgotten():
    controller = Controller([demo_model()])
    session = controller.ask(controller.open(tiny.picture()), QUESTION, 5)
    session = controller.ask(replace(session, rounds=session.rounds * MAX_ROUNDS), QUESTION, 5)
    assert len(session.rounds) == MAX_ROUNDS


def test_an_encoder_alone_shows_anchors():
    session = Controller(image_encoder=demo_model().image_encoder).open(tiny.picture())
    assert sum(map(len, session.anchors(4))) == 4
    assert (table(session), "<article" in cards(session)) == ("", False)


# What is drawn and written.


@pytest.mark.parametrize("view", View)
def test_a_drawing_is_whole(view):
    session = Controller([demo_model()]).open(tiny.picture(1, (60, 40)))
    chosen = session.anchors(4)
    pins = Pins(frozenset({5, 6}), frozenset({9}))
    drawn = draw(session.image, chosen, pins, view, head=2)
    root = svg(drawn)
    assert root.get("viewBox") == "0 0 60 40"
    assert root.get("data-pins") == "-----pp--r------"
    heads = list(map(int, root.get("data-heads").split()))
    assert [tuple(n for n, head in enumerate(heads) if head == h) for h in (1, 2, 3, 4)] == list(chosen)
    assert len([part for part in of_class(drawn, "pinned") if part.tag == "circle"]) == 2
    assert len(of_class(drawn, "removed")) == 1
    strong = 1 if view is View.HEAD else 4
    assert of_class(drawn, "anchor")[0].get("d").count("M") == strong
    assert len(of_class(drawn, "weak")) == (view is View.HEAD)
    assert len(of_class(drawn, "shade")) == (view is View.ANCHORS)


def test_outlines_lie_on_their_patches():
    """As `draw_anchors` has them, before it cuts off the padding: the image is 60 x 40 in a square of 60."""
    session = Controller([demo_model()]).open(tiny.picture(1, (60, 40)))
    path = of_class(draw(session.image, [(6,)], Pins()), "anchor")[0].get("d")
    left, top, right, bottom = patch_box(6, (4, 4), (60, 40), pad_to_square=True)
    assert path == f"M{left:.2f} {top:.2f}h{right - left:.2f}v{bottom - top:.2f}h{left - right:.2f}z"


def decoded(image):
    return np.asarray(Image.open(BytesIO(base64.b64decode(image.get("href").partition(",")[2]))).convert("RGB"))


def test_the_heat_is_the_heads():
    session = Controller([demo_model()]).open(tiny.picture(1))
    scores = session.image.features.cls_attention[0]
    for head in (1, 4):
        heat = decoded(of_class(draw(session.image, session.anchors(4), Pins(), View.HEAD, head), "map")[0]).astype(int)
        assert heat.shape == (4, 4, 3)
        lightness = (heat @ (0.2126, 0.7152, 0.0722)).flatten()
        assert lightness.argmax() == scores[head - 1].argmax()
        assert (np.diff(lightness[scores[head - 1].argsort()]) > -1).all()  # inferno grows lighter all along


def test_features_as_colours_leave_the_padding_out():
    session = Controller([demo_model()]).open(
        tiny.picture(1, (64, 16))
    )  # the upper and lower patches see padding alone
    colours = decoded(of_class(draw(session.image, session.anchors(4), Pins(), View.PCA), "map")[0])
    assert colours.shape == (4, 4, 3)
    assert colours[1:3].reshape(-1, 3).max(0).tolist() == [255, 255, 255]
    assert colours[1:3].reshape(-1, 3).min(0).tolist() == [0, 0, 0]


def test_large_images_are_sent_small():
    session = Controller([demo_model()]).open(Image.new("RGB", (3000, 1500)))
    assert svg(draw(session.image, session.anchors(4), Pins())).get("viewBox") == "0 0 1024 512"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.00042, "0.42 ms"), (0.0171, "17 ms"), (0.62, "620 ms"), (2.44, "2.4 s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (512, "512 B"), (8704, "8.5 KiB"), (17 * 2**20, "17 MiB"), (2**42, "4096 GiB")]
)
def test_sizes(num_bytes, text):
    assert size(num_bytes) == text


# Whom it serves.


async def ok(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def status(host, origin=None, served_at="127.0.0.1", kind="http"):
    """Of a request with these headers; of a websocket its close."""
    sent = []

    async def send(message):
        sent.append(message)

    headers = {"host": host, "origin": origin}
    encoded = [(key.encode(), value.encode()) for key, value in headers.items() if value is not None]
    scope = {"type": kind, "path": "/upload", "query_string": b"", "headers": encoded}
    asyncio.run(RequestFilter(ok, served_at, Counter())(scope, None, send))
    return sent[0].get("status", sent[0].get("code"))


@pytest.mark.parametrize(
    "host", ["127.0.0.1:7860", "localhost:7860", "LOCALHOST", "[::1]:7860", "192.168.1.7:80", socket.gethostname()]
)
def test_its_own_pages_are_served_by_any_address_of_the_machine(host):
    assert status(host) == 200
    assert status(host, f"http://{host}") == status(host, f"https://{host}") == 200


def test_a_name_that_was_asked_for_is_served():
    assert status("gpu.example.org:7860", served_at="gpu.example.org") == 200


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("evil.example:7860", None),  # a name that is pointed at 127.0.0.1
        ("localhost.evil.example:7860", "http://localhost.evil.example:7860"),
        ("127.0.0.1.nip.io", None),
        ("", None),
        ("[", None),
        ("127.0.0.1:7860", "http://evil.example"),
        ("127.0.0.1:7860", "http://127.0.0.1:8000"),  # another program's page on this machine
        ("127.0.0.1:7860", "null"),  # a file or a sandboxed frame
        ("127.0.0.1:7860", "http://["),
        ("127.0.0.1:7860@evil.example", None),
    ],
)
def test_foreign_names_and_pages_are_refused(host, origin):
    assert status(host, origin) == 403
    assert status(host, origin, kind="websocket") == 1008


def test_a_client_waits_while_its_stream_is_open(monkeypatch):
    monkeypatch.setattr(request_filter, "PATIENCE", 0.2)
    listening, seen = Counter(), []

    async def app(scope, receive, send):
        seen.append((is_waiting("me", time.monotonic(), listening), is_waiting("you", time.monotonic(), listening)))

    for path in (request_filter.ANSWERS, "/config"):
        scope = {"type": "http", "path": f"/gradio_api{path}", "query_string": b"session_hash=me"}
        asyncio.run(RequestFilter(app, "", listening)({**scope, "headers": [(b"host", b"[::1]")]}, None, None))
    assert seen == [(True, False), (False, False)]
    assert not listening
    start = time.monotonic()
    assert not is_waiting("me", start - 1, listening)
    assert time.monotonic() - start < 0.1, "who came long ago and does not listen is not waited for"


# What it begins with.


def test_examples_need_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path))
    assert list(images()) == ["A shape"]
    assert questions("openmoji-scenes-small") == DATASETS["openmoji-scenes"].example_questions()
    assert questions("") == questions("mine.json") == ANY_MODEL


@pytest.fixture
def runs(tmp_path):
    """A finished run, as `quickstart` leaves it."""
    folder = tmp_path / "runs" / "finetune" / "model"
    tiny.model().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    (tmp_path / "runs" / "recipe.yaml").write_text(load_recipe("tiny").to_yaml())
    return tmp_path / "runs"


def test_the_newest_run_opens(runs):
    assert trained_on(runs / "finetune/model") == "easy-vqa"
    assert newest_run(runs / "none") is None
    assert newest_run(runs) == str(runs)
    later = runs / "later/finetune/model"
    later.mkdir(parents=True)
    (later / "config.json").write_text("{}")
    os.utime(runs / "finetune/model/config.json", (1, 1))
    assert newest_run(runs) == str(runs / "later")


def test_setting_up_a_page(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("acformer.lab.demo.page_setup.RUNS", runs)
    setup = set_up_page(None, str(runs), "auto", torch.device("cpu"))
    assert len(setup.controller.models) == 2
    assert (setup.num_anchors, setup.questions) == (4, DATASETS["easy-vqa"].example_questions())
    assert next(iter(setup.images)) == "A shape"


def test_nothing_to_open_with(tmp_path, monkeypatch):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path))
    monkeypatch.setattr("acformer.lab.demo.page_setup.RUNS", tmp_path / "runs")
    with pytest.raises(CheckpointError, match="acformer fetch dinov2-s14"):
        set_up_page(None, None, "auto", torch.device("cpu"))
    with pytest.raises(CheckpointError, match="no model in"):
        set_up_page(str(tmp_path / "missing/model"), None, "auto", torch.device("cpu"))


@pytest.mark.embedded
def test_setting_up_a_page_without_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr("acformer.lab.demo.page_setup.RUNS", tmp_path)
    monkeypatch.setattr("acformer.lab.demo.page_setup.fetched_model", lambda: None)
    setup = set_up_page(None, None, "auto", torch.device("cpu"))
    assert list(setup.images) == ["A photograph", "A scene", "A shape"]
    session = setup.controller.open(setup.images["A photograph"])
    assert session.image.num_patches == 576
    assert sum(map(len, session.anchors(setup.num_anchors))) == 64


def test_the_command_without_gradio(monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "acformer.lab.demo.app", raising=False)
    common, parser = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser()
    demo.add(parser.add_subparsers(), common)
    arguments = parser.parse_args(["demo", "--port", "8000"])
    with pytest.raises(UsageError, match=r"pip install 'acformer\[demo\]'"):
        arguments.run(arguments)
