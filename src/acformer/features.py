"""What a frozen encoder made of each picture, on disk: encode once, train and evaluate from memory-mapped arrays.

A cache belongs to one encoder (its weights, its feature layer) and one way of preparing pixels: both are in the
folder's name, so nothing stale is ever read. Pictures are known by the sha256 of their bytes. Appending is safe to
interrupt: rows without an index line are cut off at the next opening.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from acformer.download import file_sha256, locked
from acformer.errors import ImageError
from acformer.images import load_image
from acformer.vision import VisionFeatures

TOKENS = np.dtype(np.float16)
# Scores stay in float32: rounding them would make ties, and so other anchors than the live encoder's.
SCORES = np.dtype(np.float32)


def encoder_key(tower: nn.Module, image_processor: Any) -> str:
    """Fingerprint of all that the features depend on: weights, their dtype and number of blocks, pixel preparation."""
    digest = hashlib.sha256(image_processor.to_json_string().encode())
    for name, value in tower.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:20]


class FeatureCache:
    """`cache.add(paths)`, then `cache(path)` -> {"tokens": (P+N, D) float16, "cls_attention": (H, N) float32}.

    Args:
        folder: where caches lie; this one in `<folder>/<encoder_key>`.
        encode: (B, 3, Y, X) pixels -> `VisionFeatures`.
        tower: the module whose weights `encode` uses.
        image_processor: pictures -> pixels.
    """

    def __init__(
        self, folder: Path, encode: Callable[[Tensor], VisionFeatures], tower: nn.Module, image_processor: Any
    ):
        self.folder = folder / encoder_key(tower, image_processor)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.encode = encode
        self.device, self.dtype = next((p.device, p.dtype) for p in tower.parameters())
        self.image_processor = image_processor
        self.digests: dict[Path, str] = {}
        self.rows: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open()

    def __call__(self, path: Path) -> dict[str, Tensor]:
        """The features of a picture that was added; `ImageError` for one that was not, or could not be, read."""
        row = self.rows.get(self.digests.get(path, ""))
        if row is None:
            raise ImageError(f"no features for {path}: it could not be read, or was never added to the cache")
        arrays = {"tokens": self._map("tokens", TOKENS), "cls_attention": self._map("cls_attention", SCORES)}
        return {name: torch.from_numpy(array[row].copy()) for name, array in arrays.items() if array is not None}

    def add(self, paths: Iterable[Path], *, batch_size: int = 32, progress: bool = True) -> None:
        """Encode the pictures that are not there yet. A damaged one is passed over: asking for it tells."""
        with locked(self.folder / "lock"):
            self._open()
            new = self._missing(paths)
            with tqdm(total=len(new), desc="encode images", unit="img", disable=not (progress and new)) as bar:
                for start in range(0, len(new), batch_size):
                    batch = list(new.items())[start : start + batch_size]
                    self._append(batch)
                    bar.update(len(batch))

    def _missing(self, paths: Iterable[Path]) -> dict[str, Path]:
        new = {}
        for path in paths:
            if path not in self.digests:
                try:
                    self.digests[path] = file_sha256(path)
                except OSError:
                    continue
            digest = self.digests[path]
            if digest not in self.rows:
                new[digest] = path
        return new

    def _append(self, batch: list[tuple[str, Path]]) -> None:
        pictures = {}
        for digest, path in batch:
            try:
                pictures[digest] = load_image(path)
            except ImageError:
                continue
        if not pictures:
            return
        pixels = self.image_processor(list(pictures.values()), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            features = self.encode(pixels.to(self.device, self.dtype))
        self._write("tokens", features.tokens.half())
        if features.cls_attention is not None:
            self._write("cls_attention", features.cls_attention.float())
        meta = {name: list(shape) for name, shape in self.shapes.items()}
        (self.folder / "shapes.json").write_text(json.dumps(meta), encoding="utf-8")
        with open(self.folder / "index.txt", "a", encoding="utf-8") as index:
            for digest in pictures:
                index.write(f"{digest}\n")
                self.rows[digest] = len(self.rows)

    def _write(self, name: str, values: Tensor) -> None:
        self.shapes[name] = tuple(values.shape[1:])
        with open(self.folder / f"{name}.bin", "ab") as file:
            file.write(values.cpu().numpy().tobytes())

    def _open(self) -> None:
        """Read the index; cut off rows that an interrupted run wrote without their index line."""
        index, meta = self.folder / "index.txt", self.folder / "shapes.json"
        if not meta.exists():
            for leftover in self.folder.glob("*.bin"):
                leftover.unlink()
            return
        shapes = json.loads(meta.read_text(encoding="utf-8"))
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        lines = index.read_text(encoding="utf-8").split("\n")[:-1] if index.exists() else []
        self.rows = {digest: row for row, digest in enumerate(lines)}
        index.write_text("".join(f"{digest}\n" for digest in self.rows), encoding="utf-8")
        for name, dtype in (("tokens", TOKENS), ("cls_attention", SCORES)):
            if name in self.shapes:
                with open(self.folder / f"{name}.bin", "r+b") as file:
                    file.truncate(len(self.rows) * dtype.itemsize * int(np.prod(self.shapes[name])))

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray | None:
        if name not in self.shapes:
            return None
        shape = (len(self.rows), *self.shapes[name])
        return np.memmap(self.folder / f"{name}.bin", dtype=dtype, mode="r", shape=shape)
