"""WebDataset: tar shards in which the files of a sample stand together and share a name up to its first dot.

`7.json` is the record, in any of the layouts, or `7.txt` a caption; `7.jpg`, `7.0.png` and the like are its images.
Shards are read where they lie, any sample at once.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from acformer.data.archives import Archive
from acformer.data.image_root import ImageRoot
from acformer.data.json_files import StrictDecoder
from acformer.data.layouts import LAYOUTS
from acformer.data.records import Records
from acformer.errors import DataError, ImageError
from acformer.images.stored import StoredImage

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS = ("json", "txt")
OTHERS = ("cls", "id", "index", "key")
"""Small files beside a sample, of which nothing is read."""
LONGEST = 64 * 2**20


class Shard(Records):
    """The samples of one tar file.

    A shard that breaks off counts one bad record more, behind those that are whole.
    """

    def __init__(self, path: Path, images_in: ImageRoot) -> None:
        self.file = str(path)
        self.archive = Archive(path)
        self.images_in = images_in
        self.decoder = StrictDecoder()
        names = [self.archive.name(number) for number in range(len(self.archive))]
        keys = [_key(name) for name in names]
        firsts = [number for number, key in enumerate(keys) if number == 0 or key != keys[number - 1]]
        self.firsts = np.array([*firsts, len(names)], np.int64)
        ends = np.array([_suffix(name) for name in names], dtype=str)
        packed = np.asarray(self.archive.members[:, 1])
        self.text = self._per_sample(np.where(np.isin(ends, TEXTS), packed, 0))
        self.images = self._per_sample(np.isin(ends, IMAGES).astype(np.int64))

    def __len__(self) -> int:
        return len(self.firsts) - 1 + bool(self.archive.broken)

    def record(self, index: int) -> Any:
        """See `Records`."""
        if index == len(self.firsts) - 1:
            raise DataError(f"the shard breaks off here: {self.archive.broken}")
        members = {}
        for number in range(int(self.firsts[index]), int(self.firsts[index + 1])):
            name = self.archive.name(number)
            members[name[len(_key(name)) + 1 :].lower()] = self.archive.member(number)
        return self._made_of(members, self.archive.name(int(self.firsts[index])))

    def where(self, index: int) -> tuple[str, int]:
        """The shard, and the number of the sample in it."""
        return self.file, index + 1

    def lengths(self, num_placeholders: int) -> np.ndarray:
        """See `Samples`: of bytes in texts."""
        found = num_placeholders * self.images + self.text // 4
        return np.concatenate([found, np.zeros(len(self) - len(found), np.int64)])

    def fingerprint(self) -> str:
        """Of names and sizes of all members."""
        digest = hashlib.sha256(np.asarray(self.archive.members[:, 1]).tobytes())
        digest.update(np.asarray(self.archive.names).tobytes())
        return digest.hexdigest()

    def _per_sample(self, of_members: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0], np.cumsum(of_members)]).astype(np.int64)  # (members + 1,)
        return np.diff(sums[self.firsts])  # (samples,)

    def _made_of(self, members: dict[str, StoredImage], first: str) -> Any:
        images = [member for end, member in members.items() if end.rpartition(".")[2] in IMAGES]
        known = (*IMAGES, *TEXTS, *OTHERS)
        if others := [member for end, member in members.items() if end.rpartition(".")[2] not in known]:
            raise DataError(f"holds {others[0].name}, which is neither text nor an image")
        if "json" in members:
            record = self._parsed(members["json"])
            if not isinstance(record, dict):
                raise DataError(f"{members['json'].name} is not an object")
            if any(key in record for key in LAYOUTS):
                record.setdefault("id", _key(first))
                if images:
                    record["images"] = images
                return record
            if not isinstance(caption := record.get("caption"), str):
                has = ", ".join(record)[:120]
                raise DataError(f"{members['json'].name} has no {', '.join(LAYOUTS)} or caption; it has {has}")
        elif "txt" in members:
            caption = _text(members["txt"])
        else:
            raise DataError(f"of this tar shard {first} has neither a .json nor a .txt beside it")
        content = [{"type": "image"}] * len(images)
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": caption.strip()}]
        return {"id": _key(first), "messages": turns, "images": images}

    def _parsed(self, member: StoredImage) -> Any:
        return self.decoder.only_value(_text(member), member.name)


def shard_files(path: Path) -> list[Path]:
    """The file itself, or all tars below a folder, in order of their names."""
    return [path] if path.is_file() else sorted(path.rglob("*.tar"))


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _suffix(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def _text(member: StoredImage) -> str:
    try:
        return member.read(LONGEST).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"not UTF-8: {member.name}") from None
    except ImageError as error:
        raise DataError(f"{error}: {member.name}") from error
