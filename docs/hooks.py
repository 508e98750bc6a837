"""What the pages say about the connectors comes from the registry itself, so it cannot go stale."""

from typing import Any

import torch

from acformer.connectors import CONNECTORS, Geometry, build_connector, connector_options, list_connectors

MARK = "<!-- connectors -->"
# CLIP ViT-L/14-336 and a language model of Vicuna-7B's width, as in the paper.
GEOMETRY = Geometry(vision_hidden_size=1024, text_hidden_size=4096, grid=(24, 24), num_prefix_tokens=1)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put the table of connectors where a page has the mark."""
    return markdown.replace(MARK, connector_table()) if MARK in markdown else markdown


def connector_table() -> str:
    """One line a connector, with its defaults, in Markdown."""
    rows = ["| name | what it does | options and defaults | T | other T | weights |", "|---|---|---|---|---|---|"]
    for name in list_connectors():
        with torch.device("meta"):
            connector = build_connector(name, GEOMETRY)
        what = (CONNECTORS[name].__doc__ or "").splitlines()[0]
        options = "<br>".join(f"`{key}={value}`" for key, value in connector_options(name).items())
        weights = sum(parameter.numel() for parameter in connector.parameters()) / 1e6
        elastic = "yes" if connector.elastic else "no"
        rows.append(f"| `{name}` | {what} | {options} | {connector.num_tokens} | {elastic} | {weights:.0f} M |")
    return "\n".join(rows)
