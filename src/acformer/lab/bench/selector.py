"""`bench selector`: what choosing T of N patches costs, every selector beside a copy of the scores it reads."""

from functools import partial

import torch

from acformer.anchors.search import select_anchors_torch
from acformer.anchors.selectors import SELECTORS
from acformer.lab.bench import release_baseline
from acformer.lab.bench.settings import Settings
from acformer.lab.bench.timing import Result, Variant, timed_rows
from acformer.vision.features import VisionFeatures


def rows(settings: Settings) -> list[Result]:
    """One a batch, T and way: every selector, and the authors' loop. `ratio` is to the copy of the same round.

    The copy stands in for the roofline: scores sit in caches, so the rate of memory would give no lower bound.
    """
    found = []
    for batch in settings.batch:
        for tokens in settings.tokens:
            known = selector_variants(settings, batch, tokens - 1)
            variants = [({"batch": batch, "chosen": tokens - 1, "way": name}, known[name]) for name in known]
            label = ("batch", batch, "T", tokens)
            with torch.inference_mode():
                found += timed_rows(settings, variants, {"way": "copy"}, label=label, calls=True)
    return found


def selector_variants(settings: Settings, batch: int, num: int) -> dict[str, Variant]:
    """`copy`: of the scores (B, H, N), nothing chosen. `authors`: see `bench.release_baseline.select`."""
    geometry, heads = settings.preset.geometry, settings.preset.config.vision_config.num_attention_heads
    length = geometry.num_prefix_tokens + geometry.num_patches
    tokens = torch.randn(batch, length, geometry.vision_hidden_size, device=settings.device, dtype=settings.dtype)
    row = torch.randn(batch, heads, geometry.num_patches, device=settings.device).softmax(-1)
    features = VisionFeatures(tokens, row, geometry.grid, geometry.num_prefix_tokens)
    variants = {"copy": Variant(row.clone)}
    for name, selector in SELECTORS.items():
        variants[name] = Variant(partial(selector, features, num))
    if row.is_cuda:  # there the anchors have a kernel of their own
        variants["anchors (torch)"] = Variant(partial(select_anchors_torch, row, num))
    variants["authors"] = Variant(partial(release_baseline.select, row, num))
    return variants
