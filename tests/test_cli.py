"""The command line as a user meets it: one-line errors, exit codes, what the commands print."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from acformer.cli import main
from acformer.errors import DataError


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    tiny.model().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    tiny.picture(1, (60, 40)).save(path)
    return path


def run(capsys, *arguments):
    """Exit code, standard output, standard error of a command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, code, *arguments):
    """The one line that a refused command says."""
    got, _, err = run(capsys, *arguments)
    said = [line for line in err.splitlines() if line.startswith("acformer: error: ")]
    assert (got, len(said)) == (code, 1), err
    assert "Traceback" not in err
    return said[0]


def test_overrides_may_follow_flags(capsys):
    assert "did you mean 'seed'" in refused(capsys, 2, "train", "tiny", "--quiet", "sed=1")
    assert "unrecognized arguments: --quite" in refused(capsys, 2, "train", "tiny", "seed=1", "--quite")


def test_usage_errors(capsys):
    assert "invalid choice: 'trian'" in refused(capsys, 2, "trian")
    assert "must be a positive whole number, got '0'" in refused(capsys, 2, "eval", "model", "--limit", "0")
    assert "must be a positive whole number, got '0'" in refused(capsys, 2, "quickstart", "--limit", "0")
    assert "did you mean 'tiny'" in refused(capsys, 2, "train", "tinny")
    assert "did you mean 'model.connector'" in refused(capsys, 2, "train", "tiny", "model.conector=mlp")
    assert "did you mean 'dinov2-s14'" in refused(capsys, 2, "fetch", "dinov2-s")
    assert "unknown table 'tabel3'; did you mean 'table3'" in refused(capsys, 2, "reproduce", "tabel3")
    assert "unknown scale 'tpu'" in refused(capsys, 2, "reproduce", "table3", "--scale", "tpu")


def test_unknown_connector_and_option(capsys, tmp_path, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    for key, value, message in (
        ("connector", "acforner", "unknown connector 'acforner'; did you mean 'acformer'"),
        ("connector_kwargs", {"num_anchor": 4}, "did you mean 'num_anchors'"),
        ("connector_kwargs", {"num_anchors": "x"}, "option num_anchors of connector 'acformer' must be a positive int"),
        ("connector_kwargs", {"num_anchors": 99}, "num_anchors must be in 1..16 (the number of patches), got 99"),
    ):
        (model_folder / "config.json").write_text(json.dumps({**config, key: value}))
        (tmp_path / "data.json").write_text("[]")
        code, _, err = run(capsys, "eval", model_folder, "--data", tmp_path / "data.json")
        assert code in (2, 4)
        assert message in err


@pytest.mark.parametrize(
    ("file", "field", "code", "message"),
    [
        ("config", {"connector_kwargs": [1]}, 2, "config field connector_kwargs must be a dict or nothing, got [1]"),
        ("config", {"fusion_kwargs": "x"}, 2, "config field fusion_kwargs must be a dict or nothing, got 'x'"),
        ("config", {"feature_layer": "x"}, 2, "config field feature_layer must be an int, got 'x'"),
        ("config", {"image_size": "big"}, 2, "config field image_size must be an int or nothing, got 'big'"),
        ("config", {"vision_config": 3}, 2, "config field vision_config must be a dict or PreTrainedConfig or nothing"),
        ("config", {"vision_config": {"model_type": "clip"}}, 2, "unknown vision encoder type 'clip'"),
        ("config", {"text_config": {"model_type": "t5"}}, 4, "cannot load"),
        ("config", {"num_placeholders": 3}, 4, "cannot load"),
        ("config", {"image_token_id": None}, 4, "prompts for image_token_id 3, but its model has None"),
        ("processor_config", {"num_placeholders": 9}, 4, "prompts for num_placeholders 9, but its model has 5"),
        ("processor_config", {"fusion": "gated_cross_attention"}, 4, "but its model has 'concat': take the processor"),
    ],
)
def test_configs_that_are_wrong(capsys, photo, model_folder, file, field, code, message):
    path = model_folder / f"{file}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **field}))
    assert message in refused(capsys, code, "ask", model_folder, photo, "what?")


def test_pictures_that_cannot_be_read(capsys, tmp_path, model_folder):
    assert "no/photo.png" in refused(capsys, 3, "ask", model_folder, tmp_path / "no/photo.png", "what?")
    (tmp_path / "text.jpg").write_text("not a picture")
    assert "text.jpg" in refused(capsys, 3, "ask", model_folder, tmp_path / "text.jpg", "what?")
    assert "text.jpg" in refused(capsys, 3, "anchors", tmp_path / "text.jpg")


def test_models_that_cannot_be_loaded(capsys, tmp_path, photo, model_folder):
    assert "no model in /no/model" in refused(capsys, 4, "ask", "/no/model", photo, "what?")
    path = model_folder / "model.safetensors"
    whole = load_file(path)
    name = "model.connector.projector.0.weight"
    save_file({**whole, name: whole[name][:, :-1].contiguous()}, path, metadata={"format": "pt"})
    assert f"of another shape (first: ('{name}'" in refused(capsys, 4, "ask", model_folder, photo, "what?")
    save_file({k: v for k, v in whole.items() if k != name}, path, metadata={"format": "pt"})
    assert f"1 weights missing (first: {name})" in refused(capsys, 4, "ask", model_folder, photo, "what?")
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot load" in refused(capsys, 4, "ask", model_folder, photo, "what?")


def test_data_that_cannot_be_read(capsys, tmp_path, model_folder):
    assert "gone.json" in refused(capsys, 3, "eval", model_folder, "--data", tmp_path / "gone.json")
    (tmp_path / "broken.json").write_text('[{"id": 1,')
    assert "broken.json" in refused(capsys, 3, "eval", model_folder, "--data", tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("question", "images", "message"),
    [("what?", ["photo.png"], "0 <image> tags but 1 image"), ("<image>\nwhat?", [], "1 <image> tag but 0 images")],
)
def test_a_question_without_its_image_tag_and_the_reverse(
    capsys, tmp_path, photo, model_folder, monkeypatch, question, images, message
):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "1", "image": images, "conversations": turns}]))
    said = refused(capsys, 3, "eval", model_folder, "--data", tmp_path / "data.json")
    assert message in said
    assert "data.json" in said


def test_ask_prints_the_answer(capsys, photo, model_folder):
    code, out, _ = run(capsys, "ask", model_folder, photo, "what?", "--max-new-tokens", "4", "--device", "cpu")
    assert code == 0
    assert out.strip()
    code, fewer, _ = run(capsys, "ask", model_folder, photo, "what?", "--max-new-tokens", "4", "--tokens", "2")
    assert code == 0
    assert fewer != out


def test_more_tokens_than_patches(capsys, photo, model_folder):
    said = refused(capsys, 2, "ask", model_folder, photo, "what?", "--tokens", "99")
    assert "98" in said
    assert "16" in said


def test_eval_prints_and_writes_scores(capsys, tmp_path, photo, model_folder, monkeypatch):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "1", "image": photo.name, "conversations": turns}]))
    code, out, _ = run(capsys, "eval", model_folder, "--data", tmp_path / "data.json", "--quiet")
    assert code == 0
    assert json.loads(out)["num_questions"] == 1
    assert (model_folder / "eval/data/predictions.jsonl").is_file()


@pytest.fixture
def anchors_command(tmp_path, photo):
    from transformers import CLIPVisionModel

    CLIPVisionModel(tiny.config().vision_config).save_pretrained(tmp_path / "vision")
    tiny.processor().image_processor.save_pretrained(tmp_path / "vision")
    return ("anchors", photo, "--vision", tmp_path / "vision", "--image-size", "32", "--num-anchors", "5")


def test_anchors_refusals(capsys, tmp_path, anchors_command):
    said = refused(capsys, 2, *anchors_command, "--image-size", "3")
    assert "an image size of 3 is not a whole number of patches" in said
    assert "there is no folder" in refused(capsys, 2, *anchors_command, "--out", tmp_path / "no/dir/x.png")
    assert "must end in .png, .jpg or .webp" in refused(capsys, 2, *anchors_command, "--out", tmp_path / "x.xyz")
    (tmp_path / "folder.png").mkdir()
    said = refused(capsys, 2, *anchors_command, "--out", tmp_path / "folder.png")
    assert said == f"acformer: error: {tmp_path / 'folder.png'}: Is a directory"
    assert "no device 'foo' here" in refused(capsys, 2, *anchors_command, "--device", "foo")


def test_devices_that_are_not_here(capsys, photo, model_folder):
    assert "no device 'foo' here" in refused(capsys, 2, "ask", model_folder, photo, "what?", "--device", "foo")
    assert "no device 'cuda:99' here" in refused(capsys, 2, "ask", model_folder, photo, "what?", "--device", "cuda:99")


def test_a_folder_that_cannot_be_written(capsys, tmp_path, photo, model_folder, monkeypatch):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "1", "image": photo.name, "conversations": turns}]))
    (tmp_path / "file").touch()
    common = ("eval", model_folder, "--data", tmp_path / "data.json", "--quiet")
    said = refused(capsys, 2, *common, "--out", tmp_path / "file/eval")
    assert str(tmp_path / "file") in said


@pytest.mark.parametrize(
    ("command", "stop", "expected"),
    [
        (("connectors",), signal.SIGINT, 130),
        (("connectors",), signal.SIGTERM, 143),
        (("train", "tiny"), signal.SIGINT, 130),
        (("train", "tiny"), signal.SIGTERM, 75),
        (("quickstart",), signal.SIGTERM, 143),
        (("reproduce", "table3"), signal.SIGTERM, 75),
    ],
)
def test_only_what_can_go_on_says_so(capsys, monkeypatch, command, stop, expected):
    room = "acformer.lab.commands" if command[0] in ("quickstart", "reproduce") else "acformer.commands"
    monkeypatch.setattr(f"{room}.{command[0]}.run", lambda arguments: os.kill(os.getpid(), stop))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with Ctrl-C ignored
    code, _, err = run(capsys, *command)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert code == expected
    assert err.startswith("acformer: interrupted")
    assert ("the same command goes on from the last checkpoint of the run" in err) is (
        command[0] in ("train", "reproduce")
    )


def test_of_a_workers_error_only_the_message_is_shown(capsys, monkeypatch):
    worker = torch.utils.data.DataLoader(Broken(), num_workers=1, multiprocessing_context="fork")
    monkeypatch.setattr("acformer.commands.connectors.run", lambda arguments: next(iter(worker)))
    assert refused(capsys, 3, "connectors") == "acformer: error: a.json: record 3 (image)"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 2, "out of memory: take smaller batches"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 4, "/data/x: No space left on device"),
        (OSError(errno.EACCES, "Permission denied", "/data/x"), 2, "/data/x: Permission denied"),
    ],
)
def test_what_the_machine_lacks_is_one_line(capsys, monkeypatch, error, code, message):
    def fail(arguments):
        raise error

    monkeypatch.setattr("acformer.commands.connectors.run", fail)
    assert message in refused(capsys, code, "connectors")


@pytest.mark.slow
def test_a_bar_that_writes_to_a_file_is_not_written_at_every_step(capsys, monkeypatch):
    for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):
        monkeypatch.delenv(name, raising=False)
    code = """
import os, sys
from acformer.cli import main
main(["connectors"])
from tqdm import tqdm
import time
for _ in tqdm(range(200)):
    time.sleep(0.01)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stderr.split("\r")) <= 3, done.stderr  # the first state and the last


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DataError("a.json:\nrecord 3 (image)")


def test_anchors_draws_and_prints(capsys, tmp_path, anchors_command):
    common = anchors_command
    code, out, _ = run(capsys, *common, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["grid"] == [8, 8]
    assert found["positions"] == [[index // 8, index % 8] for index in found["indices"]]
    assert len(set(found["indices"])) == 5
    assert (tmp_path / "photo.anchors.png").stat().st_size > 0
    code, table, _ = run(capsys, *common)
    assert [int(line.split()[0]) for line in table.splitlines()[2:]] == found["indices"]
    assert "num_anchors" in refused(capsys, 2, *common[:-1], "65")


def test_connectors_and_selectors_are_listed(capsys):
    from acformer.anchors.selectors import SELECTORS
    from acformer.connectors import CONNECTORS

    for command, registry in (("connectors", CONNECTORS), ("selectors", SELECTORS)):
        code, out, _ = run(capsys, command)
        assert code == 0
        assert {*registry.names(), *registry.aliases} == {line.split(" ")[0] for line in out.splitlines()} - {""}
    assert "needs [CLS] attention; drawn at random while training: if asked" in out


def test_debug_shows_the_traceback(capsys):
    from acformer.errors import UsageError

    with pytest.raises(UsageError):
        main(["train", "tinny", "--debug"])


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "acformer", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("acformer ")
