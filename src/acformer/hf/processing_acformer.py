"""`AcFormerProcessor`: images and text in, model inputs out; one `<image>` becomes T image tokens."""

import copy
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData

from acformer.errors import CheckpointError
from acformer.hf.auto_map import AUTO_MAP
from acformer.hf.fusion import FUSIONS
from acformer.hf.publish import Published
from acformer.images import load_image

IMAGE_TOKEN = "<image>"
logger = logging.getLogger("acformer")


class AcFormerProcessor(Published, ProcessorMixin):
    """An image processor, a tokenizer that knows `<image>`, a chat template, and T.

    `num_placeholders` comes from the config's (the connector's T; 1 where `fusion` is not `concat`) and is saved with
    the processor, so that a server can size its prompts without the model. Processors saved before version 0.2 call it
    `num_image_tokens`.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_placeholders: int = 145,
        image_token: str = IMAGE_TOKEN,
        fusion: str = "concat",
        **kwargs: Any,
    ):
        self.num_placeholders = kwargs.pop("num_image_tokens", num_placeholders)
        self.fusion = fusion
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no {image_token!r} token; add it as a special token first")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}

    def __call__(
        self, images: Any = None, text: Any = None, *, num_visual_tokens: int | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Model inputs for prompts in which every image is one `<image>`.

        Args:
            images: PIL images, paths or bytes, all read by `load_image`, or arrays: one, a flat list in the order of
                the tags, or a list for each prompt. Nothing is fetched.
            text: one prompt or several. Where they begin with the tokenizer's BOS token, as a rendered chat may, the
                tokenizer does not add another one.
            num_visual_tokens: another T in this call, passed on to the model with the inputs.

        Prompts and images in the other order, `processor(text, images)`, are told apart and a line says so.

        Raises:
            ImageError: an image that cannot be read, a URL. ValueError: tags and images differ in number.
        """
        images, text = self._in_order(images, text)
        own = self.num_placeholders if self.fusion == "concat" else None
        if num_visual_tokens is None or num_visual_tokens == own:
            if self._begin_with_bos(text) and "add_special_tokens" not in {**kwargs, **kwargs.get("text_kwargs", {})}:
                kwargs["add_special_tokens"] = False
            return super().__call__(images=images, text=text, **kwargs)
        other = copy.copy(self)
        other.num_placeholders = self.count_placeholders(num_visual_tokens)
        inputs = other(images, text, **kwargs)
        inputs["num_visual_tokens"] = num_visual_tokens
        return inputs

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but code that comes with a tokenizer or an image processor does not run."""
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', of text and images; `ValueError` for audio, whose URL it would fetch, and for video."""
        if other := {"audio", "video"}.intersection(_part_types(conversation)):
            raise ValueError(f"a chat with this model holds text and images, not {' and '.join(sorted(other))}")
        return super().apply_chat_template(conversation, *args, **kwargs)

    def count_placeholders(self, num_visual_tokens: int | None = None) -> int:
        """Image tokens that a prompt holds for an image of T visual tokens (by default the model's own T)."""
        if num_visual_tokens is None:
            return self.num_placeholders
        return FUSIONS[self.fusion].count_placeholders(num_visual_tokens)

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple:
        """As transformers', which would fetch URLs and open paths in a way of its own; no image at all is None."""
        if _is_nested(images) and not any(images):
            images = None
        return super().prepare_inputs_layout(images=_opened(images), text=text, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """`ValueError` unless the prompts hold one `<image>` for every image, each of its own where they are nested.

        transformers counts all rows together, and up to 5.19 not at all.
        """
        tags = [prompt.count(self.image_token) for prompt in text or []]
        rows = [len(row) for row in images] if tags and _is_nested(images) else tags
        for row, (wanted, given) in enumerate(zip(tags, rows, strict=True)) if len(tags) == len(rows) else ():
            if wanted != given:
                raise ValueError(
                    f"row {row}: its prompt holds {wanted} {self.image_token} tags, its images are {given}"
                )
        super().validate_inputs(images=images, text=text, **kwargs)
        count = 0 if images is None else len(make_flat_list_of_images(images))
        if text is not None and sum(tags) != count:
            raise ValueError(f"the prompts hold {sum(tags)} {self.image_token} tags, but there are {count} images")
        if len(rows) != len(tags):
            raise ValueError(f"{len(rows)} lists of images for {len(tags)} prompts: give each prompt its own list")

    def _in_order(self, images: Any, text: Any) -> tuple[Any, Any]:
        """(images, text), exchanged where the one can only be the other."""
        prompts = [one for one in _flat(images) if isinstance(one, str) and self.image_token in one]
        is_swapped = any(not isinstance(one, str | int) for one in _flat(text))  # ids are text, too
        if prompts and not is_swapped:
            if text is None or any(self.image_token in str(one) for one in _flat(text)):
                raise ValueError(f"{prompts[0]!r} was given as an image: call processor(images=..., text=...)")
            is_swapped = True
        if not is_swapped:
            return images, text
        logger.warning("prompts were given as images and images as text: call processor(images=..., text=...)")
        return text, images

    def _begin_with_bos(self, text: Any) -> bool:
        bos, prompts = self.tokenizer.bos_token, [text] if isinstance(text, str) else text
        return bool(bos and prompts) and all(isinstance(one, str) and one.startswith(bos) for one in prompts)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that stands for one image: T image tokens, whatever its size."""
        return self.image_token * self.num_placeholders

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        """For vLLM: tokens per image of the given (height, width)s."""
        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.num_placeholders] * count, num_image_patches=[1] * count)


def _is_nested(images: Any) -> bool:
    """Whether it is a list of lists, one a prompt; an empty list is one, too."""
    return isinstance(images, list | tuple) and all(isinstance(row, list | tuple) for row in images)


def _opened(images: Any) -> Any:
    """The same structure with every path, every file's bytes and every PIL image as `load_image` gives it."""
    if isinstance(images, list | tuple):
        return [_opened(one) for one in images]
    return load_image(images) if isinstance(images, str | bytes | os.PathLike | Image.Image) else images


def _flat(values: Any) -> Iterator[Any]:
    """What stands in nested lists, or the one value; nothing for None."""
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    elif values is not None:
        yield values


def _part_types(chat: Any) -> Iterator[Any]:
    """`type` of every part of a chat or a batch of chats."""
    if isinstance(chat, Mapping):
        yield chat.get("type")
        yield from _part_types(chat.get("content"))
    elif isinstance(chat, list | tuple):
        for inner in chat:
            yield from _part_types(inner)


def check_processor(processor: AcFormerProcessor, image_size: int, name: str) -> None:
    """`CheckpointError` unless a word becomes ids and a white image finite pixels of the size that the model reads.

    A standard deviation of 0 would make every answer the same; a size of a million pixels would fill the memory.
    """
    image_processor = processor.image_processor
    for field in ("size", "crop_size"):
        for side in dict(getattr(image_processor, field, None) or {}).values():
            if side is not None and not (isinstance(side, int) and 1 <= side <= 8 * image_size):
                raise CheckpointError(f"{name}: {field} of its image processor is {side!r} for images of {image_size}")
    try:
        processor.tokenizer("a")
        made = image_processor(Image.new("RGB", (4, 3), "white"), return_tensors="pt")["pixel_values"]
    except Exception as error:  # as many as there are fields
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{name}: its processor cannot be used: {reason}") from error
    if tuple(made.shape) != (1, 3, image_size, image_size):
        raise CheckpointError(
            f"{name}: its image processor makes pixels of shape {tuple(made.shape)}, where its model reads "
            f"(1, 3, {image_size}, {image_size}): take the processor that was saved with the model"
        )
    if not torch.isfinite(made).all():
        raise CheckpointError(f"{name}: its image processor makes pixels that are not finite: look at image_std")
