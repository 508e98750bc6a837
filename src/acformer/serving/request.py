"""What a client may ask of `/v1/chat/completions`: read from the body, checked field by field before anything is paid.

The same for both engines. What OpenAI's interface has and a model here cannot do is refused by name; an option that
changes nothing (`user`, `n: 1`) is taken. A budget comes as `mm_processor_kwargs` or as `detail` of an image.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from acformer.errors import UsageError
from acformer.hf.budgets import Budgets, per_image, take_request
from acformer.images import DEFAULT_LIMITS, ImageLimits

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
WITHOUT_EFFECT = {
    "user": (),
    "metadata": (),
    "store": (),
    "service_tier": (),
    "safety_identifier": (),
    "prompt_cache_key": (),
    "stream_options": (),
    "n": (1,),
    "logprobs": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
}
"""Fields that are read over: with any value, or with those named alone."""


@dataclass(frozen=True)
class Limits:
    """What one request may cost, and how many may wait.

    max_body: bytes of a request. max_images: in a request. max_new_tokens: of an answer, and what is taken where a
    request says nothing. max_queue: chats that are read, wait or run at once. read_seconds: for a body to arrive.
    image: of each image. allow_hosts: from which images may be fetched, `host` or `host:port`; none: data: URLs alone.
    """

    max_body: int = 32 * 2**20
    max_images: int = 8
    max_new_tokens: int = 512
    max_queue: int = 64
    read_seconds: float = 30.0
    image: ImageLimits = DEFAULT_LIMITS
    allow_hosts: tuple[str, ...] = ()


class RefusedError(Exception):
    """A request that is answered with an error: status, sentence, the field that it is about, a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> bytes:
        """In OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        said = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": said}).encode()


@dataclass
class ChatRequest:
    """A checked request.

    messages: role and parts, `{"type": "image"}` or `{"type": "text", "text": ...}`. images: their URLs, in order, and
    `places`, where in the body they stand. budgets: T of each; None where the prompt does not tell the model's own.
    options: temperature, top_p, seed, stop, as they were given. inputs: what the model is called with, once prepared.
    """

    model: str
    messages: list[dict[str, Any]]
    images: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    budgets: list[int | None] = field(default_factory=list)
    stream: bool = False
    max_new_tokens: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Any = None


def parse(body: bytes, model: str, limits: Limits, sizes: Budgets, default_budget: int | None = None) -> ChatRequest:
    """The request of a body.

    Args:
        body: JSON.
        model: the name under which the model is served.
        limits, sizes: what it may cost; what the connector can give.
        default_budget: T of an image for which the request names none, where it is not the model's own.

    Raises:
        RefusedError: anything that is not as it must be.
    """
    given = {key: value for key, value in _json(body).items() if value is not None}
    asked = given.pop("model", model)
    if asked != model:
        raise RefusedError(404, f"there is no model of that name here, only {model!r}", "model", "model_not_found")
    messages = given.pop("messages", None)
    if not isinstance(messages, list) or not 1 <= len(messages) <= 1000:
        raise RefusedError(400, "messages is a list of 1 to 1000 messages", "messages")
    request, details = ChatRequest(model, []), list[Any]()
    for number, message in enumerate(messages):
        request.messages.append(_message(message, f"messages[{number}]", request, details, limits))
    if request.messages[-1]["role"] != "user":
        raise RefusedError(400, "the last message must be the user's", "messages")
    request.budgets = _budgets(given.pop("mm_processor_kwargs", None), details, sizes, default_budget)
    request.stream = _checked(given, "stream", False, lambda value: isinstance(value, bool), "true or false")
    request.max_new_tokens = _max_new_tokens(given, limits)
    request.options = _options(given)
    for name, value in given.items():
        if name not in WITHOUT_EFFECT:
            raise RefusedError(400, f"unknown or unsupported field {name!r}"[:200], name[:100])
        if WITHOUT_EFFECT[name] and value not in WITHOUT_EFFECT[name]:
            raise RefusedError(400, f"{name} is not supported with this value", name)
    return request


def _json(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "the body is not JSON") from error
    if not isinstance(given, dict):
        raise RefusedError(400, "the body is not a JSON object")
    return given


def _no_number(text: str) -> None:
    raise ValueError(text)


def _message(message: Any, where: str, request: ChatRequest, details: list, limits: Limits) -> dict[str, Any]:
    """Its role and parts; images go into `request`, what they say of their detail into `details`."""
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise RefusedError(400, f"a message has a role, one of {', '.join(ROLES)}, and content", where)
    role, content = ROLES[message["role"]], message.get("content")
    if message.get("tool_calls") or not isinstance(content, str | list):
        raise RefusedError(400, "content is a text or a list of parts", f"{where}.content")
    if isinstance(content, str):
        return {"role": role, "content": [{"type": "text", "text": _text(content, f"{where}.content")}]}
    parts = []
    for number, part in enumerate(content):
        place = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            parts.append({"type": "text", "text": _text(part.get("text"), place)})
        elif kind == "image_url" and role == "user":
            url, detail = _image(part.get("image_url"), place, limits)
            request.images.append(url)
            request.places.append(place)
            details.append(detail)
            parts.append({"type": "image"})
        else:
            raise RefusedError(400, "a part is a text or, of the user's, an image_url", place)
        if len(request.images) > limits.max_images:
            raise RefusedError(400, f"more than {limits.max_images} images in a request", place, "too_many_images")
    return {"role": role, "content": parts}


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise RefusedError(400, "text is a string", where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(400, "text holds half of a surrogate pair", where) from error
    return text


def _image(value: Any, where: str, limits: Limits) -> tuple[str, Any]:
    given = {"url": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not isinstance(given.get("url"), str):
        raise RefusedError(400, "image_url has a url", where)
    url = given["url"]
    if url[:5].lower() == "data:":
        return url, given.get("detail")
    if not url.lower().startswith(("http://", "https://")):
        raise RefusedError(400, "an image is a data:image/...;base64, URL; files are not read", where)
    if not limits.allow_hosts:
        raise RefusedError(400, "this server fetches no images: send a data:image/...;base64, URL", where)
    return url, given.get("detail")


def _budgets(options: Any, details: list, sizes: Budgets, default: int | None) -> list[int | None]:
    """T of each image: by its detail, by the request's number, by the server's."""
    if options is not None and not isinstance(options, Mapping):
        raise RefusedError(400, "mm_processor_kwargs is an object", "mm_processor_kwargs")
    rest = dict(options or {})
    try:
        name, value = take_request(rest) or ("num_image_tokens", None)
        if rest.pop("images_kwargs", None) or rest:
            raise UsageError(f"{next(iter(rest), 'images_kwargs')!r} is not an option of a request")
        wanted = [(name, one) for one in per_image(value, len(details), name)]
        if not details and value is not None and not isinstance(value, list):
            sizes.of(name, value)
    except UsageError as error:
        raise RefusedError(400, str(error)[:300], "mm_processor_kwargs") from error
    found: list[int | None] = []
    for (name, value), detail in zip(wanted, details, strict=True):
        try:
            if detail not in (None, "auto"):
                if value is not None:
                    raise UsageError("give mm_processor_kwargs or detail, not both")
                name, value = "detail", detail
            if value is None and default is not None:
                found.append(default)
                continue
            resolved = sizes.of(name, value)
        except UsageError as error:
            raise RefusedError(400, str(error)[:300], "mm_processor_kwargs") from error
        found.append(sizes.own if resolved is None else resolved)
    return found


def _max_new_tokens(given: dict[str, Any], limits: Limits) -> int:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    values = [given.pop(name) for name in names]
    if not values:
        return limits.max_new_tokens
    if not _is_int(values[0]) or not 1 <= values[0] <= limits.max_new_tokens:
        raise RefusedError(400, f"{names[0]} is a whole number from 1 to {limits.max_new_tokens}", names[0])
    return values[0]


def _options(given: dict[str, Any]) -> dict[str, Any]:
    def stops(value: Any) -> bool:
        rows = [value] if isinstance(value, str) else value
        return isinstance(rows, list) and len(rows) <= 4 and all(isinstance(r, str) and 0 < len(r) <= 64 for r in rows)

    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "temperature": (lambda value: _is_number(value) and 0 <= value <= 2, "a number from 0 to 2"),
        "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0, up to 1"),
        "seed": (lambda value: _is_int(value) and abs(value) < 2**63, "a whole number"),
        "stop": (stops, "one to four texts of up to 64 characters"),
    }
    return {name: _checked(given, name, None, *check) for name, check in checks.items() if name in given}


def _checked(given: dict[str, Any], name: str, default: Any, is_right: Callable[[Any], bool], what: str) -> Any:
    value = given.pop(name, default)
    if not is_right(value):
        raise RefusedError(400, f"{name} is {what}", name)
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
