"""Zip and tar files whose members are read where they lie: which there are is found out once, and shared."""

import hashlib
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from acformer.data.index_cache import Arrays, indexed
from acformer.errors import DataError
from acformer.images.stored import DEFLATED, STORED, StoredImage

SUFFIXES = (".zip", ".tar")


class Member(NamedTuple):
    """offset: of its bytes, in a zip of its header. packed: bytes. method: 0 stored, 8 deflated, others unreadable."""

    name: str
    offset: int
    packed: int
    method: int


class Archive:
    """The files in a zip or an uncompressed tar.

    broken: why a tar ends early, "" if it does not; what is whole before is there.

    Raises:
        DataError: neither zip nor tar, missing, or a zip without its table of contents.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        try:
            self.is_zip = zipfile.is_zipfile(path)
            arrays, facts = indexed(path, "archive", lambda: _index(path, self.is_zip))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        self.members, self.names = arrays["members"], arrays["names"]
        self.hashes, self.order = arrays["hashes"], arrays["order"]
        self.broken: str = facts["broken"]

    def __len__(self) -> int:
        return len(self.members)

    def name(self, number: int) -> str:
        """Of the member of that number, in the order of the file."""
        start = int(self.members[number - 1, 3]) if number else 0
        return self.names[start : int(self.members[number, 3])].tobytes().decode("utf-8", "surrogateescape")

    def member(self, number: int) -> StoredImage:
        """The member of that number; `DataError` where it is packed in a way that cannot be read."""
        offset, packed, method, _ = map(int, self.members[number])
        if method not in (STORED, DEFLATED):
            raise DataError(f"{self.path}/{self.name(number)} is encrypted, or packed by method {method}: pack it anew")
        return StoredImage(self.path, self.name(number), offset, packed, method, self.is_zip)

    def find(self, name: str) -> StoredImage | None:
        """The member of that name, if there is one."""
        wanted = _hash(name)
        place = int(np.searchsorted(self.hashes, wanted))
        while place < len(self) and self.hashes[place] == wanted:
            if self.name(number := int(self.order[place])) == name:
                return self.member(number)
            place += 1
        return None


def _hash(name: str) -> np.uint64:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return np.frombuffer(digest, np.uint64)[0]


def _index(path: Path, is_zip: bool) -> tuple[Arrays, dict[str, Any]]:
    members: list[tuple[int, int, int, int]] = []
    names, hashes, broken, length = [], [], "", 0
    try:
        for member in _zip_members(path) if is_zip else _tar_members(path):
            encoded = member.name.encode("utf-8", "surrogateescape")
            length += len(encoded)
            names.append(encoded)
            hashes.append(_hash(member.name))
            members.append((member.offset, member.packed, member.method, length))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError) as error:
        broken = str(error)
        if is_zip or not members:
            raise DataError(f"{path} is not a zip or tar that can be read: {error}") from error
    order = np.argsort(np.array(hashes, np.uint64), kind="stable")
    arrays: Arrays = {
        "members": np.array(members, np.int64).reshape(-1, 4),  # (members, 4), also of none
        "names": np.frombuffer(b"".join(names), np.uint8),
        "hashes": np.array(hashes, np.uint64)[order],
        "order": order,
    }
    return arrays, {"broken": broken}


def _zip_members(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                method = -1 if info.flag_bits & 1 else info.compress_type
                yield Member(_clean(info.filename), info.header_offset, info.compress_size, method)


def _tar_members(path: Path) -> Iterator[Member]:
    size = path.stat().st_size
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            vars(archive)["members"] = []  # it would keep them all
            if not info.isfile():
                continue
            if info.offset_data + info.size > size:
                raise tarfile.ReadError(f"the file ends within {info.name}")
            yield Member(_clean(info.name), info.offset_data, info.size, STORED)


def _clean(name: str) -> str:
    return name.removeprefix("./")
