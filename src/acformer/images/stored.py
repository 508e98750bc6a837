"""An image that lies in a zip or a tar, read there without unpacking the rest."""

import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from acformer.errors import ImageError

STORED, DEFLATED = 0, 8
"""Zip's methods; a tar's members are stored."""


@dataclass(frozen=True)
class StoredImage:
    """Where the bytes of a member are; a value that may go to any process.

    archive: the file. name: of the member. offset: of its bytes, or (`has_header`) of the header of a zip's member.
    packed: how many bytes there are. method: how they are packed.
    """

    archive: str
    name: str
    offset: int
    packed: int
    method: int = STORED
    has_header: bool = False

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def read(self, size: int) -> bytes:
        """The first `size` bytes; `ImageError` where the archive is gone or damaged there."""
        try:
            with open(self.archive, "rb") as file:  # a handle of its own: forked workers would share a place in it
                file.seek(self._at(file))
                content = file.read(min(self.packed, size) if self.method == STORED else self.packed)
            if self.method == STORED:
                return content
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size)
        except OSError as error:
            raise ImageError(f"cannot be read ({(error.strerror or 'input error').lower()})") from error
        except (zlib.error, struct.error) as error:
            raise ImageError("damaged in its archive") from error

    def _at(self, file: BinaryIO) -> int:
        """Behind a zip's local header: 30 bytes, which end in the lengths of the name and of what else follows."""
        if not self.has_header:
            return self.offset
        file.seek(self.offset)
        header = file.read(30)
        name, extra = struct.unpack("<HH", header[26:30])
        return self.offset + 30 + name + extra
