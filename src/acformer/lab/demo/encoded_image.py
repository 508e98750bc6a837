"""An image as an encoder sees it: what the page draws from, encoded once and kept."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from acformer.errors import UsageError
from acformer.vision.encoder import VisionEncoder
from acformer.vision.features import VisionFeatures

MAX_SIDE = 1024  # pixels of the image that is kept and sent to the browser


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image and its features.

    image: RGB, of at most `MAX_SIDE` pixels a side: what is shown, and all that is kept of it. features: of this one
    image, B = 1. seconds: what encoding took. pad_to_square: the encoder was given the image padded to a square, not
    squashed into one.
    """

    image: Image.Image
    features: VisionFeatures
    seconds: float
    pad_to_square: bool

    @property
    def num_patches(self) -> int:
        """N."""
        return self.features.grid[0] * self.features.grid[1]


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """An encoder and what makes its pixels; called with an image, it gives an `EncodedImage`.

    encode: (1, 3, Y, X) pixels -> features. like: a weight of the encoder, for device and dtype.
    """

    encode: Callable[[Tensor], VisionFeatures]
    image_processor: Any
    like: Tensor

    @classmethod
    def of_encoder(cls, encoder: VisionEncoder, image_processor: Any) -> "ImageEncoder":
        """That of an encoder without a language model."""
        return cls(encoder, image_processor, next(encoder.parameters()))

    def __call__(self, image: Image.Image) -> EncodedImage:
        """Encode an image; `UsageError` where the encoder has no [CLS] attention."""
        pixels = self.image_processor(image, return_tensors="pt")["pixel_values"]
        start = now(self.like.device)
        with torch.inference_mode():
            features = self.encode(pixels.to(self.like.device, self.like.dtype))
        seconds = now(self.like.device) - start
        if features.cls_attention is None:
            raise UsageError("this encoder gives no [CLS] attention, so it has no anchors")
        shown = image.copy()
        shown.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        return EncodedImage(shown, features, seconds, bool(self.image_processor.to_dict().get("do_pad")))


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
