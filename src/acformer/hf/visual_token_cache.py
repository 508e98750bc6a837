"""Visual tokens of images, kept: encoder and connector run for an image once, not for each question or turn.

For answering, not for training. Differs from a prefix cache of the language model in what it keeps: T vectors an
image, which fit into any prompt at any place, beside other images and under either fusion.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from acformer.data.collate import stack_features
from acformer.errors import UsageError
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.hf.adapters import unwrapped
from acformer.images import image_bytes, load_image
from acformer.images.stored import StoredImage
from acformer.vision.features import VisionFeatures

Features = Callable[[Path], Mapping[str, Tensor | None]]
Edit = Callable[[VisionFeatures], VisionFeatures]
Source = str | Path | bytes | StoredImage | Image.Image
Images = Mapping[str, Source]


class VisualTokenCache:
    """`tokens(images)` -> (T, E) of each, for `model.generate(visual_tokens=...)`.

    What was made of an image is known by the sha256 of its file (of its pixels, where PIL has opened it), T and `edit`,
    and the encoder's output by the sha256 alone, so that another T or edit runs the connector only. The least recently
    used is dropped.

    It belongs to one model in eval mode, whose weights stay as they are: call `clear` after changing them. Not to be
    called from several threads at once (nor is the model).

    Args:
        model, processor: whose encoder and connector make the tokens; PEFT may have wrapped the model.
        features: what a frozen encoder made of a path, if known (`FeatureCache`).
        max_bytes: of all that is kept, on the model's device; `size` says how many there are.
    """

    def __init__(
        self,
        model: AcFormerForConditionalGeneration,
        processor: AcFormerProcessor,
        *,
        features: Features | None = None,
        max_bytes: int = 256 * 2**20,
    ):
        self.model: AcFormerForConditionalGeneration = unwrapped(model)
        self.processor = processor
        self.features: Callable[[Any], Mapping[str, Tensor | None]] | None = features
        self.max_bytes = max_bytes
        self.size = 0
        self._kept: OrderedDict[Hashable, dict[str, Tensor]] = OrderedDict()

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Source], num_visual_tokens: int | None = None, *, edit: Edit | None = None
    ) -> list[Float[Tensor, "T E"]]:
        """The visual tokens of each image (a path, the bytes of a file, or what PIL has opened), in order.

        Args:
            images: those that are new run through encoder and connector in one batch.
            num_visual_tokens: another T than the connector's own, where it is elastic.
            edit: changes the encoder's output before the connector reads it. Hashable, say a frozen dataclass: one
                that compares equal is taken to do the same.

        Raises:
            ImageError: an image that cannot be read.
            UsageError: the model is in training mode, or cannot give T.
        """
        if self.model.training:
            raise UsageError("visual tokens are kept of a model in eval mode: call model.eval() first")
        connector = self.model.model.connector
        num_tokens = connector.num_tokens if num_visual_tokens is None else num_visual_tokens

        def connect(new: Images) -> dict[str, Tensor]:
            features = self._features_of(new)
            return {"tokens": connector(features if edit is None else edit(features), num_tokens)}

        sources = [load_image(one) if isinstance(one, Image.Image) else one for one in images]
        names = [_sha256(source) for source in sources]
        found = self._all(dict(zip(names, sources, strict=True)), (num_tokens, edit), connect)
        return [found[name]["tokens"] for name in names]

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.size = 0

    def _features_of(self, wanted: Images) -> VisionFeatures:
        if self.features is None:
            found = self._all(wanted, "features", self._encode)
            arrays = stack_features([*wanted], found.__getitem__)
        else:
            arrays = stack_features([*wanted.values()], self.features)
        return self.model.model.as_features(arrays)

    def _encode(self, new: Images) -> dict[str, Tensor]:
        opened = [load_image(source) for source in new.values()]
        pixels = self.processor.image_processor(opened, return_tensors="pt")["pixel_values"]
        return self.model.get_vision_features(pixels.to(self.model.device)).arrays

    def _all(
        self, wanted: Images, what: Hashable, make: Callable[[Images], dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """By name, what is kept of each image; what is not is made, in one call with a row an image, and kept."""
        found = {name: self._kept[name, what] for name in wanted if (name, what) in self._kept}
        new = {name: source for name, source in wanted.items() if name not in found}
        if new:
            made = make(new)
            for row, name in enumerate(new):
                found[name] = {key: rows[row].clone() for key, rows in made.items()}  # a view would keep all rows
        for name, arrays in found.items():
            self._keep((name, what), arrays)
        return found

    def _keep(self, key: Hashable, arrays: dict[str, Tensor]) -> None:
        """As the most recently used; the least recently used make room."""
        if key not in self._kept:
            self.size += _num_bytes(arrays)
        self._kept[key] = arrays
        self._kept.move_to_end(key)
        while self.size > self.max_bytes:
            self.size -= _num_bytes(self._kept.popitem(last=False)[1])


def _num_bytes(arrays: Mapping[str, Tensor]) -> int:
    return sum(array.nbytes for array in arrays.values())


def _sha256(source: Source) -> str:
    if isinstance(source, Image.Image):
        return hashlib.sha256(f"{source.size}".encode() + source.tobytes()).hexdigest()
    return hashlib.sha256(image_bytes(source)).hexdigest()
