"""Samples -> batches of tensors, padded on the right for training; images are opened here, no earlier.

A sample that cannot be used (damaged image, cut image tokens, nothing to learn) does not kill the run: it
goes to the `SkipLog` and the batch goes on with the others. Without a log nothing is ever left out: the error
is raised.
"""

import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate

from acformer.data.conversation import IGNORE, check_images, encode_conversation
from acformer.data.mixture import Mixture
from acformer.data.packing import Packing, packed_text
from acformer.data.records import Samples, SourceError, WorkerError, as_samples
from acformer.data.samples import ImageReference, Sample
from acformer.data.skip_log import SkipLog
from acformer.errors import DataError
from acformer.images import load_image

Features = Mapping[str, Tensor | None]
Key = TypeVar("Key", bound=Hashable)
Opened = tuple[dict[str, Any], list[tuple[ImageReference, Any]]]


class ConversationDataset(Dataset):
    """Groups of samples, each sample as `{"id", "images" (references), "file", "record", "input_ids", "labels"}`.

    An item is a list of at most `group` samples about the same images (default: one), so that a batch can ask
    several questions about an image that is encoded once. A sample that cannot be read or encoded has `error` (the
    reason) in place of ids and labels. Nothing is drawn at random: an item depends on its index alone.
    """

    def __init__(
        self,
        samples: Samples | Sequence[Sample],
        processor: Any,
        *,
        max_length: int | None = None,
        group: int = 1,
    ) -> None:
        self.samples = as_samples(samples)
        self.groups = None if group == 1 else _groups(self.samples, group)
        self.processor = processor
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.samples if self.groups is None else self.groups)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self._encode(number) for number in ([index] if self.groups is None else self.groups[index])]

    @property
    def is_stream(self) -> bool:
        """Whether items can only be had in their order."""
        return self.samples.is_stream

    def lengths(self) -> list[int]:
        """About how many tokens each item's longest sample has: what a batch is padded to."""
        found = self.samples.lengths(self.processor.num_placeholders)
        if self.groups is not None:
            found = np.array([found[group].max() for group in self.groups], np.int64)
        return np.minimum(found, self.max_length or sys.maxsize).tolist()

    def mixture(self) -> tuple[list[int], list[float]] | None:
        """Items of each source, and its weight; None where an epoch is every item once."""
        samples = self.samples
        if not isinstance(samples, Mixture) or not samples.is_weighted:
            return None
        if self.groups is None:
            return samples.counts, samples.weights
        parts = [samples.part_of(group[0]) for group in self.groups]
        return [parts.count(part) for part in range(len(samples.parts))], samples.weights

    def _encode(self, number: int) -> dict[str, Any]:
        file, record = self.samples.where(number)
        item: dict[str, Any] = {"id": f"{file}:{record}", "file": file, "record": record, "images": ()}
        try:
            sample = self.samples.sample(number)
            item |= {"id": sample.id, "images": sample.images}
            check_images(sample.messages, len(sample.images))
            encoded = encode_conversation(self.processor, sample.messages, max_length=self.max_length)
        except SourceError:
            raise
        except DataError as error:
            return {**item, "error": str(error)}
        return {**item, "input_ids": encoded.input_ids, "labels": encoded.labels}


def grouped(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Samples about the same images, `size` at most together; in order of their images' first appearance."""
    return [[samples[number] for number in group] for group in _groups(as_samples(samples), size)]


def _groups(samples: Samples, size: int) -> list[list[int]]:
    """Numbers of samples of one source about the same images; all samples are read for it."""
    by_images: dict[Hashable, list[int]] = {}
    for number in range(len(samples)):
        part = samples.part_of(number) if isinstance(samples, Mixture) else 0
        try:
            images = samples.sample(number).images
        except SourceError:
            raise
        except DataError:
            images = ()  # reported when the sample is needed
        by_images.setdefault((part, images) if images else number, []).append(number)
    found = [same[i : i + size] for same in by_images.values() for i in range(0, len(same), size)]
    return sorted(found, key=lambda group: samples.part_of(group[0])) if isinstance(samples, Mixture) else found


def stack_features(images: Sequence[Key], features: Callable[[Key], Features]) -> dict[str, Tensor]:
    """Encoder output of the images, each once: tokens (U, P+N, D), cls_attention (U, H, N), hidden_layers.

    hidden_layers are (U, K, P+N, D); image_index (I,) says which of the U each of the I images is. They are known by
    path or name. One copy is made, in a loader's worker straight into the memory that it shares with the main process.
    """
    # Of each of the U images (P+N, D), (H, N), ...; the collation puts U in front.
    found = {one: {k: v for k, v in features(one).items() if v is not None} for one in dict.fromkeys(images)}
    place = {one: number for number, one in enumerate(found)}
    return {**default_collate([*found.values()]), "image_index": torch.tensor([place[one] for one in images])}


def padding_id(tokenizer: Any) -> int:
    """The id that rows are padded with: the end token's, where the tokenizer has none for padding."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class BatchError(WorkerError):
    """A batch that cannot be made."""


class Collator:
    """Items of a `ConversationDataset` -> one batch (B samples of at most L tokens, with I images in all).

    - `input_ids`, `attention_mask`, `labels`: (B, L), padded on the right
    - `pixel_values`: (I, 3, height, width) from the processor's image processor; or, when `features` gives
      what a frozen encoder made of a path, `vision_features` as `stack_features` makes them. A batch without
      images has neither.
    - `sample_ids`: list of B, for error messages (not for the model)
    - with `packing`, several samples stand in a row: `position_ids` (rows, L), which begin anew with each sample, take
      the place of `attention_mask`

    The first usable item of `dataset` takes the place of a batch of which nothing can be used: always the same one,
    since what came before differs after a resume and between workers. Errors: `BatchError` when there is none, when
    there is nothing to learn, when placeholders and images disagree, and `SkipLog.check`'s when too many are bad.
    """

    def __init__(
        self,
        processor: Any,
        *,
        features: Callable[[Path], Features] | Mapping[Path, Features] | None = None,
        skip_log: SkipLog | None = None,
        dataset: ConversationDataset | None = None,
        packing: Packing | None = None,
    ) -> None:
        self.processor = processor
        self.features = features.__getitem__ if isinstance(features, Mapping) else features
        self.skip_log = skip_log
        self.dataset = dataset
        self.packing = packing
        self._first_usable: list[Opened] | None = None

    def __call__(self, groups: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
        """The batch, without the samples that cannot be used."""
        try:
            return self._batch([item for group in groups for item in group])
        except DataError as error:
            raise BatchError(str(error)) from error

    def _batch(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        good, reason = self._usable(items)
        good = good or self._replacement()  # a batch cannot be empty
        if not good:
            raise DataError(f"no usable sample in the batch {_names(items)}: {reason}")
        if self.packing is not None:
            rows = self.packing.rows([len(item["input_ids"]) for item, _ in good])
            good = [good[number] for row in rows for number in row]  # images are taken in the order of the rows
        images = [image for _, opened in good for image in opened]
        good_items = [item for item, _ in good]
        pad = padding_id(self.processor.tokenizer)
        batch = self._text(good_items) if self.packing is None else packed_text(good_items, map(len, rows), pad)
        self._check(batch, len(images), good_items)
        return {**batch, **self._vision(images), "sample_ids": [item["id"] for item in good_items]}

    def _usable(self, items: list[dict[str, Any]]) -> tuple[list[Opened], str]:
        """The items whose images open, with these; and why the last of the others did not."""
        good, reason = [], "the batch is empty"
        for item in items:
            try:
                good.append((item, self._open(item)))
            except DataError as error:
                reason = str(error)
                self._skip(item, error)
        return good, reason

    def _replacement(self) -> list[Opened]:
        """What is good of the first item of the data set that has any."""
        if self._first_usable is None:
            groups = () if self.dataset is None else map(self.dataset.__getitem__, range(len(self.dataset)))
            self._first_usable = next(filter(None, (self._usable(group)[0] for group in groups)), [])
        return self._first_usable

    def _open(self, item: dict[str, Any]) -> list[tuple[ImageReference, Any]]:
        """The images of an item, or what the encoder made of them."""
        if "error" in item:
            raise DataError(item["error"])
        return [(path, (self.features or load_image)(path)) for path in item["images"]]

    def _skip(self, item: dict[str, Any], error: DataError) -> None:
        if self.skip_log is None:
            raise DataError(f"sample {item['id']}: {error}") from error
        self.skip_log.skip(item["file"], item["record"], str(error))
        self.skip_log.check()

    def _text(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        pad = padding_id(self.processor.tokenizer)
        rows = [torch.tensor(item["input_ids"]) for item in items]
        labels = [torch.tensor(item["labels"]) for item in items]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        }

    def _check(self, batch: dict[str, Tensor], num_images: int, items: list[dict[str, Any]]) -> None:
        """Placeholders are counted after all else, as the model will see them."""
        per_image = self.processor.num_placeholders
        written = int((batch["input_ids"] == self.processor.image_token_id).sum())
        if written != num_images * per_image:
            raise DataError(
                f"{written} image tokens but {num_images} images x {per_image} in the batch {_names(items)}; "
                "was the processor's num_visual_tokens changed after encoding?"
            )
        if not (batch["labels"] != IGNORE).any():
            raise DataError(f"nothing to learn in the batch {_names(items)}: every label is {IGNORE}")

    def _vision(self, images: list[tuple[ImageReference, Any]]) -> dict[str, Any]:
        if not images:
            return {}
        if self.features is None:
            opened = [image for _, image in images]
            return {"pixel_values": self.processor.image_processor(opened, return_tensors="pt")["pixel_values"]}
        return {"vision_features": stack_features([path for path, _ in images], dict(images).__getitem__)}


def _names(items: Sequence[dict[str, Any]]) -> str:
    return ", ".join(str(item["id"]) for item in items)
