"""What an encoder knows of an image at ten depths, and where its heads look: Fig. 2, 4 and 6 (Sec. 3.2).

The paper draws the last layer's heads; the search for anchors reads those of the feature layer. Both are here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from acformer.hf.build import square_image_processor
from acformer.lab.figures.panels import draw_boxes, draw_image, draw_map, draw_rings, panel_ratio, small, within_image
from acformer.lab.figures.pca import pca_colours
from acformer.lab.figures.sheet import GAP, LABEL, MARGIN, Block, Draw, compose, shortened
from acformer.vision.encoder import load_vision_encoder, num_blocks
from acformer.vision.families import require_whole_patches
from acformer.viz.drawing import Drawing
from acformer.viz.find import Anchors, anchors_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 10.0  # inches
BETWEEN = 4 * GAP  # blocks of panels
Panels = list[tuple[str, Draw]]


@dataclass(frozen=True, eq=False)
class EncoderLayers:
    """An image seen by an encoder of `num_blocks` blocks.

    anchors: with the scores of the feature layer. last: (H, N) the [CLS] attention of the last block. depths: blocks
    that the features have been through, 0 for the patch embedding. colours: (K, N, 3), `pca_colours` at the depths.
    """

    name: str
    image: Image.Image
    anchors: Anchors
    last: Float[Tensor, "H N"]
    depths: tuple[int, ...]
    colours: UInt8[Tensor, "K N 3"]
    feature_layer: int
    num_blocks: int


class LayerExtractor:
    """Computes `EncoderLayers` of images, with an encoder that is loaded twice: to its feature layer, and whole."""

    def __init__(self, model: str, image_size: int = 336, feature_layer: int = -2, device: torch.device | str = "cpu"):
        """model, feature_layer: as `load_vision_encoder` takes them, with its errors. image_size: pixels a side."""
        self.encoder = load_vision_encoder(model, feature_layer).to(device)
        config = self.encoder.tower.config
        require_whole_patches(config, image_size)
        self.feature_layer = num_blocks(config, feature_layer)
        self.depths = ten_depths(config.num_hidden_layers)
        self.whole = load_vision_encoder(model, -1, hidden_layers=self.depths).to(device)
        self.image_processor = square_image_processor(self.encoder.tower, image_size)
        self.device = device

    def __call__(self, image: Image.Image, name: str, num_anchors: int | None = None) -> EncoderLayers:
        """`num_anchors`: by default a patch in nine, the paper's 64 of 576. `UsageError`: see `find_anchors`."""
        pixels = self.image_processor(image, return_tensors="pt")["pixel_values"].to(self.device)
        with torch.inference_mode():
            features, whole = self.encoder(pixels), self.whole(pixels)
        anchors = anchors_of(features, num_anchors)
        states = whole.hidden_layers[0, :, whole.num_prefix_tokens :]
        colours = pca_colours(states, within_image(image.size, anchors.grid))
        last = whole.cls_attention[0].cpu()
        blocks = self.encoder.tower.config.num_hidden_layers
        return EncoderLayers(name, image, anchors, last, self.depths, colours, self.feature_layer, blocks)


def ten_depths(num_blocks: int) -> tuple[int, ...]:
    """The patch embedding, seven depths spread evenly, the last block but one and the last.

    0, 3, 6, ..., 21, 23, 24 of 24 blocks, as in the paper: floor(k L / 8) for k = 0..7, L - 1, L. Fewer where an
    encoder of L < 10 blocks has no ten.
    """
    return tuple(sorted({num_blocks * k // 8 for k in range(9)} | {num_blocks - 1}))


def draw_layers(layers: EncoderLayers) -> Drawing:
    """One image: itself, its anchors, the maps of the depths, and the heads of the feature layer and the last."""
    layers = replace(layers, image=small(layers.image))
    blocks = _band(layers, MARGIN, [_maps(layers)])
    top, half = blocks[-1].bottom + 2 * GAP, (WIDTH - 2 * MARGIN - BETWEEN) / 2
    columns = math.ceil(math.sqrt(len(layers.last)))  # near a square, not fewer than rows: 3 for 6, 4 for 12 and 16
    for left, (heading, panels) in ((MARGIN, _heads(layers)), (MARGIN + half + BETWEEN, _last_heads(layers))):
        blocks.append(Block(panels, left, top, half, columns, panel_ratio(layers.image.size), heading=heading))
    return compose(WIDTH, blocks)


def draw_contact_sheet(sheets: Sequence[EncoderLayers]) -> Drawing:
    """All images, a band for each: itself, its anchors, the maps of the depths, the feature layer's heads."""
    blocks: list[Block] = []
    top = MARGIN
    for sheet in sheets:
        layers = replace(sheet, image=small(sheet.image, len(sheets)))
        blocks += _band(layers, top, [_maps(layers, sparing=True), _heads(layers)])
        top = blocks[-1].bottom + 3 * GAP
    return compose(WIDTH, blocks)


def _band(layers: EncoderLayers, top: float, kinds: Sequence[tuple[str, Panels]]) -> list[Block]:
    """The image and its anchors, then (heading, panels) of each kind in two rows, in one band across the sheet.

    A panel is w wide and w r high; the two large ones are as high as two of them, a gap and a label. So
    2 (2 w + (GAP + LABEL) / r) + c w = what the gaps leave of the width, for c columns in all.
    """
    ratio = panel_ratio(layers.image.size)
    columns = [math.ceil(len(panels) / 2) for _, panels in kinds]
    gaps = GAP + sum(BETWEEN + (number - 1) * GAP for number in columns)
    wide = (WIDTH - 2 * MARGIN - gaps - 2 * (GAP + LABEL) / ratio) / (4 + sum(columns))
    large = 2 * (2 * wide + (GAP + LABEL) / ratio) + GAP
    blocks = [Block(_large(layers), MARGIN, top, large, 2, ratio, title=shortened(layers.name))]
    left = MARGIN + large + BETWEEN
    for (heading, panels), number in zip(kinds, columns, strict=True):
        width = number * (wide + GAP) - GAP
        blocks.append(Block(panels, left, top, width, number, ratio, heading=heading))
        left += width + BETWEEN
    return blocks


def _large(layers: EncoderLayers) -> Panels:
    def outlined(axes: "Axes") -> None:
        draw_image(axes, layers.image)
        draw_boxes(axes, layers.anchors.indices, layers.anchors.grid, layers.image.size)

    label = f"{len(layers.anchors.indices)} anchors"
    return [("image", lambda axes: draw_image(axes, layers.image)), (label, outlined)]


def _maps(layers: EncoderLayers, *, sparing: bool = False) -> tuple[str, Panels]:
    """With the anchors in every map; `sparing`, in that of the feature layer or the depth next to it alone."""
    labels = [f"layer {depth}" if depth else "embedding" for depth in layers.depths]
    nearest = min(layers.depths, key=lambda depth: abs(depth - layers.feature_layer))
    anchors = [() if sparing and depth != nearest else layers.anchors.indices for depth in layers.depths]
    return "patch features, PCA to RGB", _ringed(layers, labels, layers.colours, anchors)


def _heads(layers: EncoderLayers) -> tuple[str, Panels]:
    """The feature layer's, each with the anchors that it took."""
    return _attention(layers, layers.feature_layer, layers.anchors.scores, layers.anchors.by_head)


def _last_heads(layers: EncoderLayers) -> tuple[str, Panels]:
    """The last layer's, where nothing is chosen."""
    return _attention(layers, layers.num_blocks, layers.last, [()] * len(layers.last))


def _attention(
    layers: EncoderLayers, layer: int, scores: Tensor, ringed: Sequence[Sequence[int]]
) -> tuple[str, Panels]:
    """By its square root, which shows more than the few peaks."""
    labels = [f"head {number}" for number in range(1, len(scores) + 1)]
    return f"[CLS] attention, layer {layer} of {layers.num_blocks}", _ringed(layers, labels, scores.sqrt(), ringed)


def _ringed(layers: EncoderLayers, labels: Sequence[str], maps: Tensor, ringed: Sequence[Sequence[int]]) -> Panels:
    """Maps (K, N) or (K, N, 3) over the patches, with some of them in rings."""
    grid, size = layers.anchors.grid, layers.image.size

    def draw(axes: "Axes", values: Tensor, indices: Sequence[int]) -> None:
        draw_map(axes, values.unflatten(0, grid), size)  # (h, w) or (h, w, 3)
        draw_rings(axes, indices, grid, size)

    each = zip(labels, maps, ringed, strict=True)
    return [(label, partial(draw, values=values, indices=indices)) for label, values, indices in each]
