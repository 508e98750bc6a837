"""Visual tokens of pictures, kept: encoder and connector run for a picture once, not for each question or turn.

For answering, not for training. Differs from a prefix cache of the language model in what it keeps: T vectors a
picture, which fit into any prompt at any place, beside other pictures and under either fusion.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from acformer.data.collate import stack_features
from acformer.errors import ImageError, UsageError
from acformer.files import file_sha256
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.images import load_image
from acformer.vision.features import VisionFeatures

Features = Callable[[Path], Mapping[str, Tensor | None]]
Edit = Callable[[VisionFeatures], VisionFeatures]
Picture = Path | bytes
Pictures = Mapping[str, Picture]


class VisualTokenCache:
    """`tokens(pictures)` -> (T, E) of each, for `model.generate(visual_tokens=...)`.

    What was made of a picture is known by the sha256 of its file, T and `edit`, and the encoder's output by the sha256
    alone, so that another T or edit runs the connector only. The least recently used is dropped.

    It belongs to one model in eval mode, whose weights stay as they are: call `clear` after changing them. Not to be
    called from several threads at once (nor is the model).

    Args:
        model, processor: whose encoder and connector make the tokens.
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
        self.model = model
        self.processor = processor
        self.features: Callable[[Any], Mapping[str, Tensor | None]] | None = features
        self.max_bytes = max_bytes
        self.size = 0
        self._kept: OrderedDict[Hashable, dict[str, Tensor]] = OrderedDict()

    @torch.no_grad()
    def __call__(
        self, pictures: Sequence[Picture], num_visual_tokens: int | None = None, *, edit: Edit | None = None
    ) -> list[Float[Tensor, "T E"]]:
        """The visual tokens of each picture (a path, or the bytes of a file), in order.

        Args:
            pictures: those that are new run through encoder and connector in one batch.
            num_visual_tokens: another T than the connector's own, where it is elastic.
            edit: changes the encoder's output before the connector reads it. Hashable, say a frozen dataclass: one
                that compares equal is taken to do the same.

        Raises:
            ImageError: a picture that cannot be read. UsageError: the model is in training mode, or cannot give T.
        """
        if self.model.training:
            raise UsageError("image tokens are kept of a model in eval mode: call model.eval() first")
        connector = self.model.model.connector
        num_tokens = connector.num_tokens if num_visual_tokens is None else num_visual_tokens

        def connect(new: Pictures) -> dict[str, Tensor]:
            features = self._features_of(new)
            return {"tokens": connector(features if edit is None else edit(features), num_tokens)}

        names = [_sha256(picture) for picture in pictures]
        found = self._all(dict(zip(names, pictures, strict=True)), (num_tokens, edit), connect)
        return [found[name]["tokens"] for name in names]

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.size = 0

    def _features_of(self, wanted: Pictures) -> VisionFeatures:
        if self.features is None:
            found = self._all(wanted, "features", self._encode)
            arrays = stack_features([*wanted], found.__getitem__)
        else:
            arrays = stack_features([*wanted.values()], self.features)
        return self.model.model.as_features(arrays)

    def _encode(self, new: Pictures) -> dict[str, Tensor]:
        opened = [load_image(picture) for picture in new.values()]
        pixels = self.processor.image_processor(opened, return_tensors="pt")["pixel_values"]
        return self.model.get_vision_features(pixels.to(self.model.device)).arrays

    def _all(
        self, wanted: Pictures, what: Hashable, make: Callable[[Pictures], dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """By name, what is kept of each picture; what is not is made, in one call with a row a picture, and kept."""
        found = {name: self._kept[name, what] for name in wanted if (name, what) in self._kept}
        new = {name: picture for name, picture in wanted.items() if name not in found}
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


def _sha256(picture: Picture) -> str:
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).hexdigest()
    try:
        return file_sha256(picture)
    except OSError as error:
        raise ImageError(f"cannot be read ({(error.strerror or 'input error').lower()}): {picture}") from error
