"""What the page says, as HTML in which everything that comes from outside is escaped: texts, cards, the table."""

from html import escape

from acformer.anchors.selectors import SELECTORS
from acformer.lab.demo.demo_model import Answer, DemoModel
from acformer.lab.demo.page_setup import ENCODER, PageSetup
from acformer.lab.demo.pins import Pins
from acformer.lab.demo.session import Session
from acformer.provenance import machine

INTRODUCTION = """
<h1>Visual anchors</h1>
<p class="lead">A vision encoder cuts an image into small squares; its <b>anchors</b> are the few squares that it looks
at most when it sums the image up. Let these few ask all the others what they know, and a language model needs to read
only them to answer questions about the image.</p>
"""
LEGEND = """
<ul class="legend">
<li><svg viewBox="0 0 20 20"><rect class="anchor" x="3" y="3" width="14" height="14"/></svg> anchor</li>
<li><svg viewBox="0 0 20 20"><rect class="pinned" x="3" y="3" width="14" height="14"/><circle class="pinned" cx="10"
cy="10" r="3.5"/></svg> pinned: an anchor in any case</li>
<li><svg viewBox="0 0 20 20"><path class="removed" d="M3 3h14v14h-14zl14 14m0 -14l-14 14"/></svg>
removed: in no case</li>
</ul>
<p class="how">Click a square to pin it, again to remove it, again to free it. With keys: arrows and Enter.</p>
"""
NO_MODEL = f"""
<div class="card"><h3>No model is loaded</h3><p>You see the anchors of the encoder alone
(<code>{ENCODER}</code>). <code>acformer fetch acformer-scenes</code> brings a trained model, <code>make
quickstart</code> trains a small one within minutes; start <code>acformer demo</code> again after it, or name a model of
your own: <code>acformer demo --model FOLDER</code>.</p>
</div>
"""


def alert(error: Exception) -> str:
    """What went wrong, in words."""
    return f'<p role="alert">{escape(str(error))}</p>'


def counted(num_anchors: int, num_patches: int, pins: Pins) -> str:
    """The line under the image."""
    more = len(pins.pinned) - num_anchors
    left_out = f" {more} of the pinned squares found no place among them: raise the number." if more > 0 else ""
    return f'<p class="count"><b>{num_anchors} anchors</b> of {num_patches} squares.{left_out}</p>'


def about(setup: PageSetup) -> str:
    """The models, and where times are taken."""
    items = "".join(f"<li>{escape(about_model(model))}</li>" for model in setup.controller.models)
    where = escape(", ".join(f"{key} {value}" for key, value in machine().items()))
    times = f"<p>Times are one measurement each, made here: {where}.</p>" if items else ""
    return f"<ul>{items}</ul>{times}"


def about_model(model: DemoModel) -> str:
    """How many tokens a model reads, and whether of the anchors outlined on the page."""
    connector = model.connector
    elastic = "any other number with the same weights" if connector.elastic else "no other number"
    if model.selector == "anchors":
        reads = "what it reads are the anchors"
    elif model.selector and SELECTORS[model.selector].needs_cls_attention:
        reads = f"its patches are chosen by {model.selector}: pins count, but it does not read the anchors outlined"
    else:
        reads = "it does not read anchors, so pins do not reach it"
    return f"{model.name}: {connector.num_tokens} visual tokens of its own, {elastic}; {reads}."


LONG = 40  # characters of an answer that is no longer set in large type


def cards(session: Session) -> str:
    """The newest answers side by side, and what each was before if it has changed; empty before the first one."""
    newest = session.rounds[-1] if session.rounds else ()
    return "".join(["<div class='cards'>", *(_card(session, place) for place in range(len(newest))), "</div>"])


def table(session: Session) -> str:
    """Every answer about this image, the newest first; empty before the first one."""
    rows = [_cells(answer) for answers in reversed(session.rounds) for answer in answers]
    if not rows:
        return ""
    if len(session.images) == 1:
        rows = [{key: cell for key, cell in row.items() if key != "Model"} for row in rows]
    head = "".join(f'<th scope="col">{key}</th>' for key in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row.values())}</tr>" for row in rows)
    inside = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="All answers">{inside}</div>'


def duration(seconds: float) -> str:
    """`0.42 ms`, `17 ms`, `2.4 s`."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.2g} ms"


def size(num_bytes: int) -> str:
    """`512 B`, `8.5 KiB`, `17 MiB`."""
    amount, units = float(num_bytes), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while amount >= 1024 and (larger := next(units, None)):
        amount, unit = amount / 1024, larger
    return f"{amount:.1f} {unit}" if unit != "B" and amount < 10 else f"{amount:.0f} {unit}"


def _card(session: Session, place: int) -> str:
    answer, before = session.rounds[-1][place], session.changed_from(place)
    change = f'<p class="was">before: <s>{escape(before.text)}</s></p>' if before else ""
    kind = "answer long" if len(answer.text) > LONG else "answer"
    cost = f"first token after {duration(answer.first_token)}, KV cache of the image {size(answer.image_kv_bytes)}"
    return (
        f'<article class="card"><h3>{escape(answer.model)}</h3>'
        f'<p class="{kind}">{escape(answer.text) or "(nothing)"}</p>{change}'
        f'<p class="cost"><b>{answer.num_tokens} visual tokens</b>, {cost}</p></article>'
    )


def _cells(answer: Answer) -> dict[str, str]:
    return {
        "Question": answer.question,
        "Answer": answer.text,
        "Model": answer.model,
        "Visual tokens": str(answer.num_tokens),
        "Pins": str(answer.pins) or "none",
        "First token": duration(answer.first_token),
        "Encoder": duration(answer.encoder),
        "Connector": duration(answer.connector),
        "Language model": duration(answer.language_model),
        "KV cache": size(answer.kv_bytes),
        "of it the image": size(answer.image_kv_bytes),
    }
