"""Questions in, answers out: greedy decoding in left-padded batches, or turn by turn about some images, or none."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TextStreamer

from acformer.data.collate import stack_features
from acformer.data.conversation import Message, encode_prompt, end_tokens
from acformer.data.samples import Sample
from acformer.errors import DataError, UsageError
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.hf.adapters import unwrapped
from acformer.hf.configuration_acformer import context_length
from acformer.hf.visual_token_cache import Features, Source, VisualTokenCache
from acformer.images import load_image


def prompt_inputs(
    processor: AcFormerProcessor,
    prompts: Sequence[Sequence[Message]],
    images: Sequence[Path] = (),
    features: Features | None = None,
    num_visual_tokens: int | None = None,
) -> dict[str, Any]:
    """Model inputs for a batch of prompts, padded on the left so that answers start side by side.

    `images`: those of all prompts in order; none where `visual_tokens` are given to the model beside these
    inputs. `features`: what a frozen encoder made of a path, if known.
    """
    placeholders = processor.count_placeholders(num_visual_tokens)
    rows = [encode_prompt(processor, prompt, num_placeholders=placeholders) for prompt in prompts]
    length = max(len(row) for row in rows)
    pad = processor.tokenizer.pad_token_id
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }
    if num_visual_tokens is not None:
        inputs["num_visual_tokens"] = num_visual_tokens
    if images and features is not None:
        inputs["vision_features"] = stack_features(images, features)
    elif images:
        opened = [load_image(path) for path in images]
        inputs["pixel_values"] = processor.image_processor(opened, return_tensors="pt")["pixel_values"]
    return inputs


def answer(
    model: AcFormerForConditionalGeneration,
    processor: AcFormerProcessor,
    samples: Sequence[Sample],
    *,
    features: Features | None = None,
    num_visual_tokens: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    progress: bool = True,
) -> Iterator[str]:
    """The model's answer to each sample, in order, as it becomes known.

    An image that several questions are about runs through encoder and connector once (`VisualTokenCache`). `features`:
    what a frozen encoder made of a path, if known. The batch does not change the answer (in float32). Errors:
    `ImageError` for an image that cannot be read, `DataError` for a prompt longer than the model's context; an
    evaluation never scores an error as a wrong answer.
    """
    model = unwrapped(model)
    tokens = VisualTokenCache(model, processor, features=features)

    def answers(batch: Sequence[Sample]) -> Iterator[str]:
        inputs = prompt_inputs(processor, [sample.prompt for sample in batch], num_visual_tokens=num_visual_tokens)
        try:
            room = new_tokens(model, inputs, max_new_tokens)
        except UsageError as error:
            raise DataError(f"among {', '.join(sample.id for sample in batch)}: {error}") from error
        if room < max_new_tokens and len(batch) > 1:  # the longest prompt must not cut the others' answers
            for sample in batch:
                yield from answers([sample])
            return
        visual_tokens = tokens([path for sample in batch for path in sample.images], num_visual_tokens)
        options = generation_options(processor, room)
        with torch.inference_mode():
            output = model.generate(**to_device(inputs, model.device), visual_tokens=visual_tokens, **options)
        yield from decode(processor, output[:, inputs["input_ids"].shape[1] :])  # (B, L + new) -> (B, new)

    with tqdm(total=len(samples), desc="answer", unit="q", disable=not progress) as bar:
        for start in range(0, len(samples), batch_size):
            for said in answers(samples[start : start + batch_size]):
                yield said
                bar.update()


def converse(
    model: AcFormerForConditionalGeneration,
    processor: AcFormerProcessor,
    images: Source | Sequence[Source],
    questions: Iterable[str],
    *,
    tokens: VisualTokenCache | None = None,
    num_visual_tokens: int | None = None,
    max_new_tokens: int = 128,
    stream: bool = False,
) -> Iterator[str]:
    """The answers to questions about an image, several or none (`[]`), each a turn of one dialogue.

    The images stand before the first question and are encoded once. A question is asked for when the answer to the one
    before was taken, so `questions` may be someone typing. `tokens` keeps images over several calls. `stream` prints
    each answer word by word as it is made; it ends where the model's context does. Errors: `UsageError` when the
    dialogue alone is longer than that.
    """
    model = unwrapped(model)
    tokens = tokens or VisualTokenCache(model, processor)
    given: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
    visual_tokens = tokens(given, num_visual_tokens)
    messages: list[Message] = []
    for question in questions:
        parts = [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": parts if messages else [*[{"type": "image"}] * len(given), *parts]})
        inputs = prompt_inputs(processor, [messages], num_visual_tokens=num_visual_tokens)
        options = generation_options(processor, new_tokens(model, inputs, max_new_tokens))
        streamer = AnswerStreamer(processor) if stream else None
        with torch.inference_mode():
            output = model.generate(
                **to_device(inputs, model.device), visual_tokens=visual_tokens, **options, streamer=streamer
            )
        (said,) = decode(processor, output[:, inputs["input_ids"].shape[1] :])
        messages.append({"role": "assistant", "content": said})
        yield said


def ask(
    model: AcFormerForConditionalGeneration,
    processor: AcFormerProcessor,
    images: Source | Sequence[Source],
    question: str,
    **options: Any,
) -> str:
    """The answer to one question about an image, several or none; options as `converse`."""
    return next(converse(model, processor, images, [question], **options))


def new_tokens(model: AcFormerForConditionalGeneration, inputs: dict[str, Any], wanted: int) -> int:
    """How many tokens of an answer still fit behind the prompts, `wanted` at most; `UsageError` for none at all."""
    longest, context = int(inputs["attention_mask"].sum(1).max()), context_length(model.config)
    if context is not None and longest >= context:
        raise UsageError(
            f"a prompt of {longest} tokens (images included) does not fit into the model's context of {context}: "
            "shorten it, or take fewer images or visual tokens"
        )
    return wanted if context is None else min(wanted, context - longest)


class AnswerStreamer(TextStreamer):
    """Prints an answer as it is made: what `decode` will give of it."""

    def __init__(self, processor: AcFormerProcessor):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self.num_printed = 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is new."""
        self.text += text
        answer = without_thinking(self.text).lstrip()
        super().on_finalized_text(answer[self.num_printed :], stream_end)
        self.num_printed = len(answer)


def generation_options(processor: AcFormerProcessor, max_new_tokens: int) -> dict[str, Any]:
    """Greedy decoding that ends at any token with which the template ends a turn."""
    return {
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": end_tokens(processor),
        "pad_token_id": processor.tokenizer.pad_token_id,
    }


def decode(processor: AcFormerProcessor, ids: Tensor) -> list[str]:
    """Answers as text, without special tokens, thinking, and the space that some templates put before them."""
    return [without_thinking(text).strip() for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def without_thinking(text: str) -> str:
    """What is said behind `<think>...</think>`; nothing while the block is open."""
    _, closed, answer = text.rpartition("</think>")
    return "" if not closed and text.lstrip().startswith("<think>") else answer


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors, also those one level down, on the device."""
    moved: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            moved[name] = to_device(value, device)
        else:
            moved[name] = value.to(device) if isinstance(value, Tensor) else value
    return moved
