"""Parquet, `save_to_disk` and streams; needs what `acformer[data]` installs, but for what is said without it."""

import builtins
import io
import json
from importlib.util import find_spec

import pytest
import tiny
import torch
from test_train import COLOURS, data, recipe, weights  # noqa: F401 (fixtures)

from acformer.data.collate import Collator, ConversationDataset
from acformer.data.datasets import load_samples, open_samples
from acformer.data.skip_log import SkipLog
from acformer.errors import DataError, UsageError
from acformer.training.stages import train

ONE = ["stage=finetune", "pretrain=null"]
extras = [pytest.mark.extras, pytest.mark.skipif(find_spec("datasets") is None, reason="needs acformer[data]")]
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")


def needs_datasets(function):
    for mark in (*extras, quiet):
        function = mark(function)
    return function


@pytest.mark.slow
def test_without_the_extra_it_is_named(tmp_path, monkeypatch):
    importing = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        UsageError,
        match=r"data\.parquet is a table \(parquet or Arrow\), which needs Hugging Face datasets",
    ):
        load_samples(tmp_path / "data.parquet")
    with pytest.raises(
        UsageError, match=r"owner/name is no file here, so a data set of the Hub, which needs Hugging Face datasets"
    ):
        load_samples("owner/name")


def png(seed: int) -> bytes:
    file = io.BytesIO()
    tiny.picture(seed).save(file, "PNG")
    return file.getvalue()


def llava_rows(count: int, start: int = 0) -> list[dict]:
    names = list(COLOURS)
    turns = [
        [("human", "<image>\nwhich?"), ("gpt", names[n % 3] + " indeed" * (n % 5))] for n in range(start, start + count)
    ]
    return [
        {
            "id": str(start + n),
            "image": {"bytes": png(start + n), "path": None},
            "conversations": [{"from": who, "value": said} for who, said in turns[n]],
            "score": 0.5,
        }
        for n in range(count)
    ]


@pytest.fixture
def hf(tmp_path, monkeypatch):
    """`datasets` with its cache in the test's folder, and no network."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "hf"))
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    # Five seconds at the end of each pass over a stream; ours have seven rows.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    datasets.disable_progress_bars()
    return datasets


def write(hf, path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    hf.Dataset.from_list(rows).to_parquet(str(path))
    return path


@needs_datasets
def test_a_parquet_file_and_a_folder_of_them(hf, tmp_path):
    write(hf, tmp_path / "parts/0.parquet", llava_rows(3))
    write(hf, tmp_path / "parts/1.parquet", llava_rows(2, 3))
    (tmp_path / "parts/2.parquet").write_bytes(b"PAR1" + b"\0" * 40)
    log = SkipLog(tmp_path / "skipped.jsonl", max_bad_fraction=0.5)
    samples = load_samples(tmp_path / "parts", skipped=log)
    assert [sample.id for sample in samples] == [str(n) for n in range(5)]
    assert samples[4].images == (png(4),)
    assert (samples[4].file, samples[4].record) == (str(tmp_path / "parts"), 5)
    assert (log.offered, log.used, log.skipped) == (6, 5, 1)
    (entry,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert entry["file"].endswith("2.parquet")
    assert "not a parquet file that can be read" in entry["reason"]
    opened = open_samples(str(tmp_path / "parts"))
    lengths = opened.lengths(1000)
    assert (lengths // 1000).tolist() == [1, 1, 1, 1, 1, 0]
    assert lengths[4] - 1000 > lengths[0] - 1000 > 0
    assert opened.fingerprint() != open_samples(str(tmp_path / "parts/0.parquet")).fingerprint()


@needs_datasets
def test_images_in_a_table_reach_the_batch_as_those_of_files(hf, tmp_path):
    samples = load_samples(write(hf, tmp_path / "a.parquet", llava_rows(2)))
    batch = Collator(tiny.processor())(list(ConversationDataset(samples, tiny.processor())))
    expected = tiny.processor().image_processor(tiny.pictures([0, 1]), return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)


@needs_datasets
def test_layouts_of_published_sets(hf, tmp_path):
    images = [{"bytes": png(0), "path": None}, {"bytes": png(1), "path": None}]
    cauldron = [{"images": images, "texts": [{"user": "both?", "assistant": "yes", "source": "ai2d"}]}]
    part = {"type": "text", "text": "which?", "index": None}
    turns = [{"role": "user", "content": [{"type": "image", "text": None, "index": 0}, part]}]
    turns.append({"role": "assistant", "content": [{"type": "text", "text": "red", "index": None}]})
    chat = [{"images": images[:1], "messages": turns}]
    (sample,) = load_samples(write(hf, tmp_path / "a.parquet", cauldron))
    assert sample.images == (png(0), png(1))
    assert sample.messages[0]["content"] == [{"type": "image"}] * 2 + [{"type": "text", "text": "both?"}]
    (sample,) = load_samples(write(hf, tmp_path / "b.parquet", chat))
    assert sample.messages[0]["content"] == [{"type": "image", "index": 0}, {"type": "text", "text": "which?"}]
    assert sample.answer == "red"
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(png(0))
    named = write(hf, tmp_path / "c.parquet", [{**llava_rows(1)[0], "image": "a.png"}])
    (sample,) = load_samples(named, image_root=tmp_path / "pictures")
    assert sample.images == (tmp_path / "pictures/a.png",)


@needs_datasets
def test_what_save_to_disk_wrote(hf, tmp_path):
    rows = hf.Dataset.from_list(llava_rows(4)).cast_column("image", hf.Image())
    hf.DatasetDict({"train": rows, "test": rows.select(range(1))}).save_to_disk(str(tmp_path / "saved"))
    assert [sample.id for sample in load_samples(str(tmp_path / "saved"))] == ["0", "1", "2", "3"]
    assert len(load_samples({"path": str(tmp_path / "saved"), "split": "test"})) == 1
    with pytest.raises(DataError, match="has no split 'val'; it has train, test"):
        load_samples({"path": str(tmp_path / "saved"), "split": "val"})


@needs_datasets
def test_columns_and_media_that_do_not_fit_are_told(hf, tmp_path):
    path = write(hf, tmp_path / "a.parquet", [{"question": "which?", "picture": "a.png"}])
    with pytest.raises(DataError, match=r"has no column conversations, messages or texts; it has question, picture"):
        load_samples(path)
    rows = hf.Dataset.from_list(llava_rows(1))
    (tmp_path / "a.mp4").write_bytes(b"film")
    film = rows.add_column("clip", [str(tmp_path / "a.mp4")]).cast_column("clip", hf.Video(decode=False))
    film.save_to_disk(str(tmp_path / "film"))
    with pytest.raises(DataError, match="has a column clip of video, which is neither text nor images"):
        load_samples(str(tmp_path / "film"))
    sound = write(hf, tmp_path / "b.parquet", [{**llava_rows(1)[0], "audio": "a.wav"}])
    with pytest.raises(DataError, match="holds audio, which is neither text nor an image"):
        load_samples(sound)
    with pytest.raises(DataError, match=r"cannot read owner/name; there is no such file here"):
        load_samples("owner/name")


@needs_datasets
def test_a_new_tokenizer_and_two_epochs_of_a_table(hf, recipe, tmp_path):  # noqa: F811
    path = write(hf, tmp_path / "a.parquet", llava_rows(12))
    own = [f"finetune.data={path}", "finetune.training.max_steps=6"]
    own += ["finetune.training.train_sampling_strategy=group_by_length", "finetune.training.dataloader_num_workers=1"]
    folder = train(recipe(*ONE, *own), progress=False)
    assert (folder / "model.safetensors").exists()
    with pytest.raises(UsageError, match=r"cache_features knows images by their files, and .*a\.parquet holds them"):
        train(recipe(*ONE, *own, "cache_features=true", f"output_dir={tmp_path}/cached"), progress=False)


def streamed(*paths) -> str:
    return json.dumps([{"path": str(path), "streaming": True, "weight": n + 1} for n, path in enumerate(paths)])


@needs_datasets
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_in_a_stream_goes_on_where_it_was(hf, recipe, tmp_path, num_workers):  # noqa: F811
    """Two streams of 7 and 5 rows, which begin anew several times; stopped after the fifth of seven steps."""
    paths = [write(hf, tmp_path / "a.parquet", llava_rows(7)), write(hf, tmp_path / "b.parquet", llava_rows(5, 7))]
    own = [*ONE, f"finetune.data={streamed(*paths)}", f"finetune.training.dataloader_num_workers={num_workers}"]
    own += ["finetune.training.max_steps=7", "finetune.training.save_strategy=steps", "finetune.training.save_steps=5"]
    own += ["finetune.training.gradient_accumulation_steps=2", "finetune.training.per_device_train_batch_size=2"]
    whole = weights(train(recipe(*own, f"output_dir={tmp_path}/whole"), progress=False))
    stopped = train(recipe(*own, f"output_dir={tmp_path}/stopped"), progress=False)
    for name in ("model", "checkpoint-7"):
        (stopped.parent / name / "model.safetensors").unlink(missing_ok=True)
    train(recipe(*own, f"output_dir={tmp_path}/stopped"), progress=False)
    after = weights(stopped)
    assert all(torch.equal(after[name], value) for name, value in whole.items())


@needs_datasets
def test_the_order_of_a_stream_is_its_seeds_and_every_row_comes(hf, tmp_path):
    path = write(hf, tmp_path / "a.parquet", llava_rows(6))

    def ids(seed: int, rows: int = 18) -> list[str]:
        return [sample.id for sample in open_samples(json.loads(streamed(path)), seed=seed, num_rows=rows)]

    assert ids(0) == ids(0) != ids(1)
    for epoch in range(3):
        assert sorted(ids(0)[6 * epoch : 6 * epoch + 6]) == [str(n) for n in range(6)]
    assert ids(0)[:6] != ids(0)[6:12]
    samples = open_samples(json.loads(streamed(path)), seed=0, num_rows=18)
    assert [samples.sample(index).id for index in (5, 9, 2)] == [ids(0)[index] for index in (5, 9, 2)]


@needs_datasets
def test_what_a_stream_cannot_do_is_told(hf, recipe, tmp_path):  # noqa: F811
    path = write(hf, tmp_path / "a.parquet", llava_rows(6))
    stream = f"finetune.data={streamed(path)}"
    with pytest.raises(UsageError, match=r"a stream has no length: give training\.max_steps"):
        train(recipe(*ONE, stream, "finetune.training={num_train_epochs: 1}"), progress=False)
    with pytest.raises(UsageError, match="a stream is taken as it comes"):
        train(recipe(*ONE, stream, "finetune.group=2"), progress=False)
    for text in (b"PAR1", path.read_bytes()[:-300]):
        path.write_bytes(text)
        with pytest.raises(DataError, match=r"a\.parquet") as caught:
            train(recipe(*ONE, stream, "resume=false"), progress=False)
        assert "\n" not in str(caught.value)
