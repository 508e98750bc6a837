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
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, Unpack

from acformer.errors import CheckpointError, UsageError
from acformer.hf.auto_map import AUTO_MAP
from acformer.hf.budgets import Budgets, per_image, take_request
from acformer.hf.fusion import FUSIONS
from acformer.hf.publish import Published
from acformer.images import load_image

IMAGE_TOKEN = "<image>"
logger = logging.getLogger("acformer")


class AcFormerImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What a call may say of its images beside the image processor's own options: see `acformer.hf.budgets`.

    They stand here because vLLM looks for them here; `AcFormerProcessor` itself takes them out of the options.
    """

    num_visual_tokens: Any
    num_image_tokens: Any
    max_soft_tokens: Any
    detail: Any


class AcFormerCallKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Options of `AcFormerProcessor`."""

    images_kwargs: AcFormerImagesKwargs


class PublishedProcessor(Published, ProcessorMixin):
    """One class between: transformers compares a processor's methods with those of its first parent."""


class AcFormerProcessor(PublishedProcessor):
    """An image processor, a tokenizer that knows `<image>`, a chat template, and T.

    `num_placeholders` comes from the config's (the connector's T; 1 where `fusion` is not `concat`) and is saved with
    the processor, so that a server can size its prompts without the model. Processors saved before version 0.2 call it
    `num_image_tokens`. `budgets`: the config's, what the connector can give, as runs (first, last). `num_image_tokens`:
    T of calls that name none, where it is not the model's own.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_placeholders: int | None = None,
        image_token: str = IMAGE_TOKEN,
        fusion: str = "concat",
        budgets: list | None = None,
        num_image_tokens: int | None = None,
    ):
        own = num_image_tokens if num_placeholders is None else num_placeholders
        self.num_placeholders = 145 if own is None else own
        self.num_image_tokens = None if num_placeholders is None else num_image_tokens
        self.fusion = fusion
        self.budgets = None if budgets is None else [[int(first), int(last)] for first, last in budgets]
        self._request: tuple[str, Any] | None = None
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no {image_token!r} token; add it as a special token first")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        num_visual_tokens: Any = None,
        **kwargs: Unpack[AcFormerCallKwargs],
    ) -> BatchFeature:
        """Model inputs for prompts in which every image is one `<image>`.

        Args:
            images: PIL images, paths, bytes or data: URLs, all read by `load_image`, or arrays: one, a flat list in
                the order of the tags, or a list for each prompt. Nothing is fetched.
            text: one prompt or several. Where they begin with the tokenizer's BOS token, as a rendered chat may, the
                tokenizer does not add another one.
            num_visual_tokens: another T in this call, or a list with one for each image; passed on to the model with
                the inputs, as a number or as a tensor (images,). Also `num_image_tokens`, `max_soft_tokens` and
                `detail`, alone or in `images_kwargs` (`acformer.hf.budgets`).
            **kwargs: as transformers'.

        Prompts and images in the other order, `processor(text, images)`, are recognised, exchanged and logged.

        Raises:
            ImageError: an image that cannot be read, a URL.
            ValueError: tags and images differ in number.
            UsageError: a T that the connector cannot give, where the processor knows what it can.
        """
        images, text = self._in_order(images, text)
        options: dict[str, Any] = {**kwargs, "num_visual_tokens": num_visual_tokens}
        request = take_request(options) or ("num_image_tokens", self.num_image_tokens)
        if self._begin_with_bos(text) and "add_special_tokens" not in {**options, **options.get("text_kwargs", {})}:
            options["add_special_tokens"] = False
        sized = copy.copy(self)  # another thread may have another request
        sized._request = request
        if not isinstance(request[1], list | tuple | torch.Tensor):
            self.sizes.of(*request)  # also where there is no image
        inputs = super(AcFormerProcessor, sized).__call__(images=images, text=text, **options)
        budget = sized._num_visual_tokens(len(inputs["pixel_values"]) if "pixel_values" in inputs else 0, options)
        if budget is not None:
            inputs["num_visual_tokens"] = budget
        return inputs

    @property
    def sizes(self) -> Budgets:
        """What an image may cost."""
        choices = None if self.budgets is None else tuple((first, last) for first, last in self.budgets)
        return Budgets(self.num_placeholders if self.fusion == "concat" else None, choices)

    def to_dict(self) -> dict[str, Any]:
        """As transformers'; without what belongs to one call."""
        written = super().to_dict()
        written.pop("_request", None)
        return {key: value for key, value in written.items() if key != "num_image_tokens" or value is not None}

    def _wanted(self, num_images: int) -> list[int | None]:
        """T of each image as this call asks for it; None: the model's own."""
        name, value = self._request or ("num_image_tokens", None)
        wanted = [self.sizes.of(name, one) for one in per_image(value, num_images, name)]
        if self.fusion != "concat" and len(set(wanted)) > 1:
            raise UsageError(f"fusion {self.fusion!r} takes one number of visual tokens for all images of a call")
        return wanted

    def _num_visual_tokens(self, num_images: int, options: Mapping) -> Any:
        """`num_visual_tokens` for the model: nothing for its own T, a number, or a tensor (images,).

        vLLM is always given a tensor, of which it gives each image its own element.
        """
        if not num_images:
            value = (self._request or ("", None))[1]
            return self.sizes.of(*self._request) if self._request and isinstance(value, int) else None
        wanted = self._wanted(num_images)
        given = {**options, **options.get("text_kwargs", {})}
        is_vllm = given.get("return_text_replacement_offsets") and not given.get("return_offsets_mapping")
        if is_vllm or len(set(wanted)) > 1:
            return torch.tensor([self.num_placeholders if one is None else one for one in wanted])
        return wanted[0]

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
        return self.image_token * self.count_placeholders(self._wanted(len(image_inputs["pixel_values"]))[image_idx])

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        """For vLLM: tokens per image of the given (height, width)s, with the options of a call.

        Raises:
            UsageError: a T that the connector cannot give; a fusion of which vLLM would leave the images out.
        """
        if self.fusion != "concat":
            raise UsageError(
                f"vLLM cannot serve fusion {self.fusion!r}, whose images the language model reads beside its "
                "sequence; serve it with: acformer serve MODEL"
            )
        name, value = take_request(kwargs) or ("num_image_tokens", self.num_image_tokens)
        count = len(image_sizes or [])
        wanted = [self.count_placeholders(self.sizes.of(name, one)) for one in per_image(value, count, name)]
        return MultiModalData(num_image_tokens=wanted, num_image_patches=[1] * count)


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
