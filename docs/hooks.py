"""What the pages say about connectors and selectors comes from their registries, so it cannot go stale."""

from typing import Any

import torch

from acformer.anchors.selectors import SELECTORS, refuses_no_cls_attention
from acformer.connectors import CONNECTORS, Geometry, build_connector, connector_options, list_connectors
from acformer.registry import Registry

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
        reads_row = _yes(refuses_no_cls_attention(connector, connector.zero_features()))
        idea = (CONNECTORS[name].__doc__ or "").partition("\n")[0]
        rows.append([f"`{name}`", idea, connector.num_tokens, _yes(connector.elastic), reads_row, f"{weights:.0f} M"])
    return _table(["name", "what it does", "T", "other T", "needs [CLS] attention", "weights"], rows)


def selector_table() -> str:
    """One line a selector."""
    rows = [
        [f"`{name}`", SELECTORS[name].summary, _yes(SELECTORS[name].needs_cls_attention), SELECTORS[name].drawn]
        for name in SELECTORS.names()
    ]
    return _table(["name", "chooses", "needs [CLS] attention", "drawn in training"], rows)


def aliases(registry: Registry) -> str:
    """The other names of a registry, in a list."""
    lines = []
    for other, (name, options) in sorted(registry.aliases.items()):
        with_options = " and ".join(f"`{key}: {value}`" for key, value in options.items())
        lines.append(f"- `{other}` is `{name}`{' with ' if options else ''}{with_options}")
    return "\n".join(lines)


def connectors_in_full() -> str:
    """Every connector's docstring, for mkdocstrings, and its options."""
    entry = "::: {0.__module__}.{0.__qualname__}\n    options:\n      heading: {1}\n      members: []\n\n{2}\n"
    return "\n".join(entry.format(CONNECTORS[name], name, _options(name)) for name in list_connectors())


def _options(name: str) -> str:
    """Those that it passes on to its parent too, which its signature does not show."""
    return "Options: " + ", ".join(f"`{key}={value!r}`" for key, value in connector_options(name).items())


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


LISTS = {
    "<!-- connectors -->": connector_table,
    "<!-- connector aliases -->": lambda: aliases(CONNECTORS),
    "<!-- connectors in full -->": connectors_in_full,
    "<!-- selectors -->": selector_table,
}
