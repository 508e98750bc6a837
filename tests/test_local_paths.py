"""Nobody's local path: no file of any kind of saved folder names the home folder, the temporary one or our sources."""

import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_process import ROOT
from test_lora import LORA, SAVE, text  # noqa: F401 (fixtures)
from test_train import data, recipe  # noqa: F401 (fixtures)

from acformer import cli
from acformer.errors import CheckpointError
from acformer.evaluate.card_scores import record_scores
from acformer.export.graph import export_graph
from acformer.export.self_contained import export_self_contained
from acformer.hf.checkpoints import load_model
from acformer.hf.local_parts import located, naming
from acformer.hf.public_names import as_recorded
from acformer.training.stages import train

ALONE = ["pretrain.save=connector"]
PLACES = {tempfile.gettempdir(), str(ROOT), sys.prefix, *([str(Path.home())] if len(Path.home().parts) > 1 else [])}


def contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """A file's bytes, and those of what is in it where it is an archive (graphs of torch, states of optimizers)."""
    yield path.name, path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from ((f"{path.name}: {name}", archive.read(name)) for name in archive.namelist())


def told(folder: Path) -> list[str]:
    """Which file of a folder names which place, its own name counted in."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 2, folder
    return [
        f"{name}: {place}"
        for path in files
        for name, held in contents(path)
        for place in PLACES
        if f"{place}/".encode() in held or place.encode() + b'"' in held
    ]


def test_it_can_tell(tmp_path):
    for number, name in enumerate(("a.json", "b.txt", "c.pt2")):
        (tmp_path / name).write_text("{}" if number else json.dumps({"data": f"{tmp_path}/x.json"}))
    assert told(tmp_path)
    with zipfile.ZipFile(tmp_path / "c.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.json", f"File {ROOT}/src/acformer/cli.py" * 9)
    assert f"c.pt2: model.json: {ROOT}" in told(tmp_path)


def test_a_connector_alone_of_local_parts(recipe, text, tmp_path):  # noqa: F811
    folder = train(recipe("stage=pretrain", *ALONE, text), progress=False)
    assert told(folder) == []
    parts = json.loads((folder / "parts.json").read_text())
    assert (parts["vision"], parts["text"]) == ("local:vision", "local:text")
    assert load_model(str(folder))
    shutil.copytree(folder, tmp_path / "sent/model")
    with pytest.raises(
        CheckpointError, match=r"its vision model is a folder of the machine where.*'vision'.*places.json"
    ):
        load_model(str(tmp_path / "sent/model"))
    shutil.copy(folder.parent / "places.json", tmp_path / "sent")
    assert load_model(str(tmp_path / "sent/model")), "that sentence says what to do"


@pytest.mark.slow
def test_an_adapter_of_a_local_model(recipe, text, tmp_path):  # noqa: F811
    """Of another run's model, which is a connector alone in turn; its checkpoints, too."""
    base = train(recipe("stage=pretrain", *ALONE, text, f"output_dir={tmp_path}/first"), progress=False)
    one = ["stage=finetune", "pretrain=null", f"from_model={base.parents[1]}", *SAVE]
    folder = train(recipe(*one, *LORA), progress=False)
    for place in (folder, folder.parent / "checkpoint-2"):
        assert told(place) == []
        assert json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"] == "local:first"
        assert load_model(str(place))
    cli.main(["merge", str(folder), "--out", str(tmp_path / "merged"), "--quiet"])
    assert told(tmp_path / "merged") == []


def test_an_adapter_whose_run_has_no_other_model(recipe, text):  # noqa: F811
    """The stage writes encoder, language model and connector down, in a folder of their own."""
    folder = train(recipe("stage=finetune", "pretrain=null", text, *LORA), progress=False)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "../base"
    assert told(folder) == told(folder.parent / "base") == []
    assert load_model(str(folder))


@pytest.mark.slow
def test_a_whole_model_what_it_scored_and_its_exports(recipe, data, tmp_path):  # noqa: F811
    folder = train(recipe(*SAVE), progress=False)
    ask = ["eval", str(folder), "--data", str(data / "questions.json"), "--limit", "2", "--device", "cpu", "--quiet"]
    assert cli.main(ask) == 0
    scores = json.loads((folder / "eval/questions-limit2/scores.json").read_text())
    assert scores["data"] == "questions.json"
    record_scores(str(folder), scores)
    assert told(folder) == told(folder.parent / "checkpoint-2") == []
    assert told(export_self_contained(str(folder), tmp_path / "alone")) == []
    assert told(export_graph(str(folder), tmp_path / "graphs", "torch", "all")) == []


@pytest.mark.extras
def test_onnx(recipe, tmp_path):  # noqa: F811
    folder = train(recipe("stage=pretrain"), progress=False)
    assert told(export_graph(str(folder), tmp_path / "graphs", "onnx", "all")) == []


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336"),
        ("embedded:dinov2-s14", "embedded:dinov2-s14"),
        ("{run}/pretrain/model", "../../pretrain/model"),
        ("{run}/finetune/base", "../base"),
        ("/home/me/runs/first/finetune/model", "local:first"),
        ("/home/me/clip", "local:clip"),
        ("timm:vit_base@/home/me/vit.safetensors", "local:vit.safetensors"),
    ],
)
def test_how_a_part_is_named(name, named, tmp_path):
    assert naming(tmp_path / "finetune/model", name.format(run=tmp_path), tmp_path) == named


@pytest.mark.parametrize("held", ["", "[]", '{"vision": 3}', "{", '{"text": "/x"}'])
def test_places_that_are_none(held, tmp_path):
    (tmp_path / "places.json").write_text(held)
    with pytest.raises(CheckpointError, match="give its place here as 'vision' in"):
        located(tmp_path / "model", "local:clip", "vision")


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("easy-vqa:test", "easy-vqa:test"),
        ("me/model", "me/model"),
        ("runs/tiny", "runs/tiny"),
        ("{here}/runs/tiny", "runs/tiny"),
        ("/home/me/runs/tiny/finetune/model", "tiny"),
        ("../data/questions.json", "questions.json"),
        ("~/questions.json", "questions.json"),
        ("timm:vit_base@/home/me/vit.safetensors", "timm:vit_base"),
    ],
)
def test_how_a_record_of_scores_names_what_was_asked(name, recorded):
    assert as_recorded(name.format(here=Path.cwd())) == recorded
