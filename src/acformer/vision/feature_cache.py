"""What a frozen encoder made of each picture, on disk: encode once, train and evaluate from memory-mapped arrays.

A cache belongs to one encoder (its weights, its feature layer, the hidden layers kept) and one way of preparing pixels:
all of it is in the folder's name, so nothing stale is ever read. Pictures are known by the sha256 of their bytes.
Appending is safe to interrupt: rows without an index line are not read, and cut off by the next process that adds some.
Reading changes nothing, so caches can be opened while another process adds to them.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm

from acformer.errors import ImageError, UsageError
from acformer.files import file_sha256, locked
from acformer.images import load_image
from acformer.vision.features import VisionFeatures

MAP_NORESERVE = 0x4000  # Linux's, which Python 3.11 does not name
# Scores stay in float32: rounding them would make ties, and so other anchors than the live encoder's.
DTYPES = {"tokens": torch.float16, "cls_attention": torch.float32, "hidden_layers": torch.float16}


def encoder_key(
    tower: nn.Module, image_processor: Any, hidden_layers: Sequence[int] = (), input_grid: tuple[int, int] | None = None
) -> str:
    """Fingerprint of all that the features depend on: weights, their dtype and number of blocks, pixel preparation.

    hidden_layers, input_grid: the connector's; see `Connector`.
    """
    digest = hashlib.sha256(image_processor.to_json_string().encode())
    digest.update(f"{[*hidden_layers]} {input_grid}".encode())
    for name, value in tower.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:20]


class FeatureCache:
    """`cache.add(paths)`, then `cache(path)` -> {"tokens": (P+N, D) float16, "cls_attention": (H, N) float32}.

    With `hidden_layers` also {"hidden_layers": (K, P+N, D) float16}.

    Args:
        folder: where caches lie; this one in `<folder>/<encoder_key>`.
        encode: (B, 3, Y, X) pixels -> `VisionFeatures`.
        tower: the module whose weights `encode` uses.
        image_processor: pictures -> pixels.
        hidden_layers, input_grid: what `encode` keeps beside the feature layer, and the patches of the images it reads.
    """

    def __init__(
        self,
        folder: Path,
        encode: Callable[[Tensor], VisionFeatures],
        tower: nn.Module,
        image_processor: Any,
        *,
        hidden_layers: Sequence[int] = (),
        input_grid: tuple[int, int] | None = None,
    ):
        self.folder = folder / encoder_key(tower, image_processor, hidden_layers, input_grid)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.encode: Callable[[Tensor], VisionFeatures] | None = encode
        self.device, self.dtype = next((p.device, p.dtype) for p in tower.parameters())
        self.image_processor = image_processor
        self.digests: dict[Path, str] = {}
        self.reasons: dict[Path, str] = {}
        self.rows: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.maps: dict[str, Tensor] = {}
        self._read()

    def __getstate__(self) -> dict[str, Any]:
        """For a loader's worker, which reads: without the encoder, and without the maps, which it opens itself."""
        return {**vars(self), "maps": {}, "encode": None}

    def __call__(self, path: Path) -> dict[str, Tensor]:
        """The features of a picture that was added; `ImageError` with the reason where there are none.

        They are views of the mapped file, read when they are used: copy before you write.
        """
        row = self.rows.get(self.digests.get(path, ""))
        if row is None:
            raise ImageError(self.reasons.get(path, f"no features for {path}: it was never added to the cache"))
        if not self.maps:
            self.maps = {name: self._map(name) for name in self.shapes}
        return {name: rows[row] for name, rows in self.maps.items()}

    def add(self, paths: Iterable[Path], *, batch_size: int = 32, progress: bool = True) -> None:
        """Encode the pictures that are not there yet. A damaged one is passed over: asking for it tells.

        `UsageError` from a copy in another process that would have to encode: it has no encoder.
        """
        with locked(self.folder / "lock"):
            self._repair()
            new = self._missing(paths)
            with tqdm(total=len(new), desc="encode images", unit="img", disable=not (progress and new)) as bar:
                for start in range(0, len(new), batch_size):
                    batch = list(new.items())[start : start + batch_size]
                    self._append(batch)
                    bar.update(len(batch))

    def _missing(self, paths: Iterable[Path]) -> dict[str, list[Path]]:
        """The digests that have no row yet, each with all the files of that content."""
        new: dict[str, list[Path]] = {}
        for path in dict.fromkeys(paths):
            if path not in self.digests:
                try:
                    self.digests[path] = file_sha256(path)
                except OSError as error:
                    self.reasons[path] = f"cannot be read ({(error.strerror or 'input error').lower()}): {path}"
                    continue
            digest = self.digests[path]
            if digest not in self.rows:
                new.setdefault(digest, []).append(path)
        return new

    def _append(self, batch: list[tuple[str, list[Path]]]) -> None:
        opened = {digest: self._picture(paths) for digest, paths in batch}
        pictures = {digest: picture for digest, picture in opened.items() if picture is not None}
        if not pictures:
            return
        if self.encode is None:
            raise UsageError("a copy of a feature cache reads only: add pictures where it was made")
        pixels = self.image_processor(list(pictures.values()), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            features = self.encode(pixels.to(self.device, self.dtype))
        arrays = {name: values.to(DTYPES[name]) for name, values in features.arrays.items()}
        for name, values in features.arrays.items():
            if not arrays[name].isfinite().all() and values.isfinite().all():
                raise UsageError("this encoder's features exceed float16; run without cache_features")
        self._write(arrays)
        with open(self.folder / "index.txt", "a", encoding="utf-8") as index:
            for digest in pictures:
                index.write(f"{digest}\n")
                self.rows[digest] = len(self.rows)
        self.maps = {}

    def _picture(self, paths: list[Path]) -> Image | None:
        """The picture in any of these files; why there is none is kept for whoever asks."""
        for path in paths:
            try:
                return load_image(path)
            except ImageError as error:
                self.reasons[path] = str(error)
                del self.digests[path]  # the file may be mended before it is added again
        return None

    def _write(self, arrays: dict[str, Tensor]) -> None:
        for name, values in arrays.items():
            with open(self._file(name), "ab") as file:
                file.write(values.cpu().numpy().tobytes())
        shapes = {name: tuple(values.shape[1:]) for name, values in arrays.items()}
        if shapes != self.shapes:
            self.shapes = shapes
            _replace(self.folder / "shapes.json", json.dumps(shapes))

    def _read(self) -> None:
        """Learn which rows there are, changing nothing: those with a whole index line and all of their bytes."""
        shapes = json.loads(_text(self.folder / "shapes.json") or "{}")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        lines = _text(self.folder / "index.txt").split("\n")[:-1]
        files = {name: self._file(name) for name in self.shapes}
        whole = [file.stat().st_size // self._row_bytes(name) if file.exists() else 0 for name, file in files.items()]
        self.rows = {digest: row for row, digest in enumerate(lines[: min(whole, default=0)])}
        self.maps = {}

    def _repair(self) -> None:
        """Cut off what an interrupted run left behind the whole rows; only under the lock."""
        self._read()
        index = "".join(f"{digest}\n" for digest in self.rows)
        if _text(self.folder / "index.txt") != index:
            _replace(self.folder / "index.txt", index)
        for name in DTYPES:
            if self._file(name).exists():
                os.truncate(self._file(name), len(self.rows) * self._row_bytes(name) if name in self.shapes else 0)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _row_bytes(self, name: str) -> int:
        return DTYPES[name].itemsize * math.prod(self.shapes[name])

    def _map(self, name: str) -> Tensor:
        """Private pages: nobody writes into the file. None reserved: a file larger than memory could not be mapped."""
        shape = (len(self.rows), *self.shapes[name])
        with open(self._file(name), "rb") as file:
            flags, access = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            pages = mmap.mmap(file.fileno(), 0, flags=flags, prot=access)
        return torch.frombuffer(pages, dtype=DTYPES[name], count=math.prod(shape)).view(shape)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _replace(path: Path, text: str) -> None:
    """Write a file at once: a reader sees the old text or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
