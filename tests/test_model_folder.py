"""A folder that explains itself: its card, the modules for `trust_remote_code`, no path of ours, the same on a hub."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard
from test_train import data, recipe  # noqa: F401 (fixtures)
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from acformer.cli import main
from acformer.connectors import CONNECTORS, connector_options, list_connectors
from acformer.errors import UsageError
from acformer.evaluate.card_scores import record_scores
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration, AcFormerProcessor, publish
from acformer.hf.auto_map import AUTO_MAP
from acformer.hf.build import build_model
from acformer.hf.card import write_card
from acformer.hf.checkpoints import load_model, verify_folder, write_manifest
from acformer.hf.public_names import public_name, without_paths
from acformer.training.stages import train

BLOCKED = "import sys\nfor name in ({blocked}): sys.modules[name] = None\n"
SCORES = {
    "data": "easy-vqa",
    "accuracy": 0.75,
    "interval": [0.5, 0.9],
    "num_questions": 20,
    "num_image_tokens": 5,
    "blind_accuracy": 0.25,
}


@pytest.fixture
def folder(tmp_path):
    return save(tiny.model(), tmp_path / "model")


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny.processor(model.config.num_placeholders).save_pretrained(folder)
    return folder


def run(code: str, cwd: Path, *blocked: str) -> subprocess.CompletedProcess:
    """In a process of its own, where the modules of these names cannot be imported."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(cwd / "modules"), "HF_HUB_OFFLINE": "1"}
    start = BLOCKED.format(blocked="".join(f"{name!r}, " for name in blocked))
    return subprocess.run(
        [sys.executable, "-c", start + code], cwd=cwd, env=environment, capture_output=True, text=True
    )


def texts(folder: Path) -> str:
    """All that stands in a folder's files, file names too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return "\n".join(f"{path.name}\n{path.read_bytes().decode(errors='replace')}" for path in files)


# The card


def test_the_card_says_what_the_model_is_made_of(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license == "other"
    assert {"acformer", "visual-anchors"} <= {*card.data.tags}
    assert card.data.base_model is None, "its parts are new"
    assert "**5 of 17** an image" in card.text
    assert "`num_anchors=4`, `selector='anchors'`" in card.text
    assert "16 x 16 pixels, 4 x 4 patches" in card.text
    assert "Not measured" in card.text
    assert yaml.safe_load(card.data.to_yaml())


def test_every_connector_has_a_card(tmp_path):
    for name in tiny.CONNECTORS:
        config = tiny.config(name)
        write_card(tmp_path, config)
        text = (tmp_path / "README.md").read_text()
        assert f"`{name}`" in text
        assert f"**{config.build_connector().num_tokens} of " in text


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336"),
        ("gpt2", "gpt2"),
        ("embedded:dinov2-s14", "embedded:dinov2-s14"),
        ("/home/me/models/clip", ""),
        ("./clip", ""),
        ("~/clip", ""),
        (r"C:\models\clip", ""),
        ("runs/clip/model", ""),
        (None, ""),
        ("timm:vit_base.openai", "timm:vit_base.openai"),
        ("timm:vit_base@/home/me/vit.safetensors", "timm:vit_base"),
        ("timm:local-dir:/home/me/vit", "timm:local-dir"),
        ("open_clip:ViT-B-32@laion2b", "open_clip:ViT-B-32@laion2b"),
        ("timm:hf-hub:org/model", "timm:hf-hub:org/model"),
    ],
)
def test_names_that_may_be_published(name, published):
    assert public_name(name) == published


def test_a_folder_of_this_machine_is_no_name_of_a_hub(tmp_path, monkeypatch):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("runs/tiny") == ""
    assert without_paths({"a": ["/x/data.json", "runs/tiny"], "b": 3}) == {"a": ["data.json", "tiny"], "b": 3}


def test_nobodys_folders_in_a_model_of_local_parts(tmp_path):
    whole = tiny.model()
    AutoModel.from_config(whole.config.vision_config).save_pretrained(tmp_path / "vision")
    tiny.processor().image_processor.save_pretrained(tmp_path / "vision")
    AutoModelForCausalLM.from_config(whole.config.text_config).save_pretrained(tmp_path / "text")
    tiny.tokenizer().save_pretrained(tmp_path / "text")
    parts = str(tmp_path / "vision"), str(tmp_path / "text")
    model, processor = build_model(*parts, connector_kwargs=tiny.small_options("acformer"))
    for number in range(2):  # as built, as loaded
        model.save_pretrained(tmp_path / f"model{number}")
        processor.save_pretrained(tmp_path / f"model{number}")
        assert str(tmp_path) not in texts(tmp_path / f"model{number}")
        model, processor = load_model(str(tmp_path / f"model{number}"))
    model.config.vision_config._name_or_path = str(tmp_path)  # whoever put it there
    model.save_pretrained(tmp_path / "last")
    assert str(tmp_path) not in texts(tmp_path / "last")


def test_names_of_a_hub_are_kept(tmp_path):
    model = tiny.model()
    model.config.vision_config._name_or_path = "embedded:dinov2-s14"
    model.config.text_config._name_or_path = "some/language-model"
    save(model, tmp_path / "first")
    save(load_model(str(tmp_path / "first"))[0], tmp_path / "second")
    card = ModelCard.load(tmp_path / "second/README.md")
    assert card.data.base_model == ["facebook/dinov2-small", "some/language-model"]


def test_training_writes_recipe_and_data(recipe, tmp_path):  # noqa: F811
    folder = train(recipe("finetune.image_root=null"), progress=False)
    card = ModelCard.load(folder / "README.md")
    assert "- pretrain: `captions.jsonl`\n- finetune: `questions.json`" in card.text
    (written,) = re.findall(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    values = yaml.safe_load(written)
    assert values["model"]["vision"] == "a local model"
    assert values["finetune"]["learning_rates"] == {"connector": 0.01, "language_model": 0.002}
    assert values["finetune"]["training"]["max_steps"] == 3
    assert "output_dir" not in values
    first = ModelCard.load(folder.parents[1] / "pretrain/model/README.md")
    assert "questions.json" not in first.text
    assert str(tmp_path.parent) not in texts(folder), "neither the run's folder nor that of its data"
    assert verify_folder(folder) is None
    record_scores(str(tmp_path / "run"), SCORES)
    assert ModelCard.load(folder / "README.md").data.eval_results[0].metric_value == 0.75
    assert verify_folder(folder) is None, "scores do not damage a model"


# Scores


def test_scores_go_into_the_card(folder):
    record_scores(str(folder), SCORES)
    record_scores(str(folder), {**SCORES, "accuracy": 0.8})
    record_scores(str(folder), {**SCORES, "data": "/home/me/pairs.json", "num_image_tokens": 9})
    benchmark = {"benchmark": "pope", "metric": "F1, %", "score": 87.5, "interval": [80, 95], "num_questions": 9}
    record_scores(str(folder), {**benchmark, "visual_tokens": 5, "blind": None, "protocol": "llava"})
    record_scores(str(folder), {"benchmark": "mm-vet", "score": None, "reason": "not published"})
    card = ModelCard.load(folder / "README.md")
    found = [(one.dataset_name, one.metric_value) for one in card.data.eval_results]
    assert found == [("easy-vqa", 0.8), ("pairs.json", 0.75), ("pope", 87.5)]
    assert "| easy-vqa (20) | accuracy | 80.0 % | 50.0 % to 90.0 % | 25.0 % | 5 |" in card.text
    assert "| pope (9) | F1, % | 87.5 | 80.0 to 95.0 | not known | 5 |" in card.text
    assert "Not measured" not in card.text
    assert card.text.count("## Licence") == 1


def test_a_card_of_somebody_else_is_left_alone(folder, tmp_path):
    (folder / "README.md").write_text("mine")
    record_scores(str(folder), SCORES)
    record_scores("some/model", SCORES)
    assert (folder / "README.md").read_text() == "mine"


def test_eval_writes_them(folder, tmp_path):
    tiny.picture().save(tmp_path / "0.png")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "0", "image": "0.png", "conversations": said}]))
    command = ["eval", str(folder), "--data", str(tmp_path / "data.json"), "--device", "cpu", "--quiet"]
    assert main([*command, "--max-new-tokens", "2"]) == 0
    (result,) = ModelCard.load(folder / "README.md").data.eval_results
    scores = json.loads((folder / "eval/data/scores.json").read_text())
    assert (result.dataset_name, result.metric_value) == ("data.json", scores["accuracy"])


def test_the_card_stays_with_the_weights_that_it_is_about(folder, tmp_path):
    record_scores(str(folder), SCORES)
    model, _ = load_model(str(folder))
    model.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same/README.md").read_text() == (folder / "README.md").read_text()
    with torch.no_grad():
        model.model.connector.projector[0].weight.mul_(1.01)
    model.save_pretrained(tmp_path / "other")
    assert "Not measured" in (tmp_path / "other/README.md").read_text()


# Loaded by whoever has transformers alone, or with our package beside it


ASKED = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from PIL import Image
for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor):
    try:
        print(type(auto.from_pretrained("model", trust_remote_code={trust})).__module__)
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_the_code_of_the_card_runs(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    tiny.picture().save(folder / "photo.jpg")
    result = run(code, folder)
    assert result.returncode == 0, result.stderr
    asked = main(["ask", str(folder), str(folder / "photo.jpg"), "What is this?", "--device", "cpu", "--quiet"])
    assert asked == 0


@pytest.mark.slow
def test_trust_remote_code_loads_the_classes_of_the_package(folder, tmp_path):
    result = run(ASKED.format(trust=True), tmp_path)
    names = ["configuration_acformer", *["modeling_acformer"] * 2, "processing_acformer"]
    assert result.stdout.split() == [f"acformer.hf.{name}" for name in names], result.stderr


@pytest.mark.slow
def test_without_the_package_that_is_what_it_says(folder, tmp_path):
    result = run(ASKED.format(trust=True), tmp_path, "acformer")
    said = "ImportError this model needs the package acformer: pip install acformer"
    assert result.stdout.splitlines() == [said] * 4, result.stderr


@pytest.mark.parametrize("trust", [False, None])
@pytest.mark.slow
def test_without_trust_nothing_of_the_folder_runs_and_nothing_is_half_loaded(trust, folder, tmp_path):
    for module in folder.glob("*.py"):
        module.write_text("raise SystemExit('code has run')")
    result = run(ASKED.format(trust=trust), tmp_path, "acformer")
    assert len(re.findall("ValueError The repository model contains custom code", result.stdout)) == 4, (
        result.stdout + result.stderr
    )
    assert "code has run" not in result.stdout + result.stderr
    assert load_model(str(folder)), "ours never asks for it"


@pytest.mark.slow
def test_loading_with_trust_does_not_change_what_is_saved(folder, tmp_path):
    """transformers would copy the file of the class."""
    code = """
from transformers import AutoModelForImageTextToText, AutoProcessor
AutoModelForImageTextToText.from_pretrained("model", trust_remote_code=True).save_pretrained("again")
AutoProcessor.from_pretrained("model", trust_remote_code=True).save_pretrained("again")
"""
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    for path in (folder / "README.md", *folder.glob("*.py")):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in folder.iterdir()}


def test_the_map_is_ours_whatever_a_folder_says(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AcFormerConfig.from_pretrained(folder)
    assert loaded.auto_map == AUTO_MAP
    assert AutoModelForImageTextToText.from_pretrained(folder).config.auto_map == AUTO_MAP
    assert AutoProcessor.from_pretrained(folder).auto_map == {"AutoProcessor": AUTO_MAP["AutoProcessor"]}


def test_modules_are_vouched_for(folder):
    write_manifest(folder)
    assert verify_folder(folder) is None
    (folder / "modeling_acformer.py").write_text("import evil")
    assert "modeling_acformer.py has changed" in verify_folder(folder)


# On a hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repositories as folders of `tmp_path/hub`."""

    class Api:
        def create_repo(self, repo_id, private=None, token=None, exist_ok=False):
            assert exist_ok
            (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=True)
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id, name, revision=None, token=None):
            return (tmp_path / "hub" / repo_id / name).exists()

        def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message, token, revision):
            ignored = shutil.ignore_patterns(*[pattern.removesuffix("/*") for pattern in ignore_patterns])
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True, ignore=ignored)
            return commit_message

    monkeypatch.setattr(publish, "HfApi", Api)
    return tmp_path / "hub"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_hub_gets_the_same(folder, hub):
    record_scores(str(folder), SCORES)
    (folder / "eval/easy-vqa").mkdir(parents=True)
    (folder / "eval/easy-vqa/predictions.jsonl").touch()
    model, processor = load_model(str(folder))
    processor.push_to_hub("me/model")
    assert model.push_to_hub("me/model", commit_message="one", tags=["mine"]) == "one"
    assert names(hub / "me/model") == {name for name in names(folder) if not name.startswith("eval/")}
    card = ModelCard.load(hub / "me/model/README.md")
    assert 'model="me/model", trust_remote_code=True)\n' in card.text
    assert "acformer ask me/model photo.jpg" in card.text
    assert card.data.eval_results[0].metric_value == 0.75
    assert {"acformer", "mine"} <= {*card.data.tags}
    assert load_model(str(hub / "me/model"))


def test_saving_can_send_as_well(tmp_path, hub):
    tiny.processor().save_pretrained(tmp_path / "model")
    tiny.model().save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="me/other", commit_message="two")
    assert names(hub / "me/other") == names(tmp_path / "model")
    assert {"README.md", "modeling_acformer.py", "processor_config.json"} <= names(hub / "me/other")


def test_a_card_on_the_hub_stays(folder, hub):
    (hub / "me/model").mkdir(parents=True)
    (hub / "me/model/README.md").write_text("edited there")
    AcFormerForConditionalGeneration.from_pretrained(folder).push_to_hub("me/model")
    AcFormerProcessor.from_pretrained(folder).push_to_hub("me/model")
    assert (hub / "me/model/README.md").read_text() == "edited there"


# Every option of the connector.


@pytest.mark.parametrize("connector", [*list_connectors(), *CONNECTORS.aliases])
def test_a_saved_config_holds_every_option(connector, tmp_path):
    """So that a model stays what it is when a default changes; and read again it says the same."""
    config = tiny.config(connector)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["connector_kwargs"]
    assert saved.keys() == connector_options(connector).keys()
    assert saved.items() >= tiny.small_options(connector).items()
    read = AcFormerConfig.from_pretrained(tmp_path)
    assert read.to_dict() == {**config.to_dict(), "_name_or_path": read.to_dict()["_name_or_path"]}
    assert read.build_connector().num_tokens == config.build_connector().num_tokens


def test_an_option_that_a_saved_config_does_not_name_is_what_it_was(tmp_path):
    """`acformer_v2` had other defaults at first, and configs held only what was given."""
    model = tiny.model("acformer_v2", connector_kwargs={**tiny.small_options("acformer_v2"), **FIRST})
    folder = save(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for name in FIRST:
        del config["connector_kwargs"][name]
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder)
    loaded, _ = load_model(str(folder))
    assert loaded.model.connector.queries.selector == "anchors"
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())


FIRST = {"selector": "anchors", "stem": True, "block": False, "near": False, "talk": True}


@pytest.mark.parametrize(("option", "value"), [("mass", False), ("pooled", False), ("mass", True)])
def test_an_option_that_was_removed_may_stand_in_a_saved_config_where_it_did_nothing(option, value, tmp_path):
    model = tiny.model("acformer_v2")
    folder = save(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["connector_kwargs"][option] = value
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder)
    if value:
        with pytest.raises(
            UsageError, match=r"option mass=True of connector 'acformer_v2' was removed .*: leave it out"
        ):
            load_model(str(folder))
        return
    loaded, _ = load_model(str(folder))
    assert option not in loaded.config.to_dict()["connector_kwargs"]
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_a_default_that_json_cannot_hold_is_left_to_its_connector(monkeypatch):
    class Odd(CONNECTORS["mlp"]):
        def __init__(self, geometry, *, kind: torch.dtype = torch.float32, share: float = 0.5):
            super().__init__(geometry)

    monkeypatch.setitem(CONNECTORS, "odd", Odd)
    config = tiny.config("odd", connector_kwargs={})
    assert json.loads(config.to_json_string())["connector_kwargs"] == {"share": 0.5}
