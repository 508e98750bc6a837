"""A budget for a call or for each image: its names, what may be asked, that the answer is the one of that number."""

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoProcessor

from acformer.connectors import Geometry, build_connector
from acformer.errors import UsageError
from acformer.hf.budgets import Budgets, runs
from acformer.hf.checkpoints import load_model

TEXT = "USER: <image>\nWhat? ASSISTANT:"


def processor(**kwargs):
    return tiny.processor(budgets=[[2, 17]], **kwargs)


def count(inputs) -> list[int]:
    image_token = tiny.tokenizer().convert_tokens_to_ids("<image>")
    return [list(row).count(image_token) for row in np.asarray(inputs["input_ids"]).tolist()]


@pytest.mark.parametrize("name", tiny.CONNECTORS)
def test_a_connector_gives_what_it_says(name):
    """Every number in its budgets, and around them no other."""
    model = tiny.model(name)
    connector, config = model.model.connector, model.config
    pixels = torch.zeros(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    features = model.get_vision_features(pixels)
    said = set(connector.budgets)
    assert connector.num_tokens in said
    assert list(connector.budgets) == sorted(said)
    assert [number for first, last in config.budgets for number in range(first, last + 1)] == sorted(said)
    for number in range(1, 19):
        if number in said:
            assert connector(features, number).shape[1] == number
        else:
            with pytest.raises((UsageError, RuntimeError)):
                connector(features, number)


def test_a_large_connector_says_it_at_once():
    with torch.device("meta"):
        connector = build_connector("acformer", Geometry(1024, 4096, (24, 24), 1))
        pooling = build_connector("pooling_pr", Geometry(1024, 4096, (24, 24), 1))
    assert runs(connector.budgets) == [(2, 577)]
    assert {2, 145, 577} < set(pooling.budgets)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_image_tokens": 9},
        {"num_visual_tokens": 9},
        {"images_kwargs": {"num_image_tokens": 9}},
        {"max_soft_tokens": 9},
        {"images_kwargs": {"max_soft_tokens": 9}},
    ],
)
def test_names_of_a_budget(asked):
    inputs = processor()(tiny.picture(), TEXT, **asked)
    assert count(inputs) == [9]
    assert inputs["num_visual_tokens"] == 9


@pytest.mark.parametrize(("detail", "wanted"), [("low", 2), ("high", 10), ("auto", 5)])
def test_detail(detail, wanted):
    inputs = processor()(tiny.picture(), TEXT, detail=detail)
    assert count(inputs) == [wanted]
    assert inputs.get("num_visual_tokens", 5) == wanted
    fixed = tiny.processor(budgets=[[5, 5]])  # a wish, which a connector of one number cannot grant
    assert count(fixed(tiny.picture(), TEXT, detail=detail)) == [5]


def test_a_ceiling_need_not_be_a_budget():
    grid = tiny.processor(4, budgets=[[1, 4], [6, 6], [8, 9], [12, 12], [16, 16]])
    for most, wanted in ((5, 4), (7, 6), (11, 9), (99, 16)):
        assert count(grid(tiny.picture(), TEXT, max_soft_tokens=most)) == [wanted]
    with pytest.raises(UsageError, match="max_soft_tokens 1 is less than the connector can give: 2 to 17"):
        processor()(tiny.picture(), TEXT, max_soft_tokens=1)


def test_what_cannot_be_given_is_told():
    for text, images in ((TEXT, tiny.picture()), ("Who?", None)):
        with pytest.raises(UsageError, match="the connector cannot give 18 visual tokens; it can give 2 to 17"):
            processor()(images, text, num_image_tokens=18)
    grid = tiny.processor(4, budgets=[[1, 4], [6, 6]])
    with pytest.raises(UsageError, match="cannot give 5 visual tokens; it can give 1 to 4, 6"):
        grid(tiny.picture(), TEXT, images_kwargs={"num_image_tokens": 5})
    for wrong in (0, -3, "nine", 2.5, True):
        with pytest.raises(UsageError, match="whole number from 1 on"):
            processor()(tiny.picture(), TEXT, num_image_tokens=wrong)
    with pytest.raises(UsageError, match="detail is one of low, auto, high, got 'medium'"):
        processor()(tiny.picture(), TEXT, detail="medium")
    with pytest.raises(UsageError, match="give one of num_visual_tokens and detail"):
        processor()(tiny.picture(), TEXT, num_visual_tokens=9, detail="low")
    with pytest.raises(UsageError, match="2 values for 1 images"):
        processor()(tiny.picture(), TEXT, num_image_tokens=[9, 4])
    with pytest.raises(UsageError, match="does not say what its model's connector can give"):
        tiny.processor()(tiny.picture(), TEXT, num_image_tokens=9)


def test_a_budget_for_each_image():
    texts = ["<image><image> Which?", "Who?", TEXT]
    images = [tiny.pictures([0, 1]), [], [tiny.picture(2)]]
    inputs = processor()(images, texts, num_image_tokens=[9, None, 3], return_tensors="pt", padding=True)
    assert count(inputs) == [14, 0, 3]
    assert inputs["num_visual_tokens"].tolist() == [9, 5, 3]
    same = processor()(images, texts, num_image_tokens=torch.tensor([9, 9, 9]), return_tensors="pt", padding=True)
    assert same["num_visual_tokens"] == 9
    own = processor()(images, texts, num_image_tokens=[5, None, 5], return_tensors="pt", padding=True)
    assert "num_visual_tokens" not in own
    details = processor()(images, texts, detail=["high", "low", "auto"], return_tensors="pt", padding=True)
    assert details["num_visual_tokens"].tolist() == [10, 2, 5]


@pytest.mark.parametrize("connector", ["acformer", "c_abstractor"])
def test_a_mixed_batch_answers_as_each_alone(connector):
    model = tiny.model(connector)
    own = model.model.connector.num_tokens
    writer = tiny.processor(own, budgets=model.config.budgets)
    texts = ["<image><image> Which?", "Who?", TEXT, TEXT]
    images = [tiny.pictures([0, 1]), [], [tiny.picture(2)], [tiny.picture(3)]]
    budgets = [9, None, 16, 2]
    greedy = {"max_new_tokens": 6, "do_sample": False}
    inputs = writer(images, texts, num_image_tokens=budgets, return_tensors="pt", padding=True, padding_side="left")
    together = model.generate(**inputs, **greedy)[:, inputs["input_ids"].shape[1] :]
    rest = list(budgets)
    for row, (text, pictures) in enumerate(zip(texts, images, strict=True)):
        taken, rest = rest[: len(pictures)], rest[len(pictures) :]
        alone = writer(pictures or None, text, num_image_tokens=taken or None, return_tensors="pt")
        said = model.generate(**alone, **greedy)[0, alone["input_ids"].shape[1] :]
        assert together[row][: len(said)].tolist() == said.tolist(), row


def test_shared_images_at_several_budgets():
    """`image_index`: prompts that share a picture, each at its own T."""
    model = tiny.model()
    pixels = processor().image_processor(tiny.pictures([0, 1]), return_tensors="pt")["pixel_values"]
    features = model.get_vision_features(pixels).arrays
    index = torch.tensor([1, 0, 1, 1])
    with torch.no_grad():
        shared = model.get_image_features(
            vision_features={**features, "image_index": index}, num_visual_tokens=[3, 3, 9, 3], return_dict=True
        ).pooler_output
        for row, tokens, number in zip(index.tolist(), shared, (3, 3, 9, 3), strict=True):
            alone = model.get_image_features(pixels[row : row + 1], num_visual_tokens=number, return_dict=True)
            # Two images in a matmul or one: 1.4e-5 in outputs of 1.3.
            torch.testing.assert_close(tokens, alone.pooler_output[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="num_visual_tokens has 1 values for 2 images"):
        model.get_image_features(pixels, num_visual_tokens=[3])


def test_a_budget_of_the_processor_itself(tmp_path):
    writer = processor()
    writer.num_image_tokens = 9
    assert count(writer(tiny.picture(), TEXT)) == [9]
    assert count(writer(tiny.picture(), TEXT, num_image_tokens=3)) == [3]
    assert count(writer(tiny.picture(), TEXT, num_image_tokens=5)) == [5]
    assert writer._get_num_multimodal_tokens([(1, 1)])["num_image_tokens"] == [9]
    processor().save_pretrained(tmp_path)
    other = AutoProcessor.from_pretrained(tmp_path, num_image_tokens=9)
    assert other.num_placeholders == 5
    inputs = other(tiny.picture(), TEXT)
    assert (count(inputs), inputs["num_visual_tokens"]) == ([9], 9)


def test_what_the_connector_can_give_is_saved(tmp_path):
    model, own = tiny.model(), tiny.processor()  # as of an older version, which does not know
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).sizes == Budgets(5, None)
    _, filled = load_model(str(tmp_path))
    assert filled.sizes == Budgets(5, ((2, 17),))
    filled.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.sizes == Budgets(5, ((2, 17),))
    assert "_request" not in again.to_dict()


def test_for_vllm():
    writer = processor()
    counts = writer._get_num_multimodal_tokens([(10, 20), (300, 5)], num_image_tokens=9)
    assert counts["num_image_tokens"] == [9, 9]
    assert writer._get_num_multimodal_tokens([(1, 1)], detail="high")["num_image_tokens"] == [10]
    with pytest.raises(UsageError, match="it can give 2 to 17"):
        writer._get_num_multimodal_tokens([(10, 20)], num_image_tokens=18)
    for asked, other in ((None, [5, 5]), (9, [9, 9])):  # always a tensor, so that all requests look alike
        inputs = writer(
            tiny.pictures([0, 1]),
            "<image> <image>",
            num_image_tokens=asked,
            return_text_replacement_offsets=True,
            return_tensors="pt",
        )
        assert inputs["num_visual_tokens"].tolist() == other
        assert len(inputs["text_replacement_offsets"][0]) == 2
    gated = tiny.processor(1, fusion="gated_cross_attention")
    with pytest.raises(UsageError, match="vLLM cannot serve fusion 'gated_cross_attention'"):
        gated._get_num_multimodal_tokens([(10, 20)])


def test_beside_the_sequence():
    gated = tiny.processor(1, fusion="gated_cross_attention", budgets=[[2, 17]])
    inputs = gated(tiny.pictures([0, 1]), "<image> <image>", num_image_tokens=9, return_tensors="pt")
    assert count(inputs) == [2]
    assert inputs["num_visual_tokens"] == 9
    with pytest.raises(UsageError, match="one number of visual tokens for all images"):
        gated(tiny.pictures([0, 1]), "<image> <image>", num_image_tokens=[9, 3])
