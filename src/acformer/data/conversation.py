"""Chat messages -> token ids and labels: the one place that renders, tokenises and masks.

A conversation is `[{"role": "system"|"user"|"assistant", "content": str | parts}]`, where a part is
`{"type": "image"}` or `{"type": "text", "text": ...}`. The chat is rendered and tokenised once. Labels follow
from character spans: what the template writes from the generation prompt to the end token (see `chat_format`) is what
the model must say.

Text that spells a special token is text. One private-use character that the chat does not hold (the gap) goes
behind the first letter of every such spelling before rendering, and the gap's tokens are dropped after
tokenising: `</s>` becomes the ids of `<` and `/s>`, and decodes to the original. The same gap keeps prompt
and answer apart where a tokenizer would merge across (a newline on both sides), so that the ids of a prompt
are a prefix of the ids of the conversation.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any

from acformer.data.chat_format import (
    IMAGE_TAG,
    PRIVATE_USE,
    ChatFormat,
    check_prompt,
    locate_answers,
    processor_format,
)
from acformer.data.rendering import Chat, described, render
from acformer.errors import DataError, UsageError

IGNORE = -100  # the label that the loss skips

Message = Mapping[str, Any]
Span = tuple[int, int]
Token = tuple[int, int, int]


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
    Decoding the labels gives what the template makes of the assistant's text, and the end token (the first special
    token that the template writes after the text).

    Errors: `DataError` for malformed messages, when `max_length` would cut off an image token, or when
    nothing supervised is left; `UsageError` when the template does not fit (see `check_template`).
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


def end_tokens(processor: Any) -> list[int]:
    """The ids at which generation must stop: the tokenizer's end token, and all with which the template ends a turn."""
    own = processor.tokenizer.eos_token_id
    return sorted({*processor_format(processor).ends, *([] if own is None else [own])})


def _encode(
    processor: Any, messages: Sequence[Message], num_placeholders: int | None, *, for_answer: bool
) -> tuple[list[int], list[int], int]:
    per_image = processor.num_placeholders if num_placeholders is None else num_placeholders
    known = processor_format(processor)
    chat, marks, num_images = _chat_of(messages, known)
    text, spans = _supervised_spans(processor, known, chat, marks[1:], for_answer)
    tokens = _tokenise(processor.tokenizer, text, known.control)
    begins = {begin for _, begin, _ in tokens}
    if crossed := [start for start, _ in spans if start not in begins]:
        text, spans = _with_gaps(text, spans, crossed, marks[0])
        tokens = _tokenise(processor.tokenizer, text, known.control)
    tokens = _as_prompts(processor.tokenizer, text, [start for start, _ in spans], tokens, known.control)
    edges = list(chain.from_iterable(spans))
    input_ids: list[int] = []
    labels: list[int] = []
    for index, begin, end in tokens:
        if text[begin:end] != marks[0]:
            is_image = index == processor.image_token_id
            is_supervised = bisect_right(edges, begin) % 2 == 1 and not is_image
            input_ids += [index] * (per_image if is_image else 1)
            labels += [index if is_supervised else IGNORE] * (per_image if is_image else 1)
    if (written := input_ids.count(processor.image_token_id)) != num_images * per_image:
        name = described(processor.chat_template)
        raise UsageError(f"{name} writes {written} image tokens, not {num_images} images x {per_image}")
    return input_ids, labels, num_images


def _chat_of(messages: Sequence[Message], known: ChatFormat) -> tuple[Chat, str, int]:
    """The messages with string contents and spelt control tokens broken; gap and marks; the number of images."""
    contents = [split_at_images(message) for message in messages]
    if not messages or messages[0]["role"] == "assistant":
        raise DataError("a conversation starts with a message of the user or system")
    everything = set(chain.from_iterable(chain.from_iterable(contents)))
    if any("\ud800" <= char <= "\udfff" for char in everything):
        raise DataError("the text holds a lone surrogate, which is not a character")
    marks = "".join(islice((char for char in map(chr, PRIVATE_USE) if char not in everything), 3))
    if len(marks) < 3:
        raise DataError("the text holds every private-use character, of which three are needed to keep its parts apart")
    broken = [f"{IMAGE_TAG}\n".join(known.spelt.sub(rf"\1{marks[0]}", text) for text in texts) for texts in contents]
    chat = [{"role": m["role"], "content": text} for m, text in zip(messages, broken, strict=True)]
    return chat, marks, sum(len(texts) - 1 for texts in contents)


def _supervised_spans(
    processor: Any, known: ChatFormat, chat: Chat, marks: str, for_answer: bool
) -> tuple[str, list[Span]]:
    """The rendered chat, and where in it the assistant's words stand, each span with its lead and end token."""
    tokenizer, template = processor.tokenizer, processor.chat_template
    text, words = locate_answers(tokenizer, template, chat, marks, for_answer=for_answer)
    spans = []
    for start, stop, following in words:
        end = known.ending.search(text, stop, following)
        if end is None:
            raise UsageError(f"{described(template)} writes no end token behind a turn, so the model would never stop")
        led = text.endswith(known.lead, 0, start)  # a template may write it before its last turn alone
        spans.append((start - len(known.lead) if led else start, end.end()))
    if spans and not for_answer:
        last = max(index for index, message in enumerate(chat) if message["role"] == "assistant")
        prompt = render(tokenizer, template, chat[:last], for_answer=True)
        check_prompt(template, prompt, text, words[-1].start)
    return text, spans


def _tokenise(tokenizer: Any, text: str, control: Mapping[int, str]) -> list[Token]:
    """(id, start, end) of each token, with the spaces that byte-level tokenizers trim off the offsets."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    for index, (start, end) in zip(ids, offsets, strict=True):
        if index in control and text[start:end].strip() != control[index]:
            raise DataError(f"the tokenizer reads the text {text[start:end]!r} as {control[index]!r}")
    begins = (min(start, before) for (_, before), (start, _) in pairwise([(0, 0), *offsets]))
    return list(zip(ids, begins, (end for _, end in offsets), strict=True))


def _as_prompts(
    tokenizer: Any, text: str, starts: list[int], tokens: list[Token], control: Mapping[int, str]
) -> list[Token]:
    """The tokens before each start as they are where the text ends there.

    White space is split in another way before a word than at the end of a text (GPT-2's `\\s+(?!\\S)`), so the end of
    such a prompt is tokenised alone, from its last control token on.
    """
    begins = [begin for _, begin, _ in tokens]
    kept, done = [], 0
    for start in starts:
        if text[max(start - 2, 0) : start].isspace():
            place = bisect_left(begins, start)
            first = next((i for i in range(place - 1, done - 1, -1) if tokens[i][0] in control), done)
            at = begins[first] if first < place else start
            alone = _tokenise(tokenizer, text[at:start], control)
            kept += tokens[done:first] + [(index, at + begin, at + end) for index, begin, end in alone]
            done = place
    return kept + tokens[done:]


def _with_gaps(text: str, spans: list[Span], crossed: list[int], gap: str) -> tuple[str, list[Span]]:
    """`text` with the gap at each of the `crossed` positions (in order), and the spans moved along."""
    pieces = [text[a:b] for a, b in pairwise([0, *crossed, len(text)])]
    moved = [(a + bisect_left(crossed, a), b + bisect_left(crossed, b)) for a, b in spans]
    return gap.join(pieces), moved
