"""Pictures of what the anchor search sees, of what the encoder knows there, and of what the language model reads.

`find` the anchors of a picture, `overlay` them on it, `show` both in a notebook. `layers` and `pca` make the paper's
Fig. 2, 4 and 6; `reading` and `sources`, Fig. 5; `write` makes files of them. `panels` and `sheet` are how it
is drawn.
"""

from acformer.viz.find import Anchors, anchors_of, find_anchors
from acformer.viz.overlay import draw_anchors
from acformer.viz.pca import pca_colours
from acformer.viz.show import show_anchors

__all__ = ["Anchors", "anchors_of", "draw_anchors", "find_anchors", "pca_colours", "show_anchors"]
