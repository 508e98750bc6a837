"""Anchors, drawn: `find` those of an image, `overlay` them on it, `show` both in a notebook.

`sources` tells which patches a visual token was made of.
"""

from acformer.viz.find import Anchors, anchors_of, find_anchors
from acformer.viz.overlay import draw_anchors
from acformer.viz.show import show_anchors

__all__ = ["Anchors", "anchors_of", "draw_anchors", "find_anchors", "show_anchors"]
