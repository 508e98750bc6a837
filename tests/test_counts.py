"""What the speed rests on, as counts that are the same on every machine: calls, blocks, bytes, encoder passes."""

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acformer.anchors.search import select_anchors
from acformer.vision.encoder import load_vision_encoder

BATCH, HEADS, PATCHES, PREFIX = 2, 4, 64, 1
KEYS = PREFIX + PATCHES
VIEWS = {"detach", "expand", "split", "view"}
BLOCKS = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"}


@pytest.mark.parametrize("num_heads", [1, 2, 12, 16])
@pytest.mark.parametrize("num_anchors", [16, 145])
def test_calls_of_the_selector(num_heads, num_anchors, record_ops):
    """Three ATen calls a head and 16 beside them, of which 2 H + 12 do work and the rest are views.

    (Before keys replaced ranks: 5 H + 13.) On an accelerator three of the 12, the look for NaN, are not made.
    """
    scores = torch.rand(BATCH, num_heads, 576)
    with record_ops() as record:
        select_anchors(scores, num_anchors)
    assert len(record.ops) <= 3 * num_heads + 16
    assert sum(op not in VIEWS for op in record.ops) <= 2 * num_heads + 12


@pytest.mark.parametrize("feature_layer", [-2, 1])
def test_blocks_of_the_encoder(feature_layer, make_tower, record_ops):
    """One attention a block, up to the feature layer."""
    encoder, pixels = large(make_tower, feature_layer)
    with record_ops() as record, torch.no_grad():
        encoder(pixels)
    assert sum(op in BLOCKS for op in record.ops) == {-2: 3, 1: 1}[feature_layer]


class Materialised(TorchDispatchMode):
    """Shapes and bytes of the tensors that get memory of their own, and not another's."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[tuple[int, ...], int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.bytes[tuple(leaf.shape)] = max(leaf.nbytes, self.bytes.get(tuple(leaf.shape), 0))
        return output

    def of_attention(self) -> int:
        """Bytes of the largest tensor whose last axis is the keys and whose last but one is queries, not channels."""
        maps = [size for shape, size in self.bytes.items() if shape[-1:] == (KEYS,) and shape[-2] in (1, KEYS)]
        return max(maps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_bytes_of_attention(kernel, dtype, make_tower):
    """A row of B H (P+N) float32 numbers; the eager kernel, which forms every map, has (P+N) times as many."""
    encoder, pixels = large(make_tower, attn_implementation=kernel)
    with Materialised() as record, torch.no_grad():
        encoder.to(dtype)(pixels.to(dtype))
    row = BATCH * HEADS * KEYS * 4
    assert record.of_attention() == (row if kernel == "sdpa" else row * KEYS)


def large(make_tower, feature_layer: int = -2, **fields):
    """An encoder of 8 x 8 patches, whose 65 tokens are no width of it, and noise for it."""
    tower = make_tower("clip_vision_model", image_size=56, **fields)
    return load_vision_encoder(tower, feature_layer), torch.randn(BATCH, 3, 56, 56)


def test_encoder_passes_of_an_answer():
    """One, however many tokens are generated and however often the prompts show the picture."""
    model, passes = tiny.model(), []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: passes.append(args))
    batch = tiny.inputs("<image> what?", tiny.picture())
    model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert len(passes) == 1
    features = model.get_vision_features(batch["pixel_values"])
    both = tiny.inputs(["<image> what?", "<image> is it red?"], tiny.pictures([0, 0]))
    shared = {**features.arrays, "grid": features.grid, "image_index": torch.tensor([0, 0])}
    del both["pixel_values"]
    passes.clear()
    model.generate(**both, vision_features=shared, max_new_tokens=2, do_sample=False)
    assert not passes
