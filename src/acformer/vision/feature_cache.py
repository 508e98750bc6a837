"""What a frozen encoder made of each image, on disk: encode once, train and evaluate from memory-mapped arrays.

A cache belongs to one encoder (its weights, its config, its feature layer, the hidden layers kept) and one way of
preparing pixels: all of it is in the folder's name, so nothing stale is ever read. Images are known by the sha256 of
their bytes, and every row by its checksum. Appending is safe to interrupt: rows without an index line are not read, and
cut off by the next process that adds some. Reading changes nothing, so caches can be opened while another process adds
to them, and from a disk that cannot be written.

Files: `<array>.bin`, the rows one after another; `shapes.json`, the shape of a row of each; `index.txt`, a line
`<sha256 of the image> <crc32 of its rows>` for each row.
"""

import hashlib
import json
import math
import mmap
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from acformer.errors import DataError, ImageError, UsageError
from acformer.files import file_sha256, locked
from acformer.images import image_bytes, load_image
from acformer.images.stored import StoredImage
from acformer.vision.families import encoder_family
from acformer.vision.features import VisionFeatures

FORMAT = 2
# Scores stay in float32: rounding them would make ties, and so other anchors than the live encoder's.
DTYPES = {"tokens": torch.float16, "cls_attention": torch.float32, "hidden_layers": torch.float16}
LINE = re.compile("[0-9a-f]{64} [0-9a-f]{8}")
NOT_FEATURES = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
"""Fields of a config on which features do not depend; the dtype is that of the weights."""
MAP_NORESERVE = 0x4000  # Linux's, which Python 3.11 does not name

Signature = tuple[int, int, int]
File = Path | StoredImage
"""An image that is known by its bytes: a file, or a member of an archive."""


def encoder_key(
    tower: PreTrainedModel,
    image_processor: Any,
    hidden_layers: Sequence[int] = (),
    input_grid: tuple[int, int] | None = None,
) -> str:
    """Fingerprint of all that the features depend on: config, weights, their dtype, feature layer, pixel preparation.

    hidden_layers, input_grid: the connector's; see `Connector`.
    """
    config = {name: value for name, value in tower.config.to_dict().items() if name not in NOT_FEATURES}
    blocks: Any = tower.get_submodule(encoder_family(tower.config).blocks)
    parts = [FORMAT, config, image_processor.to_json_string(), len(blocks), [*hidden_layers], input_grid]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, value in tower.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # Any dtype as its bytes, (all of them,): numpy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:20]


class FeatureCache:
    """`cache.add(paths)`, then `cache(path)` -> {"tokens": (P+N, D) float16, "cls_attention": (H, N) float32}.

    With `hidden_layers` also {"hidden_layers": (K, P+N, D) float16}.

    Args:
        folder: where caches lie; this one in `<folder>/<encoder_key>`.
        encode: (B, 3, Y, X) pixels -> `VisionFeatures`.
        tower: the module whose weights `encode` uses.
        image_processor: images -> pixels.
        hidden_layers, input_grid: what `encode` keeps beside the feature layer, and the patches of the images it reads.

    Raises:
        DataError: files of the cache that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        encode: Callable[[Tensor], VisionFeatures],
        tower: PreTrainedModel,
        image_processor: Any,
        *,
        hidden_layers: Sequence[int] = (),
        input_grid: tuple[int, int] | None = None,
    ):
        self.folder = folder / encoder_key(tower, image_processor, hidden_layers, input_grid)
        self.encode: Callable[[Tensor], VisionFeatures] | None = encode
        self.image_processor = image_processor
        self.digests: dict[File, tuple[Signature, str]] = {}
        self.reasons: dict[File, str] = {}
        self.rows: dict[str, int] = {}
        self.checksums: list[int] = []
        self.verified: set[int] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.maps: dict[str, Tensor] = {}
        with self._files("read"):
            self._read()

    def __getstate__(self) -> dict[str, Any]:
        """For a loader's worker, which reads: without the encoder, and without the maps, which it opens itself."""
        return {**vars(self), "maps": {}, "encode": None}

    def __call__(self, path: File) -> dict[str, Tensor]:
        """The features of an image that was added; `ImageError` with the reason where there are none.

        They are views of the mapped file, read when they are used: copy before you write.
        """
        row = self.rows.get(self._known_digest(path))
        if row is None:
            raise ImageError(self.reasons.get(path, f"no features for {path}: it was never added to the cache"))
        with self._files("read"):
            if not self.maps:
                self.maps = {name: self._map(name) for name in self.shapes}
        found = {name: rows[row] for name, rows in self.maps.items()}
        if row not in self.verified:
            if _checksum(found) != self.checksums[row]:
                raise ImageError(f"the features of {path} are damaged: delete {self.folder} and they are made again")
            self.verified.add(row)
        return found

    def add(self, paths: Iterable[File], *, batch_size: int = 32, progress: bool = True) -> None:
        """Encode the images that are not there yet. A damaged one is passed over: asking for it says why.

        Raises:
            UsageError: features beyond float16; in a copy in another process, images that are not there: it has no
                encoder.
            DataError: the cache cannot be written.
        """
        paths = list(paths)
        with self._files("read"):
            self._read()
        if not self._missing(paths):
            return
        with self._files("written"), locked(self.folder / "lock"):
            self._repair()
            new = self._missing(paths)
            with tqdm(total=len(new), desc="encode images", unit="img", disable=not (progress and new)) as bar:
                for start in range(0, len(new), batch_size):
                    batch = list(new.items())[start : start + batch_size]
                    self._append(batch)
                    bar.update(len(batch))

    @contextmanager
    def _files(self, what: str) -> Iterator[None]:
        """One line instead of a traceback where the cache's own files are in the way."""
        try:
            yield
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise DataError(f"the feature cache {self.folder} cannot be {what}: {reason}") from error

    def _missing(self, paths: Iterable[File]) -> dict[str, list[File]]:
        """The digests that have no row yet, each with all the files of that content."""
        new: dict[str, list[File]] = {}
        for path in dict.fromkeys(paths):
            try:
                digest = self._digest(path)
            except ImageError as error:  # in an archive
                self.reasons[path] = str(error)
                continue
            except OSError as error:
                self.digests.pop(path, None)
                self.reasons[path] = f"cannot be read ({(error.strerror or 'input error').lower()}): {path}"
                continue
            if digest not in self.rows:
                new.setdefault(digest, []).append(path)
        return new

    def _digest(self, path: File) -> str:
        """The sha256 of a file, computed again where it seems to have changed."""
        status = os.stat(path.archive if isinstance(path, StoredImage) else path)
        signature = (status.st_size, status.st_mtime_ns, status.st_ino)
        known, digest = self.digests.get(path, (None, ""))
        if known != signature:
            if isinstance(path, StoredImage):
                digest = hashlib.sha256(image_bytes(path)).hexdigest()
            else:
                digest = file_sha256(path)
            self.digests[path] = (signature, digest)
        return digest

    def _known_digest(self, path: File) -> str:
        """The digest of a file that was added, '' of others; one that has gone since then keeps its features."""
        if path not in self.digests:
            return ""
        try:
            digest = self._digest(path)
        except OSError:
            return self.digests[path][1]
        if digest not in self.rows:
            self.reasons.setdefault(path, f"no features for {path}: it has changed since it was added to the cache")
        return digest

    def _append(self, batch: list[tuple[str, list[File]]]) -> None:
        opened = {digest: self._open(paths) for digest, paths in batch}
        images = {digest: image for digest, image in opened.items() if image is not None}
        if not images:
            return
        if self.encode is None:
            raise UsageError("a copy of a feature cache reads only: add images where it was made")
        pixels = self.image_processor(list(images.values()), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            features = self.encode(pixels)
        arrays = {name: values.to(DTYPES[name]).cpu() for name, values in features.arrays.items()}
        for name, values in features.arrays.items():
            if not arrays[name].isfinite().all() and values.isfinite().all():
                raise UsageError("this encoder's features exceed float16; run without cache_features")
        self._write(arrays)
        with open(self.folder / "index.txt", "a", encoding="utf-8") as index:
            for number, digest in enumerate(images):
                checksum = _checksum({name: values[number] for name, values in arrays.items()})
                index.write(f"{digest} {checksum:08x}\n")
                self.rows[digest] = len(self.rows)
                self.checksums.append(checksum)
        self.maps = {}

    def _open(self, paths: list[File]) -> Image | None:
        """The image in any of these files; why there is none is kept for whoever asks."""
        for path in paths:
            try:
                image = load_image(path)
            except ImageError as error:
                self.reasons[path] = str(error)
                del self.digests[path]  # the file may be mended before it is added again
            else:
                return image
        return None

    def _write(self, arrays: dict[str, Tensor]) -> None:
        shapes = {name: tuple(values.shape[1:]) for name, values in arrays.items()}
        if self.rows and shapes != self.shapes:
            raise DataError(f"the feature cache {self.folder} is damaged: delete it, and it is made again")
        for name, values in arrays.items():
            with open(self._file(name), "ab") as file:
                file.write(values.numpy().tobytes())
        if shapes != self.shapes:
            self.shapes = shapes
            _replace(self.folder / "shapes.json", json.dumps(shapes))

    def _read(self) -> None:
        """Learn which rows there are, changing nothing: those with a whole index line and all of their bytes."""
        self.shapes = _shapes(_text(self.folder / "shapes.json"))
        files = {name: self._file(name) for name in self.shapes}
        whole = [file.stat().st_size // self._row_bytes(name) if file.exists() else 0 for name, file in files.items()]
        self.rows, self.checksums = {}, []
        for line in _text(self.folder / "index.txt").split("\n")[: min(whole, default=0)]:
            digest, _, checksum = line.partition(" ")
            if not LINE.fullmatch(line) or digest in self.rows:
                break
            self.rows[digest] = len(self.rows)
            self.checksums.append(int(checksum, 16))
        self.maps, self.verified = {}, set()  # opened again: the files may have grown

    def _repair(self) -> None:
        """Cut off what an interrupted run left behind the whole rows; only under the lock."""
        self._read()
        index = "".join(f"{digest} {self.checksums[row]:08x}\n" for digest, row in self.rows.items())
        if _text(self.folder / "index.txt") != index:
            _replace(self.folder / "index.txt", index)
        for name in DTYPES:
            size = len(self.rows) * self._row_bytes(name) if name in self.shapes else 0
            # Windows truncates no file that anybody has mapped, not even to the size that it has.
            if self._file(name).exists() and self._file(name).stat().st_size != size:
                os.truncate(self._file(name), size)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _row_bytes(self, name: str) -> int:
        return DTYPES[name].itemsize * math.prod(self.shapes[name])

    def _map(self, name: str) -> Tensor:
        """Private pages: nobody writes into the file. (rows, ...)"""
        shape = (len(self.rows), *self.shapes[name])
        with open(self._file(name), "rb") as file:
            if os.fstat(file.fileno()).st_size < len(self.rows) * self._row_bytes(name):
                raise OSError(f"{name}.bin has become shorter")
            if sys.platform == "linux":  # without a reserve: a file larger than memory could not be mapped
                flags, access = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                pages = mmap.mmap(file.fileno(), 0, flags=flags, prot=access)
            else:
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(pages, dtype=DTYPES[name], count=math.prod(shape)).view(shape)  # (rows, P+N, D) or so


def _checksum(arrays: dict[str, Tensor]) -> int:
    """crc32 of a row of every array, in the order of `DTYPES`."""
    checksum = 0
    for name in DTYPES:
        if name in arrays:
            checksum = zlib.crc32(arrays[name].contiguous().view(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def _shapes(text: str) -> dict[str, tuple[int, ...]]:
    """The shape of a row of each array; nothing where the file says anything else, so that the cache is made anew."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):  # brackets without end
        return {}
    if not isinstance(found, dict) or not found.keys() <= DTYPES.keys():
        return {}
    for shape in found.values():
        if not isinstance(shape, list) or not all(type(side) is int and side > 0 for side in shape) or not shape:
            return {}
    return {name: tuple(shape) for name, shape in found.items()}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _replace(path: Path, text: str) -> None:
    """Write a file at once: a reader sees the old text or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
