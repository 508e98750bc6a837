"""Images in a zip or a tar are read where they lie, by any process, as if they had been unpacked."""

import io
import json
import tarfile
import zipfile

import pytest
import tiny
from torch.utils.data import DataLoader

from acformer.data.archives import Archive
from acformer.data.collate import Collator, ConversationDataset
from acformer.data.datasets import load_samples, open_samples
from acformer.data.image_root import ImageRoot
from acformer.data.shards import Shard
from acformer.data.skip_log import SkipLog
from acformer.errors import DataError, ImageError
from acformer.images import load_image
from acformer.images.stored import StoredImage
from acformer.vision.feature_cache import FeatureCache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("acformer.data.index_cache.SMALL", 0)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    tiny.picture(seed).save(file, "PNG")
    return file.getvalue()


def write_zip(path, members: dict[str, bytes], method=zipfile.ZIP_STORED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("folder")
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_tar(path, members: dict[str, bytes], form=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


LONG = "n" * 200 + "/é.png"


@pytest.mark.parametrize("kind", ["stored.zip", "deflated.zip", "pax.tar", "gnu.tar"])
def test_every_member_by_name(tmp_path, kind):
    members = {f"{number % 3}/{number}.png": png(number) for number in range(20)} | {LONG: png(99)}
    if kind.endswith("zip"):
        method = zipfile.ZIP_DEFLATED if kind.startswith("deflated") else zipfile.ZIP_STORED
        path = write_zip(tmp_path / kind, members, method)
    else:
        path = write_tar(tmp_path / kind, members, tarfile.GNU_FORMAT if kind[0] == "g" else tarfile.PAX_FORMAT)
    for _ in range(2):  # made, and read from the cache
        archive = Archive(path)
        assert [archive.name(number) for number in range(len(archive))] == [*members]
        for name, content in members.items():
            assert archive.find(name).read(10**6) == content
        assert archive.find("0/1.png") is None
    image = load_image(archive.find(LONG))
    assert image.tobytes() == load_image(members[LONG]).tobytes()


def test_limits_and_damage_name_the_member(tmp_path):
    torn = png(0)[:60]
    path = write_zip(tmp_path / "images.zip", {"torn.png": torn, "big.png": b"\0" * 10**6}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ImageError, match=r"images\.zip/torn\.png"):
        load_image(Archive(path).find("torn.png"))
    assert len(Archive(path).find("big.png").read(1000)) == 1000  # no more than was asked for is unpacked
    content = bytearray(path.read_bytes())
    content[45:60] = b"\xff" * 15
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"images\.zip/torn\.png"):
        load_image(StoredImage(str(path), "torn.png", 0, 60, 8, True))
    with pytest.raises(ImageError, match=r"no such file.*gone\.zip/a\.png"):
        load_image(StoredImage(str(tmp_path / "gone.zip"), "a.png", 0, 60))


def test_a_folder_of_downloads_is_as_good_as_unpacked(tmp_path):
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose/a.png").write_bytes(png(0))
    write_zip(tmp_path / "coco/train2017.zip", {"train2017/1.png": png(1)})
    write_zip(tmp_path / "vg/images.zip", {"VG_100K/2.png": png(2)})
    write_tar(tmp_path / "vg/images2.tar", {"./VG_100K_2/3.png": png(3)})
    root = ImageRoot(tmp_path)
    assert root.find("loose/a.png") == tmp_path / "loose/a.png"
    for number, name in enumerate(["coco/train2017/1.png", "vg/VG_100K/2.png", "vg/VG_100K_2/3.png"], start=1):
        assert root.find(name).read(10**6) == png(number)
    for name in ("coco/train2017/9.png", "vg/VG_100K/3.png", "gone/1.png"):
        with pytest.raises(DataError, match="is not in the image folder"):
            root.find(name)
    with pytest.raises(DataError, match="outside the image folder"):
        root.find("../coco/1.png")


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_archive_as_the_image_root_in_any_worker(tmp_path, kind, num_workers):
    members = {f"{number}.png": png(number) for number in range(8)}
    root = (write_zip if kind == "zip" else write_tar)(tmp_path / f"images.{kind}", members)
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": n, "image": f"{n}.png", "conversations": turns} for n in range(9)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    log = SkipLog(tmp_path / "skipped.jsonl", max_bad_fraction=0.5)
    samples = open_samples(str(tmp_path / "data.json"), image_root=root, skipped=log)
    dataset = ConversationDataset(samples, tiny.processor())
    collator = Collator(tiny.processor(), skip_log=log, dataset=dataset)
    batches = [*DataLoader(dataset, batch_size=3, num_workers=num_workers, collate_fn=collator)]
    assert [name for batch in batches for name in batch["sample_ids"]] == [str(n) for n in range(8)]
    expected = tiny.processor().image_processor([load_image(members["4.png"])], return_tensors="pt")["pixel_values"]
    assert (batches[1]["pixel_values"][1] == expected[0]).all()
    assert (log.offered, log.used, log.skipped) == (9, 8, 1)


def test_features_of_members_are_kept_as_those_of_files(tmp_path):
    path = write_zip(tmp_path / "images.zip", {"a.png": png(0), "torn.png": png(1)[:50]})
    model, archive = tiny.model(), Archive(path)
    made = (model.get_vision_features, model.model.vision_tower, tiny.processor().image_processor)
    cache = FeatureCache(tmp_path / "features", *made)
    (tmp_path / "same.png").write_bytes(png(0))
    cache.add([archive.find("a.png"), archive.find("torn.png"), tmp_path / "same.png"], progress=False)
    assert len(cache.rows) == 1
    assert (cache(archive.find("a.png"))["tokens"] == cache(tmp_path / "same.png")["tokens"]).all()
    with pytest.raises(ImageError, match=r"torn\.png"):
        cache(archive.find("torn.png"))


def test_what_is_no_archive_or_cannot_be_read_is_told(tmp_path):
    (tmp_path / "photo.png").write_bytes(png(0))
    with pytest.raises(DataError, match=r"photo\.png is not a zip or tar"):
        ImageRoot(tmp_path / "photo.png")
    path = write_zip(tmp_path / "a.zip", {"a.png": png(0)}, zipfile.ZIP_BZIP2)
    with pytest.raises(DataError, match=r"a\.zip/a\.png is encrypted, or packed by method 12"):
        Archive(path).find("a.png")
    with pytest.raises(DataError, match=r"a\.zip is a zip: it can be the image_root"):
        load_samples(path)
    for name, message in (("a.tar.gz", "is packed, .*gunzip it"), ("a.mp4", "is video or sound")):
        (tmp_path / name).write_bytes(b"film")
        with pytest.raises(DataError, match=message):
            load_samples(tmp_path / name)


# WebDataset


def record(**fields) -> bytes:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    return json.dumps({"conversations": turns, **fields}).encode()


def test_shards_of_a_webdataset(tmp_path):
    cauldron = {"texts": [{"user": "first?", "assistant": "one"}, {"user": "then?", "assistant": "two"}]}
    members = {
        "0.jpg": png(0),
        "0.json": record(),
        "sub/1.json": record(id="own"),
        "sub/1.PNG": png(1),
        "2.txt": b" a caption\n",
        "2.png": png(2),
        "3.0.png": png(3),
        "3.1.png": png(4),
        "3.json": json.dumps(cauldron).encode(),
        "4.cls": b"7",
        "4.png": png(4),
        "5.mp4": b"film",
        "5.json": record(),
        "6.json": b"{",
        "6.png": png(5),
        "7.json": json.dumps({"caption": "short", "width": 3}).encode(),
        "7.png": png(6),
        "8.json": json.dumps({"url": "there"}).encode(),
    }
    write_tar(tmp_path / "shards/0.tar", members)
    write_tar(tmp_path / "shards/1.tar", {"9.txt": b"last", "9.png": png(9)})
    log = SkipLog(tmp_path / "skipped.jsonl", max_bad_fraction=0.9)
    samples = load_samples(tmp_path / "shards", skipped=log)
    assert [sample.id for sample in samples] == ["0", "own", "2", "3", "7", "9"]
    assert samples[0].images[0].read(10**6) == png(0)
    assert samples[2].messages == (
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": "a caption"},
    )
    image = {"type": "image"}
    assert samples[3].messages[0]["content"] == [image, image, {"type": "text", "text": "first?"}]
    assert [image.name for image in samples[3].images] == ["3.0.png", "3.1.png"]
    reasons = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    found = {entry["record"]: entry["reason"] for entry in reasons}
    assert set(found) == {5, 6, 7, 9}
    assert "neither a .json nor a .txt" in found[5]
    assert "holds 5.mp4, which is neither text nor an image" in found[6]
    assert "not JSON" in found[7]
    assert "has no conversations, messages, texts or caption; it has url" in found[9]
    assert (log.offered, log.used) == (10, 6)
    lengths = open_samples(str(tmp_path / "shards")).lengths(1000)
    assert (lengths // 1000).tolist() == [1, 1, 1, 2, 1, 0, 1, 1, 0, 1]


def test_a_shard_that_breaks_off_is_named_and_the_rest_is_used(tmp_path):
    members = {f"{number}.txt": b"word " * 300 for number in range(4)}
    path = write_tar(tmp_path / "0.tar", members)
    path.write_bytes(path.read_bytes()[: 512 * 10])
    shard = Shard(path, ImageRoot(tmp_path))
    assert len(shard) == 3
    assert shard.sample(1).answer.startswith("word")
    with pytest.raises(DataError, match=r"the shard breaks off here: the file ends within 2\.txt"):
        shard.sample(2)
    assert len(shard.lengths(5)) == 3


def test_the_fingerprint_follows_the_members(tmp_path):
    made = [write_tar(tmp_path / f"{n}/0.tar", {f"{name}.txt": b"a"}) for n, name in enumerate("aab")]
    prints = [open_samples(str(path)).fingerprint() for path in made]
    assert prints[0] == prints[1] != prints[2]
