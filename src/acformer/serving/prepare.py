"""From a checked request to what an engine takes: images read by `load_image`, the prompt by the chat template.

It runs in a thread, one request at a time, so that the memory of decoded images is that of one request.
"""

import inspect
import json
import threading
from base64 import b64encode
from io import BytesIO
from typing import Any

from jinja2 import TemplateError
from PIL.Image import Image
from transformers import ProcessorMixin

from acformer.errors import AcFormerError, ImageError, UsageError, one_line
from acformer.evaluate.generate import new_tokens
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.images import load_image
from acformer.serving.remote import fetch
from acformer.serving.request import ChatRequest, Limits, RefusedError


def images_of(request: ChatRequest, limits: Limits) -> list[Image]:
    """The images of a request, decoded; `RefusedError` names the part whose image cannot be read."""
    images = []
    for url, place in zip(request.images, request.places, strict=True):
        try:
            is_data = url[:5].lower() == "data:"
            source = url if is_data else fetch(url, limits.allow_hosts, limits.image.max_bytes)
            images.append(load_image(source, limits=limits.image))
        except ImageError as error:
            raise RefusedError(400, f"image: {one_line(error)}", place, "invalid_image") from error
    return images


class Preparation:
    """`prepare(request)` for transformers: fills `request.inputs` and says how long the answer may be."""

    def __init__(self, model: AcFormerForConditionalGeneration, processor: AcFormerProcessor, limits: Limits):
        self.model, self.processor, self.limits = model, processor, limits
        self._one_at_a_time = threading.Lock()
        # Text that spells a special token is text; up to transformers 5.19 it cannot be kept apart.
        self.sanitizes = "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters

    def __call__(self, request: ChatRequest) -> bytes:
        """The body for transformers' server, which asks for `request.inputs` instead of reading it."""
        with self._one_at_a_time:
            try:
                request.inputs = self._inputs(request)
                request.max_new_tokens = new_tokens(self.model, request.inputs, request.max_new_tokens)
            except RefusedError:
                raise
            except AcFormerError as error:
                raise RefusedError(400, one_line(error)) from error
            except (TemplateError, ValueError) as error:
                raise RefusedError(400, f"the chat template refuses these messages: {one_line(error, 120)}") from error
        return b"{}"

    def _inputs(self, request: ChatRequest) -> dict[str, Any]:
        images = images_of(request, self.limits)
        options: dict[str, Any] = {"sanitize_control_tokens": True} if self.sanitizes else {}
        if not self.sanitizes:
            refuse_image_token(request, self.processor.image_token)
        if images:
            options["processor_kwargs"] = {"num_image_tokens": request.budgets}
        left, messages = iter(images), []
        for message in request.messages:
            messages.append({**message, "content": [_part(part, left) for part in message["content"]]})
        return self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **options,
        )


def _part(part: dict[str, Any], images: Any) -> dict[str, Any]:
    return {"type": "image", "image": next(images)} if part["type"] == "image" else part


def refuse_image_token(request: ChatRequest, token: str) -> None:
    """`RefusedError` where a text spells the token that stands for an image, and the engine would take it for one."""
    for number, message in enumerate(request.messages):
        if any(token in part.get("text", "") for part in message["content"]):
            raise RefusedError(400, f"text holds {token}, which stands for an image", f"messages[{number}].content")


class VllmBody:
    """`rewrite(request)` for vLLM: the same chat, its images as PNG of the pixels that `load_image` gives."""

    def __init__(self, limits: Limits, image_token: str):
        self.limits, self.image_token = limits, image_token
        self._one_at_a_time = threading.Lock()

    def __call__(self, request: ChatRequest) -> bytes:
        """The body; `UsageError` where the images of a request have several budgets, which vLLM cannot give."""
        refuse_image_token(request, self.image_token)
        if len(set(request.budgets)) > 1:
            raise UsageError("vLLM takes one budget for all images of a request")
        with self._one_at_a_time:
            left = iter([_png_url(image) for image in images_of(request, self.limits)])
        messages = [
            {**message, "content": [_url_part(part, left) for part in message["content"]]}
            for message in request.messages
        ]
        body = {"model": request.model, "messages": messages, "stream": request.stream, **request.options}
        body["max_tokens"] = request.max_new_tokens
        if request.stream:
            body["stream_options"] = {"include_usage": True}
        if request.budgets and request.budgets[0] is not None:
            body["mm_processor_kwargs"] = {"num_image_tokens": request.budgets[0]}
        return json.dumps(body).encode()


def _png_url(image: Image) -> str:
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def _url_part(part: dict[str, Any], urls: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": next(urls)}} if part["type"] == "image" else part
