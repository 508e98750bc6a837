"""One record -> one `Sample`, whichever of the known layouts it has.

LLaVA's (`image`, `conversations` of from/value, `<image>` tags in the text), chat messages (`images`, `messages` of
role/content), the_cauldron's (`images`, `texts` of user/assistant). Images are names of files, their bytes, or both as
`datasets` stores them. Video and sound are refused by name.
"""

import json
from collections import Counter
from typing import Any

from acformer.data.chat_format import IMAGE_TAG
from acformer.data.conversation import check_images, split_at_images
from acformer.data.image_root import ImageRoot
from acformer.data.samples import ImageReference, Sample
from acformer.errors import DataError
from acformer.images import data_url_bytes

SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
OTHER_MEDIA = ("video", "videos", "audio", "audios", "sound", "sounds")
"""Keys of records that are about more than images; a model of ours reads none of it."""
LAYOUTS = ("conversations", "messages", "texts")
"""Every record has one of these."""
COLUMNS = (*LAYOUTS, *OTHER_MEDIA, "image", "images", "id", "answer", "answers", "kind", "system", "system_prompt")
"""All that is read of a table."""


def as_sample(record: Any, file: str, number: int, images_in: ImageRoot) -> Sample:
    """A checked `Sample`, or the `DataError` that says what is wrong with the record.

    file, number: where the record is from. images_in: where the names of images lead.
    """
    if heard := [key for key in OTHER_MEDIA if isinstance(record, dict) and record.get(key)]:
        raise DataError(f"holds {heard[0]}, which is neither text nor an image")
    images = _images(record, images_in)
    match record:
        case {"messages": [_, *_] as turns}:
            messages, images = _chat_messages(turns, images, images_in)
        case {"conversations": [{"role": _, "content": _}, *_] as turns}:
            messages, images = _chat_messages(turns, images, images_in)
        case {"conversations": [_, *_] as turns}:
            messages = [_llava_message(turn) for turn in _from_the_first_question(turns)]
        case {"texts": [_, *_] as turns}:
            messages = _cauldron_messages(turns, len(images))
        case dict():
            has = ", ".join(map(str, record)) or "nothing"
            inner = [key for key, value in record.items() if isinstance(value, list) and value]
            hint = f"; if the list under {inner[0]!r} holds the records, put it into a file of its own" if inner else ""
            raise DataError(f"a record is an object with one of {', '.join(LAYOUTS)}; this one has {has[:200]}{hint}")
        case _:
            raise DataError(f"a record is an object with one of {', '.join(LAYOUTS)}")
    messages = _with_system_prompt(record, messages)
    check_images(messages, len(images))
    said = ["".join(split_at_images(message)) for message in messages if message["role"] == "assistant"]
    _check_characters(record, messages)
    kind, key, answer = record.get("kind"), record.get("id"), record.get("answer")
    if answer is None and record.get("answers"):
        answer = _most_frequent(record["answers"])
    key = f"{_stem(file)}:{number}" if key is None else key
    if answer is None:
        answer = said[-1] if said else None
    elif type(answer) in (int, float):
        answer = str(answer)
    if not isinstance(kind, str | None) or not isinstance(answer, str | None) or not isinstance(key, str | int):
        raise DataError("id, kind and answer must be text")
    return Sample(str(key), tuple(messages), tuple(images), answer, kind, file, number)


def _most_frequent(answers: Any) -> str:
    """Of what several people answered, as VQA has it (text, or objects with `answer`); of equal ones the first."""
    listed = answers if isinstance(answers, list) else [None]
    given = [one.get("answer") if isinstance(one, dict) else one for one in listed]
    if not all(isinstance(one, str | int | float) for one in given):
        raise DataError("answers must be a list of texts, or of objects with an answer")
    return Counter(map(str, given)).most_common(1)[0][0]


def _stem(file: str) -> str:
    return file.rpartition("/")[2].partition(".")[0]


def _check_characters(record: dict[str, Any], messages: list[Any]) -> None:
    texts = [messages, *(record.get(key) for key in ("id", "kind", "answer"))]
    try:
        json.dumps(texts, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError("holds a lone surrogate, which is not a character") from None


def _with_system_prompt(record: dict[str, Any], messages: list[Any]) -> list[Any]:
    """The record's own `system` or `system_prompt` as the first message, unless the messages begin with one."""
    prompt = record.get("system") or record.get("system_prompt")
    if not prompt:
        return messages
    if not isinstance(prompt, str):
        raise DataError(f"a system prompt must be text: {str(prompt)[:80]}")
    begins = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    return messages if begins else [{"role": "system", "content": prompt}, *messages]


def _chat_messages(
    turns: list[Any], images: list[ImageReference], images_in: ImageRoot
) -> tuple[list[Any], list[ImageReference]]:
    """Chat messages, and the images that they are about.

    Image parts may name their images themselves; where there are none, `<image>` tags in a user's text are read as
    LLaVA's are. A table's parts all have the same columns, empty where they say nothing.
    """
    turns = [_with_plain_parts(turn) for turn in turns]
    parts = [part for turn in turns if isinstance(turn, dict) for part in _parts(turn.get("content"))]
    if any(part.get("type") == "image" for part in parts):
        own = [_named_image(part) for part in parts if part.get("type") == "image"]
        found = [_image(name, images_in) for name in own if name is not None]
        if found and images:
            raise DataError("images are named in the record and in the parts of its messages")
        if found and len(found) < len(own):
            raise DataError("some image parts name their image and others do not")
        return turns, images or found
    return ([_tagged_message(turn) for turn in turns] if images else turns), images


def _with_plain_parts(turn: Any) -> Any:
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
        return turn
    return {**turn, "content": [_plain_part(part) if isinstance(part, dict) else part for part in turn["content"]]}


def _plain_part(part: dict[str, Any]) -> dict[str, Any]:
    """A part without empty columns; OpenAI's `image_url` as an image that is named."""
    match {key: value for key, value in part.items() if value is not None}:
        case {"type": "image_url", "image_url": str(url) | {"url": str(url)}}:
            return {"type": "image", "url": url}
        case plain:
            return plain


def _parts(content: Any) -> list[dict[str, Any]]:
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _named_image(part: dict[str, Any]) -> Any:
    """The image of a part: under `image`, `path` or `url`, as chat formats have it."""
    named = [part[key] for key in ("image", "path", "url") if isinstance(part.get(key), str | bytes | dict)]
    return named[0] if named else None


def _tagged_message(turn: Any) -> Any:
    """A chat message whose text holds `<image>` tags, with parts in their places."""
    match turn:
        case {"role": "user", "content": str(text)} if IMAGE_TAG in text:
            return _llava_message({"from": "human", "value": text})
        case _:
            return turn


def _from_the_first_question(turns: list[Any]) -> list[Any]:
    """Without turns of the assistant that answer nothing: LLaVA leaves them out, too."""
    for place, turn in enumerate(turns):
        if not (isinstance(turn, dict) and SPEAKERS.get(str(turn.get("from"))) == "assistant"):
            return turns[place:]
    raise DataError("a conversation in which only the assistant speaks")


def _llava_message(turn: Any) -> dict[str, Any]:
    """A turn of LLaVA's; the `<image>` tags of a user become parts.

    As in LLaVA, a single tag goes to the front of its turn; several stay where they are. The newline behind a
    tag is dropped since the chat template writes it.
    """
    match turn:
        case {"from": str(speaker), "value": str(text)} if speaker in SPEAKERS:
            role = SPEAKERS[speaker]
        case _:
            raise DataError(f"a turn is not from ({', '.join(SPEAKERS)}) and value: {str(turn)[:80]}")
    texts = text.split(IMAGE_TAG)
    if role != "user" or len(texts) == 1:
        return {"role": role, "content": text}
    if len(texts) == 2:
        texts = ["", "".join(texts).strip()]
    parts = [{"type": "text", "text": texts[0]}]
    for text in texts[1:]:
        parts += [{"type": "image"}, {"type": "text", "text": text.removeprefix("\n")}]
    return {"role": role, "content": [part for part in parts if part.get("text") != ""]}


def _cauldron_messages(turns: list[Any], num_images: int) -> list[dict[str, Any]]:
    """Pairs of user and assistant; all images stand before the first question, as the_cauldron means them."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        match turn:
            case {"user": str(asked), "assistant": str(said)}:
                text = [{"type": "text", "text": asked}]
                parts = [*[{"type": "image"}] * (num_images if number == 0 else 0), *text]
                messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]
            case _:
                raise DataError(f"a text is not user and assistant: {str(turn)[:80]}")
    return messages


def _images(record: Any, images_in: ImageRoot) -> list[ImageReference]:
    if not isinstance(record, dict):
        return []
    named = record.get("images") or record.get("image") or []  # a merged table has empty columns
    named = named if isinstance(named, list) else [named]
    return [_image(one, images_in) for one in named]


def _image(named: Any, images_in: ImageRoot) -> ImageReference:
    match named:
        case bytes() | {"bytes": bytes()}:
            return named if isinstance(named, bytes) else named["bytes"]
        case str() if named.startswith("data:"):
            return data_url_bytes(named)
        case str() | {"path": str()}:
            return images_in.find(named if isinstance(named, str) else named["path"])
        case _:
            if isinstance(named, ImageReference):
                return named
            raise DataError("image must be a file name, the bytes of a file, or a list of them")
