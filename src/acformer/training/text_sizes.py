"""How many samples a stage has and how long their texts are: read from the data, or known, or assumed.

A plan must not need the data. Where they are here, the first records are read and lengths are estimated as
`acformer.data.lengths` does; LLaVA-1.5's two files are known by their names; anything else is assumed, and said to be.
"""

import mmap
from dataclasses import dataclass, replace
from pathlib import Path

from acformer.data.conversation import split_at_images
from acformer.data.datasets import load_samples, named_dataset
from acformer.data.lengths import BYTES_PER_TOKEN, TOKENS_PER_TURN
from acformer.data.samples import Sample
from acformer.data.skip_log import SkipLog
from acformer.errors import AcFormerError
from acformer.training.recipe import StageSpec

READ = 1000
"""Records of which lengths are taken."""
KEYS = (b'"conversations"', b'"messages"')
"""What every record has one of."""


@dataclass(frozen=True)
class TextSizes:
    """samples: of the stage, None where nobody knows. mean, longest: tokens of a sample's text, images not counted.

    supervised: of the mean, those that are learned.. source: where the
    numbers are from.
    """

    samples: int | None
    mean: int
    supervised: int
    longest: int
    source: str


KNOWN = {
    "blip_laion_cc_sbu_558k.json": TextSizes(558_128, 20, 20, 80, "of LLaVA's file, estimated"),
    "llava_v1_5_mix665k.json": TextSizes(665_298, 240, 137, 2048, "of LLaVA's file, estimated"),
}
"""Numbers of records are LLaVA's; lengths follow from the files' bytes, the mix's as examples/llava_mix.py has them."""


def text_sizes(spec: StageSpec, template: str) -> TextSizes:
    """Of a stage; `template`: its chat template, of which `plain` renders answers alone."""
    try:
        found = _read(spec, plain=template == "plain")
    except (AcFormerError, OSError):
        found = KNOWN.get(Path(spec.data).name) or _assumed(template)
    if spec.max_samples is not None:
        found = replace(found, samples=min(spec.max_samples, found.samples or spec.max_samples))
    return found


def _read(spec: StageSpec, *, plain: bool) -> TextSizes:
    limit = min(READ, spec.max_samples or READ)
    skipped = SkipLog(max_bad_fraction=1.0)
    samples = load_samples(spec.data, image_root=spec.image_root, skipped=skipped, limit=limit)
    learned = [_tokens(sample, {"assistant"}) for sample in samples]
    lengths = learned if plain else [_tokens(sample, {"system", "user", "assistant"}) for sample in samples]
    return TextSizes(
        samples=_count(spec, len(samples), limit),
        mean=round(sum(lengths) / len(lengths)),
        supervised=round(sum(learned) / len(learned)),
        longest=max(lengths),
        source=f"the first {len(samples)} samples of {spec.data}",
    )


def _tokens(sample: Sample, roles: set[str]) -> int:
    texts = ["".join(split_at_images(message)) for message in sample.messages if message["role"] in roles]
    return sum(len(text.encode()) // BYTES_PER_TOKEN + TOKENS_PER_TURN for text in texts)


def _count(spec: StageSpec, read: int, limit: int) -> int:
    """All samples: those that were read where there are no more, else a file's records, counted by their keys."""
    if read < limit or read == spec.max_samples:
        return read
    if named_dataset(spec.data) is not None:
        return len(load_samples(spec.data, skipped=SkipLog(max_bad_fraction=1.0), limit=spec.max_samples))
    with Path(spec.data).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return sum(_occurrences(text, key) for key in KEYS)


def _occurrences(text: mmap.mmap, key: bytes) -> int:
    count, at = 0, text.find(key)
    while at >= 0:
        count, at = count + 1, text.find(key, at + len(key))
    return count


def _assumed(template: str) -> TextSizes:
    if template == "plain":
        return TextSizes(None, 30, 30, 120, "assumed: captions")
    return TextSizes(None, 250, 150, 2048, "assumed: dialogues")
