"""Files of conversations -> `Sample`s, with every bad record skipped, counted and written down.

Two layouts of record, in a JSON list or in JSON lines: LLaVA's (`image`, `conversations` of from/value,
`<image>` tags in the text) and chat messages (`images`, `messages` of role/content). Stricter than
`json.load`: duplicate keys, NaN, lone surrogates and pictures outside the image folder are refused. Lines end at a
newline only (not at U+2028), a byte order mark is passed over, and one bad record never hides the ones after it.
"""

import codecs
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from acformer.data.chat_format import IMAGE_TAG
from acformer.data.conversation import check_images, split_at_images
from acformer.data.samples import Sample
from acformer.data.skip_log import FsPath, SkipLog
from acformer.errors import DataError

SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
OTHER_MEDIA = ("video", "videos", "audio", "audios", "sound", "sounds")
"""Keys of records that are about more than images; a model of ours reads none of it."""
_SPACE = re.compile(r"[ \t\r\n]*")


def read_samples(path: FsPath, *, image_root: FsPath | None = None, skipped: SkipLog) -> Iterator[Sample]:
    """The good records of a file, one by one; the bad ones go to `skipped`.

    Pictures are looked for under `image_root` (default: the file's folder) and only opened later. Errors:
    `DataError` naming the file when it is missing, empty, broken as a whole or without one good record.
    """
    path = Path(path).expanduser()
    root = path.parent if image_root is None else Path(image_root).expanduser()
    used, reason = 0, ""
    for number, record in _records(path):
        skipped.offered += 1
        try:
            sample = _sample(record, path, number, root)
        except DataError as error:
            reason = reason or f"record {number}: {error}"
            skipped.skip(str(path), number, str(error))
        else:
            used += 1
            yield sample
    if not used:
        raise DataError(f"{path} holds no usable record; {reason or 'it is empty'}")


class _StrictDecoder(json.JSONDecoder):
    """Collects duplicate keys and NaN instead of raising, so that the end of a bad record is found."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        super().__init__(object_pairs_hook=self._object, parse_constant=self.faults.append)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            keys = [key for key, _ in pairs]
            self.faults.append(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
        return record

    def next(self, text: str, start: int) -> tuple[Any, int]:
        """The value at `start` (a `DataError` in its place if faulty) and the position of what follows it."""
        self.faults.clear()
        try:
            value, end = self.raw_decode(text, _skip_space(text, start))
        except RecursionError:
            raise DataError("not JSON that can be read: nested too deeply") from None
        except ValueError as error:
            raise DataError(f"not JSON: {error}") from None
        return DataError(f"not JSON: {self.faults[0]}") if self.faults else value, _skip_space(text, end)


def _skip_space(text: str, start: int) -> int:
    space = _SPACE.match(text, start)
    return space.end() if space else start


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of each record; one that is not JSON comes as the DataError saying so."""
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        yield from _list_records(path) if start == b"[" else _line_records(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _line_records(path: Path) -> Iterator[tuple[int, Any]]:
    decoder = _StrictDecoder()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                value, end = decoder.next(text, 0)
            except UnicodeDecodeError:
                yield number, DataError("not UTF-8")
            except DataError as error:
                yield number, error
            else:
                yield number, value if end == len(text) else DataError("not JSON: a line holds one value")


def _list_records(path: Path) -> Iterator[tuple[int, Any]]:
    """A list is read element by element; where it is broken, what follows cannot be found: `DataError`."""
    decoder = _StrictDecoder()
    number = 0
    try:
        text = path.read_text(encoding="utf-8-sig")
        at = _skip_space(text, text.index("[") + 1)
        more = text[at : at + 1] != "]"
        while more:
            number += 1
            value, at = decoder.next(text, at)
            yield number, value
            more = text[at : at + 1] == ","
            at += more
        if text[at : at + 1] != "]" or _skip_space(text, at + 1) != len(text):
            raise DataError(f"not JSON: the list is broken off or followed by more at character {at}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    except DataError as error:
        raise DataError(f"{path}:{number}: {error}") from error


def _sample(record: Any, path: Path, number: int, root: Path) -> Sample:
    """A checked `Sample`, or the `DataError` that says what is wrong with the record."""
    if isinstance(record, DataError):
        raise record
    if heard := [key for key in OTHER_MEDIA if isinstance(record, dict) and record.get(key)]:
        raise DataError(f"holds {heard[0]}, which is neither text nor an image")
    match record:
        case {"messages": [_, *_] as turns}:
            messages, names = _chat_messages(turns, _image_names(record))
        case {"conversations": [_, *_] as turns}:
            messages, names = [_llava_message(turn) for turn in turns], _image_names(record)
        case _:
            raise DataError("a record is an object with `conversations` or `messages`")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError("holds a lone surrogate, which is not a character") from None
    messages = _with_system_prompt(record, messages)
    images = tuple(_image_path(root, name) for name in names)
    check_images(messages, len(images))
    said = ["".join(split_at_images(message)) for message in messages if message["role"] == "assistant"]
    kind, key, answer = record.get("kind"), record.get("id"), record.get("answer")
    key = f"{path.stem}:{number}" if key is None else key
    if answer is None:
        answer = said[-1] if said else None
    elif type(answer) in (int, float):
        answer = str(answer)
    if not isinstance(kind, str | None) or not isinstance(answer, str | None) or not isinstance(key, str | int):
        raise DataError("id, kind and answer must be text")
    return Sample(str(key), tuple(messages), images, answer, kind, str(path), number)


def _with_system_prompt(record: dict[str, Any], messages: list[Any]) -> list[Any]:
    """The record's own `system` or `system_prompt` as the first message, unless the messages begin with one."""
    prompt = record.get("system") or record.get("system_prompt")
    if not prompt:
        return messages
    if not isinstance(prompt, str):
        raise DataError(f"a system prompt must be text: {str(prompt)[:80]}")
    begins = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    return messages if begins else [{"role": "system", "content": prompt}, *messages]


def _chat_messages(turns: list[Any], names: list[str]) -> tuple[list[Any], list[str]]:
    """Chat messages, and the images that they are about.

    Image parts may name their images themselves; where there are none, `<image>` tags in a user's text are read as
    LLaVA's are.
    """
    parts = [part for turn in turns if isinstance(turn, dict) for part in _parts(turn.get("content"))]
    if any(part.get("type") == "image" for part in parts):
        own = [_named_image(part) for part in parts if part.get("type") == "image"]
        found = [name for name in own if name is not None]
        if found and names:
            raise DataError("images are named in the record and in the parts of its messages")
        if found and len(found) < len(own):
            raise DataError("some image parts name their image and others do not")
        return turns, names or found
    return ([_tagged_message(turn) for turn in turns] if names else turns), names


def _parts(content: Any) -> list[dict[str, Any]]:
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _named_image(part: dict[str, Any]) -> str | None:
    """The image that a part names: under `image`, `path` or `url`, as chat formats have it."""
    named = [part[key] for key in ("image", "path", "url") if isinstance(part.get(key), str)]
    return named[0] if named else None


def _tagged_message(turn: Any) -> Any:
    """A chat message whose text holds `<image>` tags, with parts in their places."""
    match turn:
        case {"role": "user", "content": str(text)} if IMAGE_TAG in text:
            return _llava_message({"from": "human", "value": text})
        case _:
            return turn


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


def _image_names(record: dict[str, Any]) -> list[str]:
    names = record.get("images") or record.get("image") or []  # a merged table has empty columns
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError("image must be a file name or a list of them")
    return names


def _image_path(root: Path, name: str) -> Path:
    """An existing file whose path, as written, lies under `root` (links in there are the user's own)."""
    base = os.path.abspath(root)
    path = os.path.normpath(os.path.join(base, name))
    if not Path(path).is_relative_to(base):
        raise DataError(f"image {name!r} is outside the image folder {base}")
    if not os.path.isfile(path):
        raise DataError(f"image {name!r} is not in the image folder {base}")
    return Path(path)
