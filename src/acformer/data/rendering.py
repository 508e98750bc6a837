"""Chat templates rendered: in transformers' sandbox, and within limits of time and size.

A template comes with a model, and is code. transformers' sandbox keeps it from the machine; here it cannot run or grow
without end either, and whatever goes wrong in it is one line.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

from acformer.errors import DataError, UsageError

# Every template that is saved first turns content lists into strings: one text serves this package, which passes
# strings, and transformers' own `apply_chat_template` and pipeline, which pass lists.
FLATTEN = r"""
{%- set flat = namespace(messages=[], text='') -%}
{%- for message in messages -%}
    {%- if message['content'] is string or message['content'] is undefined -%}
        {%- set flat.messages = flat.messages + [message] -%}
    {%- else -%}
        {%- set flat.text = '' -%}
        {%- for part in message['content'] -%}
            {%- set flat.text = flat.text + ('<image>\n' if part['type'] == 'image' else part['text']) -%}
        {%- endfor -%}
        {%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""

SECONDS = 5.0
"""Processor time that one rendering may take; a chat of 10,000 turns takes a quarter of a second."""
SIZE = 2**20
"""Characters (or items) that any value of a template may have, beside 16 times those of the chat."""
WIDE = re.compile(r"\d{7}|%\*")
"""A field of millions of characters in a format, or one whose width is an argument."""

Chat = Sequence[dict[str, str]]


def render(tokenizer: Any, template: str, chat: Chat, *, for_answer: bool) -> str:
    """The text of a chat; with `for_answer` the generation prompt at its end.

    Raises:
        DataError: the template refuses this chat.
        UsageError: it is no template, or runs or grows without end.
    """
    compiled = _compiled(template.removeprefix(FLATTEN))  # the contents are strings, and flattening costs their square
    limits = _Limits(template, sum(len(message["content"]) for message in chat))
    known = {"tools": None, "documents": None, **tokenizer.special_tokens_map}
    token = _LIMITS.set(limits)
    try:
        pieces = []
        for piece in compiled.generate(messages=list(chat), add_generation_prompt=for_answer, **known):
            pieces.append(piece)
            limits.written += len(piece)
            limits.check(limits.written)
        return "".join(pieces)
    except _LimitError as error:
        raise UsageError(str(error)) from None
    except Exception as error:  # whatever the code of a template does
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())[:200]
        raise DataError(f"{described(template)} refuses the conversation: {reason}") from error
    finally:
        _LIMITS.reset(token)


def described(template: str) -> str:
    """A template in an error message, by its first words."""
    return f"the chat template {template.removeprefix(FLATTEN).strip()[:60]!r}"


class _LimitError(Exception):
    """Too long or too large."""


class _Limits:
    """What is left to the rendering of one chat."""

    def __init__(self, template: str, size_of_chat: int) -> None:
        self.template = template
        self.size = SIZE + 16 * size_of_chat
        self.deadline = time.thread_time() + SECONDS
        self.written = 0

    def check(self, size: float) -> None:
        """Raises `_LimitError` where `size` is too large or the time is over."""
        if size > self.size:
            raise _LimitError(f"{described(self.template)} makes a text of more than {self.size} characters")
        if time.thread_time() > self.deadline:
            raise _LimitError(f"{described(self.template)} takes longer than {SECONDS:g} s to render a chat")


_LIMITS: ContextVar[_Limits] = ContextVar("limits of the rendering under way")


def _checked(value: Any) -> Any:
    _LIMITS.get().check(len(value) if isinstance(value, str | list | tuple | dict) else 0)
    return value


@pass_context  # a filter that reads the context is not evaluated when the template is compiled
def _checked_filter(context: Any, value: Any) -> Any:
    return _checked(value)


def _within(function: Callable) -> Callable:
    """The filter, which first has its arguments looked at, then its result."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(function.__name__, [*args, *kwargs.values()])
        return _checked(function(*args, **kwargs))

    return call


def _check_arguments(name: str, arguments: list[Any]) -> None:
    """What a method or filter could make much of: large numbers, texts put into texts, formats with a wide field."""
    limits = _LIMITS.get()
    for value in arguments:
        limits.check(value if isinstance(value, int) else 0)
    texts = [value for value in arguments if isinstance(value, str)]
    limits.check(math.prod(len(text) or 1 for text in texts) / 64 if len(texts) > 1 else 0)
    if "format" in name and any(WIDE.search(text) for text in texts):
        limits.check(math.inf)


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' sandbox, in which each loop, call and joining of texts checks the limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, base: Environment):
        tags = [type(extension) for extension in base.extensions.values()]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=tags)
        self.filters = {name: _within(function) for name, function in base.filters.items()}
        self.filters["checked"] = _checked_filter
        self.globals = dict(base.globals)

    def _parse(self, *args: Any) -> nodes.Template:
        return _Checks().visit(super()._parse(*args))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Sizes are checked before the operation where it may multiply them."""
        limits = _LIMITS.get()
        if operator == "*":
            numbers = [value for value in (left, right) if isinstance(value, int)]
            sizes = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
            limits.check(max([0, *sizes]) * max([0, *numbers]))
        elif operator == "**" and isinstance(right, int | float):
            limits.check(abs(right))
        elif operator == "%" and isinstance(left, str):
            _check_arguments("format", [left])
        return _checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Functions, methods and macros: `range`, `ljust`, ..."""
        bound = getattr(function, "__wrapped__", function)  # `str.format` comes wrapped
        receiver = getattr(bound, "__self__", None)
        _check_arguments(getattr(bound, "__name__", ""), [receiver, *args, *kwargs.values()])
        return _checked(super().call(context, function, *args, **kwargs))


class _Checks(NodeTransformer):
    """Adds a check to the start of each loop and macro, and to each joining of texts that is no `+`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Also recursive ones."""
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_check(nodes.Const(0)), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_For

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`~`."""
        return _check(self.generic_visit(node))

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        """`{% set x %}...{% endset %}`."""
        self.generic_visit(node)
        node.filter = _check(node.filter)
        return node


def _check(value: Any) -> nodes.Filter:
    return nodes.Filter(value, "checked", [], [], None, None)


@lru_cache(maxsize=32)
def _compiled(template: str) -> Template:
    try:
        return _Sandbox(_compile_jinja_template("").environment).from_string(template)
    except Exception as error:  # a syntax error, or one nested too deeply
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{described(template)} is not one: {reason}") from error
