"""What only an accelerator can show: the same answers there as on the CPU, and no waiting for it."""

import pytest
import tiny
import torch

from acformer.anchors import select_anchors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_anchors(dtype):
    scores = torch.rand(8, 16, 576).to(dtype)
    device = torch.accelerator.current_accelerator()
    assert torch.equal(select_anchors(scores.to(device), 144).cpu(), select_anchors(scores, 144))


def test_nan_ranks_lowest():
    scores = torch.rand(2, 4, 32, device=torch.accelerator.current_accelerator())
    scores[:, :, 5] = float("nan")
    assert not (select_anchors(scores, 31) == 5).any()


@pytest.mark.parametrize("connector", tiny.CONNECTORS)
def test_the_same_answer(connector):
    batch = tiny.inputs("<image> what?", tiny.picture(), num_image_tokens=tiny.model(connector).config.num_image_tokens)
    model = tiny.model(connector)
    expected = model.generate(**batch, max_new_tokens=8, do_sample=False)
    there = model.to(torch.accelerator.current_accelerator())
    assert torch.equal(there.generate(**batch.to(there.device), max_new_tokens=8, do_sample=False).cpu(), expected)


def test_features_from_the_cpu_are_moved():
    model = tiny.model()
    batch = tiny.inputs("<image> what?", tiny.picture())
    with torch.no_grad():
        features = model.get_vision_features(batch.pop("pixel_values"))
    model.to(torch.accelerator.current_accelerator(), torch.bfloat16)
    logits = model(**batch.to(model.device), vision_features=features).logits
    assert logits.isfinite().all()
