"""Batches: shapes, padding, images in order, and what happens to samples that cannot be used."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_conversation import T, make_processor
from torch.utils.data import DataLoader

from acformer.data.collate import Collator, ConversationDataset, grouped
from acformer.data.conversation import IGNORE, encode_conversation
from acformer.data.sources import Sample, SkipLog
from acformer.errors import DataError


def image_processor(images, return_tensors):
    """The red of the first pixel, as a picture of 3 x 2 x 2."""
    assert return_tensors == "pt"
    reds = torch.tensor([image.getpixel((0, 0))[0] for image in images], dtype=torch.float32)
    return {"pixel_values": reds[:, None, None, None].expand(-1, 3, 2, 2)}


@pytest.fixture
def processor():
    return SimpleNamespace(**vars(make_processor("bytes", "vicuna_v1")), image_processor=image_processor)


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{red}.png" for red in (10, 20, 30)]
    for path in paths:
        Image.new("RGB", (4, 4), (int(path.stem), 0, 0)).save(path)
    return paths


def make_sample(key, *images: Path, answer="red"):
    parts = [*[{"type": "image"}] * len(images), {"type": "text", "text": f"What is {key}?"}]
    messages = ({"role": "user", "content": parts}, {"role": "assistant", "content": answer})
    return Sample(key, messages, images, file="data.jsonl", record=ord(key))


def collate(processor, samples, *, max_length=None, **kwargs):
    dataset = ConversationDataset(samples, processor, max_length=max_length)
    return Collator(processor, **kwargs)([dataset[index] for index in range(len(dataset))])


def test_a_mixed_batch(processor, pictures):
    samples = [make_sample("a", pictures[1], pictures[0]), make_sample("b"), make_sample("c", pictures[2])]
    batch = collate(processor, samples)
    assert batch.pop("sample_ids") == ["a", "b", "c"]
    assert batch.pop("pixel_values")[:, 0, 0, 0].tolist() == [20, 10, 30]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for row, sample in enumerate(samples):
        encoded = encode_conversation(processor, sample.messages)
        length = len(encoded.input_ids)
        assert batch["input_ids"][row, :length].tolist() == encoded.input_ids
        assert batch["labels"][row, :length].tolist() == encoded.labels
        assert (batch["input_ids"][row, length:] == processor.tokenizer.pad_token_id).all()
        assert (batch["labels"][row, length:] == IGNORE).all()
        assert batch["attention_mask"][row].sum() == batch["attention_mask"][row, :length].sum() == length


def test_text_only_batches_have_no_vision_key(processor):
    assert set(collate(processor, [make_sample("a")])) == {
        "input_ids",
        "attention_mask",
        "labels",
        "sample_ids",
    }


@pytest.mark.parametrize("as_mapping", [True, False])
def test_cached_features_stand_in_for_pictures(processor, pictures, as_mapping):
    cache = {
        path: {"tokens": torch.full((6, 4), float(path.stem)).half(), "cls_attention": torch.ones(2, 5)}
        for path in pictures
    }
    features = cache if as_mapping else cache.__getitem__
    batch = collate(processor, [make_sample("a", *pictures[1:]), make_sample("b", pictures[0])], features=features)
    assert "pixel_values" not in batch
    vision = batch["vision_features"]
    assert vision["tokens"].shape == (3, 6, 4)
    assert vision["tokens"].dtype == torch.float16
    assert vision["tokens"][:, 0, 0].tolist() == [20, 30, 10]
    assert vision["cls_attention"].shape == (3, 2, 5)
    tokens_only = {path: {"tokens": entry["tokens"], "cls_attention": None} for path, entry in cache.items()}
    batch = collate(processor, [make_sample("a", pictures[0])], features=tokens_only)
    assert set(batch["vision_features"]) == {"tokens", "image_index"}


def test_a_picture_of_several_samples_is_encoded_once(processor, pictures):
    cache = {path: {"tokens": torch.full((6, 4), float(path.stem))} for path in pictures}
    samples = [make_sample("a", pictures[0]), make_sample("b", pictures[1]), make_sample("c", pictures[0])]
    assert [[s.id for s in group] for group in grouped(samples, 2)] == [["a", "c"], ["b"]]
    assert [[s.id for s in group] for group in grouped(samples, 1)] == [["a"], ["c"], ["b"]]
    dataset = ConversationDataset(samples, processor, group=2)
    batch = Collator(processor, features=cache)([dataset[0], dataset[1]])
    assert batch["sample_ids"] == ["a", "c", "b"]
    assert batch["vision_features"]["tokens"][:, 0, 0].tolist() == [10, 20]
    assert batch["vision_features"]["image_index"].tolist() == [0, 0, 1]


def test_samples_without_a_picture_are_not_grouped(processor, pictures):
    samples = [make_sample("a"), make_sample("b", pictures[0]), make_sample("c"), make_sample("d", pictures[0])]
    assert [[s.id for s in group] for group in grouped(samples, 2)] == [["a"], ["b", "d"], ["c"]]


def test_one_bad_sample_in_a_batch_of_one_does_not_end_the_run(processor, pictures, tmp_path):
    log = SkipLog()
    log.offered = 1000
    bad = bad_samples(pictures, tmp_path)
    dataset = ConversationDataset([bad["t"], bad["n"], make_sample("a", pictures[0]), make_sample("b")], processor)
    collator = Collator(processor, skip_log=log, dataset=dataset)
    batches = [collator([dataset[index]]) for index in range(len(dataset))]
    assert [batch["sample_ids"] for batch in batches] == [["a"], ["a"], ["a"], ["b"]]
    assert log.skipped == 2


def test_what_takes_the_place_of_a_bad_batch_does_not_depend_on_what_came_before(processor, pictures, tmp_path):
    """After a resume, and in each worker, another batch came before."""
    log = SkipLog()
    log.offered = 1000
    samples = [make_sample("a", pictures[0]), make_sample("b"), bad_samples(pictures, tmp_path)["t"]]
    dataset = ConversationDataset(samples, processor)
    for before in ([], [0], [1]):
        collator = Collator(processor, skip_log=log, dataset=dataset)
        assert [collator([dataset[index]])["sample_ids"] for index in [*before, 2]][-1] == ["a"]


def bad_samples(pictures, tmp_path):
    (tmp_path / "torn.png").write_bytes(pictures[0].read_bytes()[:40])
    return {
        "t": make_sample("t", tmp_path / "torn.png"),
        "m": make_sample("m", tmp_path / "missing.png"),
        "n": Sample("n", make_sample("n").messages[:1], file="data.jsonl", record=ord("n")),
        "i": Sample("i", make_sample("i").messages, (pictures[0],), file="data.jsonl", record=ord("i")),
    }


def test_bad_samples_are_left_out_and_logged_once(processor, pictures, tmp_path):
    log = SkipLog(tmp_path / "skipped.jsonl", max_bad_fraction=0.5)
    bad = bad_samples(pictures, tmp_path)
    samples = [make_sample("a", pictures[0]), *bad.values(), make_sample("b", pictures[1])]
    log.offered = 8
    for _ in range(2):
        batch = collate(processor, samples, skip_log=log)
        assert batch["sample_ids"] == ["a", "b"]
        assert batch["pixel_values"].shape[0] == batch["input_ids"].shape[0] == 2
    assert (log.used, log.skipped) == (4, 4)
    entries = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    reasons = {chr(entry["record"]): entry["reason"] for entry in entries}
    assert set(reasons) == set(bad)
    assert "torn.png" in reasons["t"]
    assert "missing.png" in reasons["m"]
    assert "no word of the assistant" in reasons["n"]
    assert reasons["i"] == "0 <image> tags but 1 image"


def test_too_many_bad_samples_stop_the_run(processor, pictures, tmp_path):
    log = SkipLog()
    log.offered = 100
    bad = list(bad_samples(pictures, tmp_path).values())
    with pytest.raises(DataError, match="2 of 100 records are bad"):
        collate(processor, [make_sample("a"), *bad], skip_log=log)


def test_a_batch_without_a_usable_sample(processor, pictures, tmp_path):
    log = SkipLog()
    log.offered = 1000
    with pytest.raises(DataError, match=r"no usable sample in the batch t, m: .*missing"):
        collate(processor, list(bad_samples(pictures, tmp_path).values())[:2], skip_log=log)


def test_without_a_log_nothing_is_left_out(processor, pictures, tmp_path):
    with pytest.raises(DataError, match=r"sample t: .*torn"):
        collate(processor, [make_sample("a"), bad_samples(pictures, tmp_path)["t"]])


def test_truncation_into_the_image_is_a_bad_sample(processor, pictures):
    with pytest.raises(DataError, match="sample a: max_length 60 cuts off image tokens"):
        collate(processor, [make_sample("a", pictures[0])], max_length=60)


def test_placeholders_and_images_are_counted_at_the_end(processor, pictures):
    dataset = ConversationDataset([make_sample("a", pictures[0])], processor)
    item = dataset[0]
    processor.num_placeholders = 7
    with pytest.raises(DataError, match=f"{T} image tokens but 1 images x 7 in the batch a"):
        Collator(processor)([item])


def test_a_batch_with_nothing_to_learn(processor):
    (item,) = ConversationDataset([make_sample("a")], processor)[0]
    item["labels"] = [IGNORE] * len(item["labels"])
    with pytest.raises(DataError, match="nothing to learn in the batch a"):
        Collator(processor)([[item]])


def test_a_tokenizer_without_padding_pads_with_the_end_token(processor):
    plain = SimpleNamespace(pad_token_id=None, eos_token_id=processor.tokenizer.eos_token_id)
    items = [ConversationDataset([make_sample("a", answer="red " * n)], processor)[0] for n in (1, 9)]
    processor.tokenizer = plain
    assert Collator(processor)(items)["input_ids"][0, -1] == plain.eos_token_id


def test_under_a_data_loader(processor, pictures):
    dataset = ConversationDataset([make_sample(key, pictures[0]) for key in "abcde"], processor)
    loader = DataLoader(dataset, batch_size=2, collate_fn=Collator(processor))
    assert [batch["sample_ids"] for batch in loader] == [["a", "b"], ["c", "d"], ["e"]]


def test_a_sample_skipped_in_a_worker_counts_in_the_parent_once(processor, pictures, tmp_path):
    log = SkipLog(tmp_path / "skipped.jsonl", max_bad_fraction=0.5)
    log.offered = 4
    samples = [make_sample("a", pictures[0]), bad_samples(pictures, tmp_path)["t"], make_sample("b"), make_sample("c")]
    dataset = ConversationDataset(samples, processor)
    for _ in range(2):
        loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=Collator(processor, skip_log=log))
        assert [batch["sample_ids"] for batch in loader] == [["a"], ["b", "c"]]
    assert (log.used, log.skipped) == (3, 1)
    assert (tmp_path / "skipped.jsonl").read_text().count("\n") == 1


def test_an_error_in_a_worker_keeps_its_plain_message(processor, pictures, tmp_path):
    dataset = ConversationDataset([bad_samples(pictures, tmp_path)["t"]], processor)
    messages = []
    for num_workers in (0, 1):
        with pytest.raises(DataError) as caught:
            list(DataLoader(dataset, num_workers=num_workers, collate_fn=Collator(processor)))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith("sample t: ")
    assert messages[0].endswith("torn.png")
