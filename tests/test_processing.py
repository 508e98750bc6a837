"""The processor: one `<image>` becomes T image tokens, whatever the picture; what it refuses; what it saves."""

import json
import socket
from importlib.metadata import version

import numpy as np
import pytest
import tiny
import torch
from packaging.version import Version
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor

from acformer.data.conversation import encode_prompt
from acformer.errors import ImageError
from acformer.hf import AcFormerProcessor

TEXT = "USER: <image>\nWhat? ASSISTANT:"


@pytest.fixture
def processor():
    return tiny.processor()


def count(processor, inputs) -> list[int]:
    """Image tokens in every row."""
    return [ids.count(processor.image_token_id) for ids in map(list, inputs["input_ids"])]


def test_an_image_tag_becomes_image_tokens(processor):
    inputs = processor(tiny.picture(), TEXT)
    before, after = TEXT.split("<image>")
    written = processor.tokenizer.decode(inputs["input_ids"][0])
    assert written == before + "<image>" * 5 + after
    assert np.array(inputs["pixel_values"]).shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)


@pytest.mark.parametrize("size", [(1, 1), (40, 3), (16, 16), (7, 50)])
def test_size_and_shape_of_a_picture_change_nothing(processor, size):
    inputs = processor(tiny.picture(size=size), TEXT)
    assert count(processor, inputs) == [5]
    assert np.array(inputs["pixel_values"]).shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch(processor, padding_side):
    texts = [TEXT, "<image><image> Which?", "Who?"]
    images = [[tiny.picture(0)], tiny.pictures([1, 2]), []]
    inputs = processor(images, texts, return_tensors="pt", padding=True, padding_side=padding_side)
    assert count(processor, {"input_ids": inputs["input_ids"].tolist()}) == [5, 10, 0]
    alone = processor(tiny.pictures([0, 1, 2]), "<image>" * 3, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], alone["pixel_values"])
    for row, (text, pictures) in enumerate(zip(texts, images, strict=True)):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        assert ids.tolist() == processor(pictures or None, text)["input_ids"][0]


def test_text_alone(processor):
    inputs = processor(text="Who?")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"] == [processor.tokenizer("Who?")["input_ids"]]


def test_another_budget_for_one_call(processor):
    inputs = processor(tiny.picture(), TEXT, num_visual_tokens=12)
    assert count(processor, inputs) == [12]
    assert inputs["num_visual_tokens"] == 12
    own = processor(tiny.picture(), TEXT, num_visual_tokens=5)
    assert count(processor, own) == count(processor, processor(tiny.picture(), TEXT)) == [5]
    assert "num_visual_tokens" not in own
    assert processor.num_placeholders == 5


@pytest.mark.parametrize(("tags", "images"), [(0, 1), (1, 0), (1, 2), (2, 1)])
def test_tags_and_images_must_agree(processor, tags, images):
    with pytest.raises(ValueError, match=r"(?i)image"):
        processor(tiny.pictures(range(images)) or None, "Look: " + "<image>" * tags, return_tensors="pt")


def test_each_prompt_has_its_own_images(processor):
    """Not only as many as there are tags in all: row 1 would read the picture of row 0."""
    first, second, third = tiny.pictures([0, 1, 2])
    texts = [TEXT, "<image><image> Which?"]
    with pytest.raises(ValueError, match="row 0: its prompt holds 1 <image> tags, its images are 2"):
        processor([[first, second], [third]], texts)
    with pytest.raises(ValueError, match="row 1: its prompt holds 2 <image> tags, its images are 1"):
        processor([[first], [second]], texts)
    with pytest.raises(ValueError, match="1 lists of images for 2 prompts"):
        processor([[first, second, third]], texts)
    nested, flat = (processor(images, texts) for images in ([[first], [second, third]], [first, second, third]))
    assert np.array_equal(nested["pixel_values"], flat["pixel_values"])


@pytest.mark.parametrize("images", [[], [[]], [[], []]])
def test_no_images_at_all(processor, images):
    texts = ["Who?"] * max(1, len(images))
    assert processor(images, texts) == processor(None, texts)
    with pytest.raises(ValueError, match="<image>"):
        processor(images, [TEXT] * len(texts))


def test_the_begin_token_is_written_once():
    """With a tokenizer that adds one, as Vicuna's: the prompt that training saw."""
    processor = tiny.processor()
    begin = processor.tokenizer.bos_token_id
    adds = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)])
    processor.tokenizer.backend_tokenizer.post_processor = adds
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": parts}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    trained = encode_prompt(processor, chat)
    assert trained.count(begin) == 1
    assert processor(tiny.picture(), prompt)["input_ids"] == [trained]
    assert processor(tiny.pictures([0, 1]), [prompt, prompt])["input_ids"] == [trained, trained]
    assert processor(tiny.picture(), prompt, num_visual_tokens=2)["input_ids"][0].count(begin) == 1
    assert processor(text="Who?")["input_ids"][0][0] == begin
    assert processor(tiny.picture(), prompt, add_special_tokens=True)["input_ids"][0].count(begin) == 2
    assert (
        processor(tiny.picture(), prompt, text_kwargs={"add_special_tokens": True})["input_ids"][0][:2] == [begin] * 2
    )


def test_truncation_into_the_image_is_refused(processor):
    with pytest.raises(ValueError, match="truncation"):
        processor(tiny.picture(), TEXT, truncation=True, max_length=6)


def test_a_tokenizer_without_the_token_is_refused(processor):
    with pytest.raises(ValueError, match="no '<picture>' token; add it"):
        AcFormerProcessor(processor.image_processor, processor.tokenizer, image_token="<picture>")


def test_saved_and_loaded(processor, tmp_path):
    processor = tiny.processor(num_placeholders=12, image_size=24)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["num_placeholders"] == 12
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, AcFormerProcessor)
    assert again.to_dict() == processor.to_dict()
    assert again.chat_template == processor.chat_template
    expected, got = (one(tiny.picture(), TEXT, return_tensors="pt") for one in (processor, again))
    assert all(torch.equal(got[key], value) for key, value in expected.items())


@pytest.mark.parametrize("tokens", [None, 2])
def test_chat_template_takes_content_lists(processor, tokens):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": tiny.picture()}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        {"role": "user", "content": "And?"},
    ]
    written = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert written.endswith("USER: <image>\nWhat? ASSISTANT: Red.</s>USER: And? ASSISTANT:")
    options = {"processor_kwargs": {"num_visual_tokens": tokens}} if tokens else {}
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    expected = processor(tiny.picture(), written, return_tensors="pt", num_visual_tokens=tokens)
    assert set(inputs) == set(expected)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_files_are_opened_by_load_image(processor, tmp_path):
    """Transparency on white, where transformers shows the colour that lies hidden in it."""
    path = tmp_path / "clear.png"
    Image.new("RGBA", (20, 14), (255, 0, 0, 0)).save(path)
    white = processor(Image.new("RGB", (20, 14), "white"), TEXT)["pixel_values"]
    for source in (path, str(path), path.read_bytes(), [path], [[str(path)]]):
        assert np.array_equal(processor(source, TEXT)["pixel_values"], white)
    for part in ({"image": str(path)}, {"image": path}, {"path": str(path)}, {"url": str(path)}):
        chat = [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "What?"}]}]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        assert np.array_equal(inputs["pixel_values"], white)
    with pytest.raises(ImageError, match=r"cannot be read .*gone\.png"):
        processor(str(tmp_path / "gone.png"), TEXT)


def test_what_pil_has_opened_is_taken_as_its_file(processor, tmp_path):
    """A photograph of a phone is upright, sixteen bits keep their levels, transparency is white."""
    exif = Image.Exif()
    exif[274] = 6
    photo, deep, clear = tmp_path / "photo.jpg", tmp_path / "deep.png", tmp_path / "clear.png"
    tiny.picture(size=(40, 20)).save(photo, exif=exif)
    Image.fromarray((np.arange(14 * 20).reshape(14, 20) * 200).astype(np.uint16)).save(deep)
    Image.new("LA", (20, 14), (40, 100)).save(clear)
    for path in (photo, deep, clear):
        by_path = processor(path, TEXT)["pixel_values"]
        for opened in (Image.open(path), [Image.open(path)], [[Image.open(path)]]):
            assert np.array_equal(processor(opened, TEXT)["pixel_values"], by_path)
        part = {"type": "image", "image": Image.open(path)}
        chat = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        assert np.array_equal(inputs["pixel_values"], by_path)


def test_prompts_and_images_in_the_other_order(processor, tmp_path, caplog):
    path = tmp_path / "a.png"
    tiny.picture().save(path)
    expected = processor(tiny.picture(), TEXT)
    array = np.asarray(tiny.picture())
    for image in (tiny.picture(), path, str(path), path.read_bytes(), array, [str(path)], [[path]]):
        inputs = processor([TEXT] if isinstance(image, list) else TEXT, image)
        assert inputs["input_ids"] == expected["input_ids"]
        assert np.array_equal(inputs["pixel_values"], expected["pixel_values"])
    assert len(caplog.records) == 7
    assert {record.getMessage() for record in caplog.records} == {
        "prompts were given as images and images as text: call processor(images=..., text=...)"
    }
    for images, text in ((TEXT, None), (TEXT, TEXT), ([TEXT], [TEXT])):
        with pytest.raises(ValueError, match=r"was given as an image: call processor\(images=\.\.\., text=\.\.\.\)"):
            processor(images, text)


def test_the_right_order_is_left_alone(processor, tmp_path, caplog):
    tiny.picture().save(tmp_path / "a.png")
    processor(str(tmp_path / "a.png"), TEXT)
    processor([str(tmp_path / "a.png")], [TEXT])
    processor(None, "no image")
    processor(text=["no", "image"], padding=True)
    assert not caplog.records


def test_nothing_is_fetched(processor, monkeypatch):
    def connect(*address):
        raise AssertionError(address)

    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    url = "http://example.org/a.png"
    for source in (url, [url], [[url]]):
        with pytest.raises(ImageError, match=f"remote URLs are off, download it first: {url}"):
            processor(source, TEXT)
    for part in (
        {"type": "image", "url": url},
        {"type": "image", "image": url},
        {"type": "image_url", "image_url": {"url": url}},
    ):
        chat = [{"role": "user", "content": [part]}]
        for given in (chat, [chat, chat]):
            with pytest.raises(ImageError, match="remote URLs are off"):
                processor.apply_chat_template(given, tokenize=True, return_dict=True)
    for kind in ("audio", "video"):
        chat = [{"role": "user", "content": [{"type": kind, "url": url}]}]
        with pytest.raises(ValueError, match=f"holds text and images, not {kind}"):
            processor.apply_chat_template([chat], tokenize=True, return_dict=True)


@pytest.mark.skipif(Version(version("transformers")) < Version("5.18"), reason="image tokens shift the mask")
def test_the_answers_can_be_masked(processor):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": tiny.picture()}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    said = inputs["input_ids"][inputs["assistant_masks"].bool()]
    assert processor.tokenizer.decode(said).strip() == "Red.</s>"


def test_token_counts_for_servers(processor):
    counts = processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (300, 5)])
    assert counts["num_image_tokens"] == [5, 5]
    assert counts["num_image_patches"] == [1, 1]
    assert processor._get_num_multimodal_tokens()["num_image_tokens"] == []


def test_names_of_the_inputs(processor):
    assert {"input_ids", "attention_mask", "pixel_values"} <= set(processor.model_input_names)
