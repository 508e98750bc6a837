"""What the page says, apart from answers: HTML, with everything that comes from outside escaped."""

import html

from acformer.lab.demo.pins import Pins
from acformer.lab.demo.respondent import Respondent
from acformer.lab.demo.start import ENCODER, Opening
from acformer.provenance import machine

INTRODUCTION = """
<h1>Visual anchors</h1>
<p class="lead">An image encoder cuts a picture into small squares; its <b>anchors</b> are the few squares that it looks
at most when it sums the picture up. Let these few ask all the others what they know, and a language model needs to read
only them to answer questions about the picture.</p>
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
<div class="card"><h3>Nobody here to answer</h3><p>No model is loaded: you see the anchors of the encoder alone
(<code>{ENCODER}</code>). <code>make quickstart</code> trains a small model within minutes; start
<code>acformer demo</code> again after it, or name a model of your own: <code>acformer demo --model FOLDER</code>.</p>
</div>
"""


def alert(error: Exception) -> str:
    """What went wrong, in words."""
    return f'<p role="alert">{html.escape(str(error))}</p>'


def counted(num_anchors: int, num_patches: int, pins: Pins) -> str:
    """The line under the picture."""
    more = len(pins.pinned) - num_anchors
    left_out = f" {more} of the pinned squares found no place among them: raise the number." if more > 0 else ""
    return f'<p class="count"><b>{num_anchors} anchors</b> of {num_patches} squares.{left_out}</p>'


def about(start: Opening) -> str:
    """The models, and where times are taken."""
    items = "".join(f"<li>{html.escape(_about(respondent))}</li>" for respondent in start.guide.respondents)
    facts = html.escape(", ".join(f"{key} {value}" for key, value in machine().items()))
    times = f"<p>Times are one measurement each, made here: {facts}.</p>" if items else ""
    return f"<ul>{items}</ul>{times}"


def _about(respondent: Respondent) -> str:
    connector = respondent.connector
    elastic = "any other number with the same weights" if connector.elastic else "no other number"
    reads = (
        "what it reads are the anchors"
        if respondent.reads_anchors
        else "it does not read anchors, so pins do not reach it"
    )
    return f"{respondent.name}: {connector.num_tokens} visual tokens of its own, {elastic}; {reads}."
