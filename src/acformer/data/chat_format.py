"""What a chat template writes around the assistant's words, found by rendering a small dialogue.

Where those words stand in a rendered chat is found by marks: each answer is rendered between two characters that the
chat does not hold, and these are taken out again. So a chat is rendered a fixed number of times, however many turns it
has, and a template may treat its last turn in another way than those before (Qwen3 writes a thinking block there, Phi-3
closes the whole chat with a second end token).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from acformer.data.rendering import Chat, described, render
from acformer.errors import DataError, UsageError

IMAGE_TAG = "<image>"
PRIVATE_USE = range(0x10FFFD, 0x100000, -1)


_ONE_TURN = [{"role": "user", "content": f"{IMAGE_TAG}\nWhat?"}, {"role": "assistant", "content": "This."}]
_TWO_TURNS = [*_ONE_TURN, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
_EXAMPLES = (_TWO_TURNS, [{"role": "system", "content": "Be brief."}, *_TWO_TURNS], _ONE_TURN)
"""Not every template takes a chat without a system message, or with a second turn."""


class Words(NamedTuple):
    """Where in a rendered chat one message of the assistant stands, and where the next one begins."""

    start: int
    stop: int
    following: int


@dataclass(frozen=True)
class ChatFormat:
    """A template of one tokenizer.

    control: id -> what text must not become: special tokens, and added ones that the template writes (`<think>`).
    spelt: finds the first character of every such spelling in a text.
    lead: what stands between the generation prompt and the words of the last turn: the space of `vicuna_v1`.
    ending: finds what may end a turn. ends: the ids of what does.
    """

    control: Mapping[int, str]
    spelt: re.Pattern[str]
    lead: str
    ending: re.Pattern[str]
    ends: frozenset[int]


def check_template(processor: Any) -> None:
    """`UsageError` for a chat template with which no model can be trained: call it before anything is.

    It must write each image once, its generation prompt before every answer, the assistant's words as they are, and an
    end token behind them.
    """
    processor_format(processor)


def processor_format(processor: Any) -> ChatFormat:
    """The format of a processor's template; `UsageError` if it has none, or one that does not fit."""
    if not processor.chat_template:
        raise UsageError("the processor has no chat template; give it one of resolve_template's")
    return chat_format(processor.tokenizer, processor.chat_template)


def chat_format(tokenizer: Any, template: str) -> ChatFormat:
    """The format of a tokenizer and a template; errors as `check_template`."""
    special_tokens = tuple(sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()))
    return _chat_format(tokenizer, template, len(tokenizer), special_tokens)


@lru_cache(maxsize=16)
def _chat_format(tokenizer: Any, template: str, *changes: Any) -> ChatFormat:
    """`changes`: what of a tokenizer may change while it stays the same object."""
    control = {
        index: token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in template and not token.content.isspace())
    }
    ending = re.compile(_any_of(token for token in control.values() if token != IMAGE_TAG))
    chat, text, words = _example(tokenizer, template)
    if text.count(IMAGE_TAG) != 1:
        raise UsageError(f"{described(template)} writes {text.count(IMAGE_TAG)} image tokens for one image")
    start = words[-1].start
    prompt = render(tokenizer, template, chat[:-1], for_answer=True)
    check_prompt(template, prompt, text, start)
    found = [ending.search(text, stop, following) for _, stop, following in words]
    tokens = [match.group() for match in found if match]
    if len(tokens) < len(words):
        raise UsageError(f"{described(template)} writes no end token, so the model would never stop")
    ends = frozenset(index for index, token in control.items() if token in tokens)
    spelt = re.compile(f"(?={_any_of(token for token in control.values() if len(token) > 1)})(.)", re.DOTALL)
    return ChatFormat(control, spelt, text[len(prompt) : start], ending, ends)


def _any_of(tokens: Iterable[str]) -> str:
    """A pattern, in which a token comes before those that it begins with."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)"


def _example(tokenizer: Any, template: str) -> tuple[Chat, str, list[Words]]:
    """The first of the examples that the template takes, rendered."""
    marks = chr(PRIVATE_USE[0]) + chr(PRIVATE_USE[1])
    reasons = []
    for chat in _EXAMPLES:
        try:
            return chat, *locate_answers(tokenizer, template, chat, marks, for_answer=False)
        except DataError as error:
            reasons.append(str(error))
    raise UsageError(reasons[0])


def locate_answers(
    tokenizer: Any, template: str, chat: Chat, marks: str, *, for_answer: bool
) -> tuple[str, list[Words]]:
    """The rendered chat, and where in it the assistant's words stand.

    marks: two characters that are not in the chat.

    Raises:
        UsageError: the template leaves the content out, repeats or changes it, other than by trimming.
    """
    text = render(tokenizer, template, chat, for_answer=for_answer)
    count = sum(message["role"] == "assistant" for message in chat)
    if not count:
        return text, []
    for mark in (_around, _inside):  # inside of white space, for templates that trim
        marked = [{**m, "content": mark(m["content"], marks)} if m["role"] == "assistant" else m for m in chat]
        pieces = re.split(f"[{marks}]", render(tokenizer, template, marked, for_answer=for_answer))
        if len(pieces) == 2 * count + 1 and "".join(pieces) == text:
            ends = [*accumulate(map(len, pieces))]
            return text, [Words(*ends[place : place + 3]) for place in range(0, 2 * count, 2)]
    raise UsageError(f"{described(template)} changes what the assistant says, so that no label is safe")


def _around(content: str, marks: str) -> str:
    return f"{marks[0]}{content}{marks[1]}"


def _inside(content: str, marks: str) -> str:
    words = content.strip()
    start = content.index(words)
    return f"{content[:start]}{marks[0]}{words}{marks[1]}{content[start + len(words) :]}"


def check_prompt(template: str, prompt: str, text: str, start: int) -> None:
    """`UsageError` unless `text` begins with the prompt of its last answer, whose words start at `start`."""
    if not text.startswith(prompt) or len(prompt) > start:
        raise UsageError(
            f"{described(template)} rewrites the prompt once the answer is there, so that no label is safe; "
            "take vicuna_v1 or another template of the package"
        )
