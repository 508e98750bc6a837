"""Chat messages -> token ids and labels: the one place that renders, tokenises and masks.

A conversation is `[{"role": "system"|"user"|"assistant", "content": str | parts}]`, where a part is
`{"type": "image"}` or `{"type": "text", "text": ...}`. The chat is rendered and tokenised once. Labels follow
from character spans, found by asking the template: what it writes before a turn of the assistant (with the
generation prompt) is the prompt, what it writes from there to the end token is what the model must say.

Text that spells a special token is text. One private-use character that the chat does not hold (the gap) goes
behind the first letter of every such spelling before rendering, and the gap's tokens are dropped after
tokenising: `</s>` becomes the ids of `<` and `/s>`, and decodes to the original. The same gap keeps prompt
and answer apart where a tokenizer would merge across (a newline on both sides), so that the ids of a prompt
are a prefix of the ids of the conversation.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

from jinja2 import TemplateError

from acformer.data.templates import FLATTEN, TEMPLATES
from acformer.errors import DataError, UsageError

IGNORE = -100  # the label that the loss skips
IMAGE_TAG = "<image>"

Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """One conversation; `labels` are the ids of the assistant's words and end tokens, elsewhere -100."""

    input_ids: list[int]
    labels: list[int]
    num_images: int


def check_images(messages: Sequence[Message], num_images: int) -> None:
    """`DataError` with both counts unless `messages` hold as many image parts as there are images."""
    tags = sum(len(split_at_images(message)) - 1 for message in messages)
    if tags != num_images:
        counts = [f"{n} {what}{'' if n == 1 else 's'}" for n, what in ((tags, "<image> tag"), (num_images, "image"))]
        raise DataError(" but ".join(counts))


def split_at_images(message: Message) -> list[str]:
    """The text before, between and after the images of a message; `DataError` if it is malformed."""
    match message:
        case {"role": "system" | "user" | "assistant", "content": str(text)}:
            return [text]
        case {"role": "system" | "user" | "assistant", "content": list(parts) | tuple(parts)}:
            texts = [""]
        case _:
            raise DataError(f"a message is role (system, user, assistant) and content: {str(message)[:80]!r}")
    for part in parts:
        match part:
            case {"type": "image"}:
                texts.append("")
            case {"type": "text", "text": str(text)}:
                texts[-1] += text
            case _:
                raise DataError(f"a part of a message is an image or a text: {str(part)[:80]!r}")
    return texts


def encode_conversation(
    processor: Any,
    messages: Sequence[Message],
    *,
    max_length: int | None = None,
    num_placeholders: int | None = None,
) -> Encoded:
    """The ids of a whole conversation, with only the assistant's words and end tokens as labels.

    Each image becomes `num_placeholders` (default: the processor's) ids of `processor.image_token_id`.
    Decoding the labels gives what the template makes of the assistant's text, and the end token
    (`tokenizer.eos_token`, else the first special token that the template writes after the text).

    Errors: `DataError` for malformed messages, when `max_length` would cut off an image token, or when
    nothing supervised is left; `UsageError` when the template does not fit (no prefix property, no end token,
    images left out).
    """
    input_ids, labels, num_images = _encode(processor, messages, num_placeholders, for_answer=False)
    if max_length is not None and processor.image_token_id in input_ids[max_length:]:
        raise DataError(f"max_length {max_length} cuts off image tokens ({len(input_ids)} tokens in all)")
    encoded = Encoded(input_ids[:max_length], labels[:max_length], num_images)
    if all(label == IGNORE for label in encoded.labels):
        within = "" if max_length is None else f" within max_length {max_length}"
        raise DataError(f"no word of the assistant to learn{within} ({len(input_ids)} tokens)")
    return encoded


def encode_prompt(processor: Any, messages: Sequence[Message], *, num_placeholders: int | None = None) -> list[int]:
    """The ids to generate an answer to `messages` from, with the generation prompt.

    They are a prefix of what `encode_conversation` makes of `messages` and the answer. Errors: as there, and
    `DataError` when the last message is the assistant's.
    """
    input_ids, *_ = _encode(processor, messages, num_placeholders, for_answer=True)
    if messages[-1]["role"] == "assistant":
        raise DataError("a prompt cannot end with the assistant's turn")
    return input_ids


def _encode(
    processor: Any, messages: Sequence[Message], num_placeholders: int | None, *, for_answer: bool
) -> tuple[list[int], list[int], int]:
    per_image = processor.num_placeholders if num_placeholders is None else num_placeholders
    control = _control_tokens(processor)
    chat, gap, num_images = _flatten(messages, control.values())
    text = _render(processor, chat, for_answer)
    spans = _spoken_spans(processor, chat, text, control.values())
    tokens = _tokenise(processor.tokenizer, text, control)
    begins = {begin for _, begin, _ in tokens}
    if crossed := [start for start, _ in spans if start not in begins]:
        text, spans = _with_gaps(text, spans, crossed, gap)
        tokens = _tokenise(processor.tokenizer, text, control)
    edges = list(chain.from_iterable(spans))
    input_ids: list[int] = []
    labels: list[int] = []
    for index, begin, end in tokens:
        if text[begin:end] != gap:
            is_image = index == processor.image_token_id
            spoken = bisect_right(edges, begin) % 2 == 1 and not is_image
            input_ids += [index] * (per_image if is_image else 1)
            labels += [index if spoken else IGNORE] * (per_image if is_image else 1)
    if (written := input_ids.count(processor.image_token_id)) != num_images * per_image:
        name = _template_name(processor)
        raise UsageError(f"{name} writes {written} image tokens, not {num_images} images x {per_image}")
    return input_ids, labels, num_images


def _control_tokens(processor: Any) -> dict[int, str]:
    """What text must not become: special tokens, and added ones that the template writes (`<think>`)."""
    if not processor.chat_template:
        raise UsageError("the processor has no chat template; give it one of resolve_template's")
    return {
        index: token.content
        for index, token in processor.tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in processor.chat_template and not token.content.isspace())
    }


def _flatten(messages: Sequence[Message], control: Iterable[str]) -> tuple[list[dict[str, Any]], str, int]:
    """The messages with string contents and spelt control tokens broken; the gap; the number of images."""
    contents = [split_at_images(message) for message in messages]
    if not messages or messages[0]["role"] == "assistant":
        raise DataError("a conversation starts with a message of the user or system")
    everything = "".join(chain.from_iterable(contents))
    try:
        everything.encode()
    except UnicodeEncodeError:
        raise DataError("the text holds a lone surrogate, which is not a character") from None
    gap = next(char for char in map(chr, range(0x10FFFD, 0x100000, -1)) if char not in everything)
    spellings = "|".join(re.escape(token) for token in control if len(token) > 1)
    spelt = re.compile(f"(?={spellings})(.)", re.DOTALL)
    broken = [f"{IMAGE_TAG}\n".join(spelt.sub(rf"\1{gap}", text) for text in texts) for texts in contents]
    chat = [{"role": m["role"], "content": text} for m, text in zip(messages, broken, strict=True)]
    return chat, gap, sum(len(texts) - 1 for texts in contents)


def _render(processor: Any, chat: list[dict], for_answer: bool) -> str:
    try:
        return processor.tokenizer.apply_chat_template(
            chat, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=for_answer
        )
    except TemplateError as error:
        raise DataError(f"{_template_name(processor)} refuses the conversation: {error}") from error


def _template_name(processor: Any) -> str:
    """For error messages: the template's name, or the first words of one that has none."""
    names = [name for name, text in TEMPLATES.items() if text == processor.chat_template]
    own = processor.chat_template.removeprefix(FLATTEN).strip()[:60]
    return f"the chat template {names[0] if names else own!r}"


def _spoken_spans(processor: Any, chat: list[dict], text: str, control: Iterable[str]) -> list[Span]:
    """Where in `text` the assistant's words stand, each span with its end token."""
    spans = []
    for index, message in enumerate(chat):
        if message["role"] == "assistant":
            head = _render(processor, chat[:index], True)
            turn = _render(processor, chat[: index + 1], False)
            turn = turn[: _end_of_turn(processor, turn, len(head), control)]
            if not (turn.startswith(head) and text.startswith(turn)):
                why = "rewrites what it wrote once the next turn is there, so that no label is safe"
                raise UsageError(f"{_template_name(processor)} {why}; valid: {', '.join(TEMPLATES)}")
            spans.append((len(head), len(turn)))
    return spans


def _end_of_turn(processor: Any, turn: str, start: int, control: Iterable[str]) -> int:
    """The position behind the end token: the tokenizer's, else the first control token after `start`."""
    for ends in [processor.tokenizer.eos_token], [token for token in control if token != IMAGE_TAG]:
        end = re.compile("|".join(re.escape(token) for token in ends if token) or "(?!)")
        if found := end.search(turn, start):
            return found.end()
    raise UsageError(f"{_template_name(processor)} writes no end token, so the model would never stop")


def _tokenise(tokenizer: Any, text: str, control: dict[int, str]) -> list[tuple[int, int, int]]:
    """(id, start, end) of each token, with the spaces that byte-level tokenizers trim off the offsets."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    for index, (start, end) in zip(ids, offsets, strict=True):
        if index in control and text[start:end].strip() != control[index]:
            raise DataError(f"the tokenizer reads the text {text[start:end]!r} as {control[index]!r}")
    begins = (min(start, before) for (_, before), (start, _) in pairwise([(0, 0), *offsets]))
    return list(zip(ids, begins, (end for _, end in offsets), strict=True))


def _with_gaps(text: str, spans: list[Span], crossed: list[int], gap: str) -> tuple[str, list[Span]]:
    """`text` with the gap at each of the `crossed` positions, and the spans moved along."""
    pieces = [text[a:b] for a, b in pairwise([0, *crossed, len(text)])]
    moved = [(a + sum(at < a for at in crossed), b + sum(at < b for at in crossed)) for a, b in spans]
    return gap.join(pieces), moved
