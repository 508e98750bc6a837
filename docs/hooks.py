"""What the pages say about connectors and selectors comes from their registries, so it cannot go stale."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from acformer.anchors.selectors import SELECTORS, Selector
from acformer.connectors import CONNECTORS, Geometry, build_connector, list_connectors
from acformer.errors import UsageError
from acformer.vision.features import VisionFeatures

# CLIP ViT-L/14-336 and a language model of Vicuna-7B's width, as in the paper.
GEOMETRY = Geometry(vision_hidden_size=1024, text_hidden_size=4096, grid=(24, 24), num_prefix_tokens=1)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put each list where a page has its mark."""
    for mark, written in LISTS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, written())
    return markdown


def connector_table() -> str:
    """One line a connector, with its defaults, in Markdown; built without memory."""
    rows = []
    for name in list_connectors():
        with torch.device("meta"):
            connector = build_connector(name, GEOMETRY)
        weights = sum(parameter.numel() for parameter in connector.parameters()) / 1e6
        reads_row = _yes(_reads_cls_attention(connector, connector.zero_features()))
        elastic = _yes(connector.elastic)
        rows.append([f"`{name}`", _idea(name), connector.num_tokens, elastic, reads_row, f"{weights:.0f} M"])
    return _table(["name", "what it does", "T", "other T", "needs [CLS] attention", "weights"], rows)


def connectors_in_full() -> str:
    """Every connector's docstring, for mkdocstrings."""
    entry = "::: {0.__module__}.{0.__qualname__}\n    options:\n      heading: {1}\n      members: []\n"
    return "\n".join(entry.format(CONNECTORS[name], name) for name in list_connectors())


def selector_table() -> str:
    """One line a selector."""
    with torch.device("meta"):
        features = build_connector("mlp", GEOMETRY).zero_features()
    rows = []
    for name, selector in sorted(SELECTORS.items()):
        share = round(100 * selector.contextual)
        rest = f" {share} % of the tokens are means of the other patches." if share else ""
        drawn = "always" if selector.redraws else "if asked" if selector.sample else "no"
        reads_row = _yes(_reads_cls_attention(partial(selector, num=64), features))
        rows.append([f"`{name}`", _reason(selector) + rest, reads_row, drawn])
    return _table(["name", "chooses by", "needs [CLS] attention", "drawn in training"], rows)


def _idea(name: str) -> str:
    """First line of the connector's file, which says its idea, without the name that it begins with."""
    said = (sys.modules[CONNECTORS[name].__module__].__doc__ or "").partition("\n")[0].removeprefix(f"`{name}`: ")
    return said[:1].upper() + said[1:]


def _reason(selector: Selector) -> str:
    """First line about the scores or the search that a selector is made of."""
    made_of = inspect.getclosurevars(selector.select).nonlocals.get("scores", selector.select)
    return (made_of.__doc__ or "").partition("\n")[0]


def _reads_cls_attention(read: Callable[[VisionFeatures], Any], features: VisionFeatures) -> bool:
    """Whether it refuses features of an encoder that gives none."""
    try:
        read(features._replace(cls_attention=None))
    except UsageError:
        return True
    return False


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


LISTS = {
    "<!-- connectors -->": connector_table,
    "<!-- connectors in full -->": connectors_in_full,
    "<!-- selectors -->": selector_table,
}
