"""How many samples a stage has and how long their texts are: read from the data, or known, or assumed.

A plan must not need the data. Where they are here, the first records are read and lengths are estimated as
`acformer.data.lengths` does; LLaVA-1.5's two files are known by their names; anything else is assumed, and said to be.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from acformer.data.conversation import split_at_images
from acformer.data.datasets import load_samples, open_samples
from acformer.data.entries import data_entries, data_title
from acformer.data.lengths import BYTES_PER_TOKEN, TOKENS_PER_TURN
from acformer.data.mixture import weighted_size
from acformer.data.samples import Sample
from acformer.data.skip_log import SkipLog
from acformer.errors import AcFormerError, DataError
from acformer.training.recipe import StageSpec

READ = 1000
"""Records of which lengths are taken."""


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
        found = KNOWN.get(Path(data_title(spec.data)).name) or _assumed(template)
    if spec.max_samples is not None:
        found = replace(found, samples=min(spec.max_samples, found.samples or spec.max_samples))
    return found


def _read(spec: StageSpec, *, plain: bool) -> TextSizes:
    if data_entries(spec.data)[0].streaming:
        raise DataError("a plan does not read streams")
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
        source=f"the first {len(samples)} samples of {data_title(spec.data)}",
    )


def _tokens(sample: Sample, roles: set[str]) -> int:
    texts = ["".join(split_at_images(message)) for message in sample.messages if message["role"] in roles]
    return sum(len(text.encode()) // BYTES_PER_TOKEN + TOKENS_PER_TURN for text in texts)


def _count(spec: StageSpec, read: int, limit: int) -> int:
    """All samples of an epoch: those that were read where there are no more."""
    if read < limit or read == spec.max_samples:
        return read
    samples = open_samples(spec.data, image_root=spec.image_root, limit=spec.max_samples)
    return weighted_size(samples.counts, samples.weights)


def _assumed(template: str) -> TextSizes:
    if template == "plain":
        return TextSizes(None, 30, 30, 120, "assumed: captions")
    return TextSizes(None, 250, 150, 2048, "assumed: dialogues")
