"""Trained weights that come with the package: small ones, joined with their parts and asked; then the real ones."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_train import data, recipe, two_stages  # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM, CLIPVisionModel

from acformer.cli import main
from acformer.errors import AcFormerError, CheckpointError, UsageError
from acformer.evaluate.generate import ask
from acformer.export.parts import export_parts
from acformer.fetch import embedded, trained
from acformer.fetch.embedded import embedded_path, is_joined, resolve
from acformer.fetch.trained import TRAINED, weights_folder
from acformer.files import write_text
from acformer.hf.checkpoints import load_model, verify_folder, write_manifest
from acformer.hf.trained import EXAMPLES, EXAMPLES_LIST, Example, examples, fetch_models
from acformer.training.recipe import load_recipe
from acformer.training.stages import train

NAME = "acformer-scenes"
PARTS = ["model.vision=embedded:dinov2-s14", "model.text=embedded:smollm2-135m"]
LORA = [
    "finetune.lora={r: 4, alpha: 8}",
    "finetune.learning_rates={connector: 0.01, language_model: 0.02}",
    "stage=finetune",
    "pretrain=null",
]


def embedded_parts(cache: Path) -> None:
    """An encoder and a language model of a few weights where `fetch` would leave the real ones."""
    CLIPVisionModel(tiny.config().vision_config).save_pretrained(cache / "dinov2-s14")
    tiny.processor().image_processor.save_pretrained(cache / "dinov2-s14")
    speaking = tiny.model()  # with weights so large that it does not fall silent
    text = AutoModelForCausalLM.from_config(tiny.config().text_config)
    text.model.load_state_dict(speaking.model.language_model.state_dict())
    text.lm_head.load_state_dict(speaking.lm_head.state_dict())
    text.save_pretrained(cache / "smollm2-135m")
    tiny.tokenizer().save_pretrained(cache / "smollm2-135m")


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> Path:  # noqa: F811
    """Made once: a cache of small parts, and a run with an adapter over a base that names them."""
    folder = tmp_path_factory.mktemp("made")
    embedded_parts(folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACFORMER_CACHE", str(folder / "cache"))
        patch.setattr(embedded, "_is_fetched", is_a_part)
        overrides = [*PARTS, *LORA, f"output_dir={folder}/run"]
        train(load_recipe(str(two_stages(data, folder)), overrides), progress=False)
    return folder


@pytest.fixture
def cache(made, tmp_path, monkeypatch) -> Path:
    """With small parts that count as fetched; weights are looked for in `tmp_path/weights` alone."""
    shutil.copytree(made / "cache", tmp_path / "cache")
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_is_fetched", is_a_part)
    monkeypatch.setattr(trained, "PLACES", (tmp_path / "weights",))
    monkeypatch.setattr(trained, "DEFAULT", NAME)
    return tmp_path / "cache"


def is_a_part(entry: embedded.Embedded) -> bool:
    return entry.name in TRAINED[NAME].parts


@pytest.fixture
def run(made, cache, tmp_path) -> Path:
    """The run, in a folder of its own."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def with_examples(folder: Path) -> Path:
    (folder / EXAMPLES).mkdir()
    entries = []
    for number in range(2):
        tiny.picture(number).save(folder / EXAMPLES / f"{number}.png")
        entries += [
            {"image": f"{number}.png", "question": f"what {word}?", "answer": "red"} for word in ("colour", "is")
        ]
    (folder / EXAMPLES / EXAMPLES_LIST).write_text(json.dumps(entries))
    (folder / "recipe.yaml").write_text(load_recipe("tiny", ["finetune.data=openmoji-scenes-small:talks"]).to_yaml())
    write_manifest(folder)
    return folder


@pytest.fixture
def shipped(run, tmp_path) -> Path:
    """As the package has them."""
    return with_examples(export_parts(str(run), tmp_path / "weights" / NAME))


@torch.no_grad()
def logits(model, processor):
    return model(**processor(tiny.picture(), "USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")).logits


def said(name: str, image: Path) -> list[str]:
    parts = load_model(name)
    return [ask(*parts, image, question, max_new_tokens=6) for question in ("what colour?", "what is it?")]


# What is shared of a trained model.


def test_connector_and_adapter_alone_give_the_same_model(run, tmp_path, cache):
    out = export_parts(str(run), tmp_path / "small")
    assert verify_folder(out) is None
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.safetensors"))
    assert files == ["adapter_model.safetensors", "base/connector.safetensors"]
    kept = {name: value for file in files for name, value in load_file(out / file).items()}
    assert {value.dtype for value in kept.values()} == {torch.bfloat16}
    assert all("lora_" in name or name.startswith("connector.") for name in kept)
    parts = json.loads((out / "base/parts.json").read_text())
    assert parts == {"vision": "embedded:dinov2-s14", "text": "embedded:smollm2-135m", "dtype": "float32"}
    before, after = load_model(str(run)), load_model(str(out))
    close = {"rtol": 0, "atol": 0.02 * float(logits(*before).abs().max())}
    torch.testing.assert_close(logits(*after), logits(*before), **close)
    bare = load_model(str(out / "base"))
    with pytest.raises(AssertionError):  # else the adapter would do nothing
        torch.testing.assert_close(logits(*bare), logits(*before), **close)
    rounded = {n: v for n, v in before[0].state_dict().items() if n.startswith("model.connector.")}
    assert all(torch.equal(after[0].state_dict()[n], v.bfloat16().float()) for n, v in rounded.items())
    assert after[0].dtype == torch.float32
    text = "".join(path.read_text() for path in out.rglob("*.json")) + (out / "README.md").read_text()
    assert str(tmp_path) not in text


@pytest.mark.slow
def test_what_is_in_bf16_already_loses_nothing(recipe, tmp_path, cache):  # noqa: F811
    source = train(recipe(*PARTS, *LORA, "model.dtype=bfloat16"), progress=False)
    out = export_parts(str(source), tmp_path / "small")
    assert json.loads((out / "base/parts.json").read_text())["dtype"] == "bfloat16"
    before, after = load_model(str(source))[0].state_dict(), load_model(str(out))[0].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_can_be_moved_and_made_whole(run, tmp_path, cache, capsys):
    assert main(["export", str(run), "--format", "parts", "--out", str(tmp_path / "small")]) == 0
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "small", moved)
    assert main(["merge", str(moved), "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    torch.testing.assert_close(logits(*load_model(str(moved))), logits(*load_model(str(tmp_path / "whole"))))


def test_of_a_connector_that_was_trained_alone_there_is_no_adapter(recipe, cache, tmp_path):  # noqa: F811
    source = train(recipe(*PARTS, "stage=pretrain", "pretrain.save=connector"), progress=False)
    out = export_parts(str(source), tmp_path / "small")
    assert [path.name for path in out.rglob("*.safetensors")] == ["connector.safetensors"]
    assert verify_folder(out) is None
    load_model(str(out))


def test_the_card_says_how_this_folder_is_used(run, tmp_path):
    card = (export_parts(str(run), tmp_path / "small") / "README.md").read_text()
    use = card.partition("## Use it\n")[2].partition("\n## ")[0]
    assert "acformer fetch dinov2-s14 smollm2-135m" in use
    assert "pipeline(" not in card
    assert "## Training" in card
    assert "## Licence" in card


def test_what_the_parts_do_not_hold_is_not_left_out(recipe, cache, tmp_path, data):  # noqa: F811
    whole = train(recipe(*PARTS, "stage=finetune", "pretrain=null"), progress=False)
    with pytest.raises(CheckpointError, match=r"is not as in embedded:dinov2-s14 and embedded:smollm2-135m"):
        export_parts(str(whole), tmp_path / "small")
    own = train(recipe(*LORA, f"output_dir={tmp_path}/own"), progress=False)
    with pytest.raises(UsageError, match="its encoder has no name under which others find it"):
        export_parts(str(own), tmp_path / "small")
    assert not (tmp_path / "small").exists()
    with pytest.raises(UsageError, match="is there already"):
        export_parts(str(own), tmp_path)


def test_a_tower_that_was_trained_beside_the_adapter_is_told(recipe, cache, tmp_path):  # noqa: F811
    rates = "finetune.learning_rates={connector: 0.01, language_model: 0.02, vision_tower: 0.001}"
    source = train(recipe(*PARTS, *LORA, rates), progress=False)
    with pytest.raises(CheckpointError, match="its vision_tower was trained too: share the whole model"):
        export_parts(str(source), tmp_path / "small")


# Joined in the cache.


def test_it_is_joined_once(shipped, cache, monkeypatch):
    with pytest.raises(CheckpointError, match="run `acformer fetch acformer-scenes` first"):
        load_model(f"embedded:{NAME}")
    assert fetch_models([NAME]) == {NAME: cache / NAME}
    assert verify_folder(cache / NAME) is None
    assert embedded_path(NAME) == cache / NAME
    assert resolve(f"embedded:{NAME}") == str(cache / NAME)
    image = shipped / EXAMPLES / "0.png"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)  # an ordinary model: nothing is merged any more
        answers = said(f"embedded:{NAME}", image)
    assert answers == said(str(shipped), image)
    monkeypatch.setattr("acformer.hf.trained.load_model", None)  # a second fetch must not come this far
    assert fetch_models([NAME]) == {NAME: cache / NAME}


def test_its_card_recipe_and_examples_come_along(shipped, cache):
    folder = fetch_models([NAME])[NAME]
    assert (folder / "README.md").read_text() == (shipped / "README.md").read_text()
    found = examples(folder)
    assert len(found) == 4
    assert found[0] == Example(folder / EXAMPLES / "0.png", "what colour?", "red")
    source = json.loads((folder / "SOURCE.json").read_text())
    assert source["parts"].keys() == {"dinov2-s14", "smollm2-135m"}


def test_other_weights_are_joined_anew(shipped, cache):
    fetch_models([NAME])
    (shipped / "more").write_text("x")
    write_manifest(shipped)
    assert not is_joined(TRAINED[NAME])
    with pytest.raises(CheckpointError, match="run `acformer fetch acformer-scenes` first"):
        embedded_path(NAME)
    fetch_models([NAME])
    assert is_joined(TRAINED[NAME])


def test_damaged_weights_are_not_joined(shipped, cache):
    path = shipped / "base/connector.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"damaged: base/connector.safetensors has changed"):
        fetch_models([NAME])
    assert not (cache / NAME).exists()


def test_an_installation_without_the_weights_says_so_before_it_downloads(cache, monkeypatch):
    monkeypatch.setattr("acformer.hf.trained.fetch", None)
    with pytest.raises(CheckpointError, match=r"weights of acformer-scenes are not in this installation .*its wheel"):
        fetch_models([NAME])


def test_so_does_one_without_peft(shipped, monkeypatch):
    monkeypatch.setattr("acformer.hf.trained.find_spec", lambda module: None)
    monkeypatch.setattr("acformer.hf.trained.fetch", None)
    with pytest.raises(UsageError, match=r"acformer-scenes needs peft: pip install 'acformer\[embedded\]'"):
        fetch_models([NAME])


def test_a_cache_that_is_full_says_so(shipped, monkeypatch):
    def full(trained):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("acformer.hf.trained._join", full)
    with pytest.raises(AcFormerError, match="No space left on device; set ACFORMER_CACHE to a folder with 2 GB free"):
        fetch_models([NAME])


def test_names_are_told_before_anything_is_fetched(cache, monkeypatch):
    monkeypatch.setattr("acformer.hf.trained.fetch", None)
    with pytest.raises(UsageError, match="did you mean 'acformer-scenes'"):
        fetch_models(["dinov2-s14", "acformer-scene"])
    with pytest.raises(UsageError, match=r"a model of several parts: acformer\.hf\.trained\.fetch_models"):
        embedded.fetch([NAME])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is no list of image, question and answer"),
        ('[{"image": "0.png"}]', "is no list of image"),
        ('[{"image": "../../0.png", "question": "what?", "answer": "red"}]', "names an image outside of its folder"),
    ],
)
def test_examples_that_are_none(tmp_path, text, message):
    assert examples(tmp_path) == []
    write_text(tmp_path / EXAMPLES / EXAMPLES_LIST, text)
    with pytest.raises(CheckpointError, match=message):
        examples(tmp_path)


# Where no model is named.


def test_ask_without_a_model(shipped, cache, capsys):
    image = str(shipped / EXAMPLES / "0.png")
    options = ["--max-new-tokens", "6", "--device", "cpu", "--quiet"]
    assert main(["ask", image, "what colour?", *options]) == 4
    assert "run `acformer fetch acformer-scenes` first" in capsys.readouterr().err
    assert main(["fetch", NAME, "--quiet"]) == 0
    folder, told = capsys.readouterr().out.splitlines()
    assert folder == f"{NAME:<15} {cache / NAME}"
    assert told.endswith(f'acformer ask {cache / NAME / EXAMPLES / "0.png"} "what colour?"')
    printed = []
    for words in ([image], [f"embedded:{NAME}", image], [str(shipped), image]):
        assert main(["ask", *words, "what colour?", *options]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0].strip()
    assert len(set(printed)) == 1
    for word in ("what?", str(shipped)):
        assert main(["ask", word]) == 2
        assert f"there is {word!r} alone: acformer ask [MODEL] [IMAGE ...] QUESTION" in capsys.readouterr().err


def test_without_a_default_a_model_must_be_named(monkeypatch, capsys):
    monkeypatch.setattr(trained, "DEFAULT", None)
    assert main(["ask", "photo.png", "what?"]) == 2
    assert "no model before photo.png: acformer ask MODEL [IMAGE ...] QUESTION" in capsys.readouterr().err


def test_the_page_opens_it_with_its_images(shipped, cache, tmp_path, monkeypatch):
    from acformer.lab.demo import page_setup

    monkeypatch.setattr(page_setup, "RUNS", tmp_path / "quick")  # which is there, and is not taken
    tiny.model().save_pretrained(tmp_path / "quick/finetune/model")
    tiny.processor().save_pretrained(tmp_path / "quick/finetune/model")
    fetch_models([NAME])
    setup = page_setup.set_up_page(None, None, "auto", torch.device("cpu"))
    assert [model.name for model in setup.controller.models] == [f"acformer ({NAME})"]
    assert list(setup.images) == ["Scene 1", "Scene 2"]
    assert setup.questions == ("what colour?", "what is?")
    assert page_setup.trained_on(cache / NAME) == "openmoji-scenes-small"
    shutil.rmtree(cache / NAME)
    setup = page_setup.set_up_page(None, None, "auto", torch.device("cpu"))
    assert [model.name for model in setup.controller.models] == [f"acformer ({tmp_path / 'quick'})"]


# The script that makes the folder.


@pytest.fixture
def script(monkeypatch):
    path = Path(__file__).parents[1] / "examples/pack_weights.py"
    spec = importlib.util.spec_from_file_location("pack_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "draw_scene", lambda scene: tiny.picture())
    monkeypatch.setattr(module, "data_title", lambda stage: "openmoji-scenes-small:talks")
    monkeypatch.setattr(module, "MIN_EQUAL", 0.1)  # weights at random go over at a touch
    return module


@pytest.mark.slow
def test_packing_a_run(script, run, data, tmp_path, cache):  # noqa: F811
    out = tmp_path / "weights" / NAME
    scores = script.pack(str(run), out, data=str(data / "questions.json"), notes="Three seeds: 1, 2, 3.")
    assert scores["num_questions"] == 12
    assert 0.1 <= scores["equal"] <= 1
    assert verify_folder(out) is None
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [NAME]
    shown = examples(out)
    assert len({one.image for one in shown}) == 3
    assert all(one.answer and one.question for one in shown)
    load_recipe(str(out / "recipe.yaml"))
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "license_name" not in card
    assert "OpenMoji" in card
    assert "Three seeds: 1, 2, 3." in card
    assert "| questions.json (12) |" in card
    assert f"{100 * scores['equal']:.1f} % of its answers to 12 test questions are those of the model before" in card
    again = script.pack(str(run), out, data=str(data / "questions.json"))  # in place of the older one
    assert again["equal"] == scores["equal"]
    assert fetch_models([NAME])[NAME] == cache / NAME


def test_a_folder_of_other_answers_or_too_many_bytes_is_not_written(script, run, data, tmp_path, monkeypatch):  # noqa: F811
    out, given = tmp_path / "weights" / NAME, {"data": str(data / "questions.json")}
    monkeypatch.setattr(script, "MAX_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"connector and adapter have 0\.\d MB, more than 0"):
        script.pack(str(run), out, **given)
    monkeypatch.setattr(script, "MAX_BYTES", 20e6)
    monkeypatch.setattr(script, "MIN_EQUAL", 1.01)
    with pytest.raises(CheckpointError, match=r" % of the answers are those of .*, less than 101%"):
        script.pack(str(run), out, **given)
    assert not list((tmp_path / "weights").iterdir())


# The real thing


def shipped_weights() -> Path:
    try:
        return weights_folder(NAME)
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.mark.embedded
def test_what_ships_is_whole_and_small():
    folder = shipped_weights()
    assert verify_folder(folder) is None
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= 20e6
    assert load_recipe(str(folder / "recipe.yaml")).finetune


@pytest.mark.embedded
def test_it_answers_about_scenes_of_several_things():
    shipped_weights()
    folder = fetch_models([NAME])[NAME]
    parts = load_model(f"embedded:{NAME}")
    right = [ask(*parts, one.image, one.question, max_new_tokens=16) == one.answer for one in examples(folder)]
    assert sum(right) > len(right) / 2
