"""The connector alone: saved by stage 1, read by load_model, built into other models, refused where it does not fit."""

import json
from functools import partial

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora import logits, same, text  # noqa: F401 (fixtures)
from test_train import data, recipe, weights  # noqa: F401 (fixtures)

from acformer import cli
from acformer.connectors import list_connectors
from acformer.errors import CheckpointError
from acformer.hf.build import build_model
from acformer.hf.checkpoints import load_model, verify_folder
from acformer.hf.connector_weights import Parts, load_connector, save_connector
from acformer.training.stages import train

ALONE = ["pretrain.save=connector"]
OPTIONS = {"num_anchors": 4, "depth": 1, "num_heads": 2, "head_dim": 8}


@pytest.fixture
def alone(recipe, text):  # noqa: F811
    """The folder of a stage 1 that has saved its connector alone."""
    return train(recipe("stage=pretrain", *ALONE, text), progress=False)


def test_stage_one_saves_the_connector_and_where_the_rest_is(alone, recipe, text, tmp_path, data):  # noqa: F811
    assert verify_folder(alone) is None
    assert [path.name for path in alone.glob("*.safetensors")] == ["connector.safetensors"]
    parts = json.loads((alone / "parts.json").read_text())
    assert (parts["vision"], parts["text"]) == ("local:vision", "local:text")
    places = json.loads((alone.parent / "places.json").read_text())
    assert places == {"vision": str(data / "vision"), "text": text.partition("=")[2]}
    whole = train(recipe("stage=pretrain", text, f"output_dir={tmp_path}/whole"), progress=False)
    assert same(load_model(str(alone))[0].state_dict(), load_model(str(whole))[0].state_dict())
    assert (
        load_model(str(alone))[0].generation_config.eos_token_id
        == load_model(str(whole))[0].generation_config.eos_token_id
    )


@pytest.mark.parametrize(
    "second",
    [[], ["finetune.lora={r: 2, dropout: 0}"], ["finetune.learning_rates={connector: 0.1}", "finetune.save=connector"]],
)
@pytest.mark.slow
def test_stage_two_goes_on_from_it(alone, recipe, text, tmp_path, second):  # noqa: F811
    """As from a whole model, whether both stages run at once or one after the other."""
    after = train(recipe(*ALONE, text, *second), progress=False)
    expected = train(recipe(text, *second, f"output_dir={tmp_path}/whole"), progress=False)
    assert same(load_model(str(after))[0].state_dict(), load_model(str(expected))[0].state_dict())


def test_resume_of_a_connector_alone_is_exact(alone, recipe, text):  # noqa: F811
    save = [f"pretrain.training.{key}" for key in ("save_strategy=steps", "save_steps=2", "max_steps=3")]
    again = ["stage=pretrain", *ALONE, text, *save]
    folder = train(recipe(*again, "resume=false"), progress=False)
    whole = load_file(folder / "connector.safetensors")
    (folder / "connector.safetensors").unlink()
    assert not (folder.parent / "checkpoint-2/model.safetensors").exists()
    assert same(load_file(train(recipe(*again), progress=False) / "connector.safetensors"), whole)


def test_merge_writes_the_rest_beside_it(alone, tmp_path):
    assert cli.main(["merge", str(alone), "--out", str(tmp_path / "merged"), "--quiet"]) == 0
    assert same(load_model(str(tmp_path / "merged"))[0].state_dict(), load_model(str(alone))[0].state_dict())
    assert len(weights(tmp_path / "merged")) > 60


def test_a_model_is_built_from_any_of_its_forms(alone, recipe, data, text, tmp_path):  # noqa: F811
    cli.main(["merge", str(alone), "--out", str(tmp_path / "merged"), "--quiet"])
    expected = load_file(alone / "connector.safetensors")
    for source in (alone, alone / "connector.safetensors", tmp_path / "merged"):
        model, _ = build_model(
            str(data / "vision"), text.partition("=")[2], connector_kwargs=OPTIONS, connector_weights=str(source)
        )
        assert same(model.model.connector.state_dict(), {n.removeprefix("connector."): w for n, w in expected.items()})
    run = recipe(
        text, "stage=finetune", "pretrain=null", f"model.connector_weights={alone}", f"output_dir={tmp_path}/new"
    )
    run.finetune.learning_rates = {"language_model": 0.01}
    after = weights(train(run, progress=False))
    assert all(torch.equal(after[f"model.{name}"], weight) for name, weight in expected.items())


def test_llavas_own_projector(tmp_path):
    trained = tiny.model("mlp").model.connector.projector.state_dict()
    path = tmp_path / "mm_projector.bin"
    torch.save({f"model.mm_projector.{name}": weight for name, weight in trained.items()}, path)
    model = tiny.model("mlp", seed=1)
    load_connector(model, str(path))
    assert same(model.model.connector.projector.state_dict(), trained)
    with pytest.raises(CheckpointError, match="is LLaVA's projector, and this model has connector 'acformer'"):
        load_connector(tiny.model(), str(path))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"connector": "perceiver"}, "was trained with model.connector acformer, and this model has perceiver"),
        ({"connector_kwargs": {**OPTIONS, "depth": 2}}, "was trained with model.connector_kwargs.depth 1, .* has 2"),
        ({"connector_kwargs": {**OPTIONS, "num_anchors": 5}}, r"model.connector_kwargs.num_anchors 4, .* has 5"),
    ],
)
def test_another_connector_is_refused(alone, data, text, other, message):  # noqa: F811
    options = {"connector_kwargs": OPTIONS if "connector" not in other else {}, **other}
    with pytest.raises(CheckpointError, match=message) as caught:
        build_model(str(data / "vision"), text.partition("=")[2], **options, connector_weights=str(alone))
    assert "\n" not in str(caught.value)


def test_an_option_that_is_younger_than_the_weights_has_its_default(alone, data, text, tmp_path):  # noqa: F811
    path, older = alone / "connector.safetensors", tmp_path / "older.safetensors"
    saved = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    options = json.loads(metadata["options"])
    for name, value in (("stochastic_anchors", False), ("selector", "anchors")):
        assert options["connector_kwargs"].pop(name) == value
    save_file(saved, older, {**metadata, "options": json.dumps(options)})
    vision, language_model = str(data / "vision"), text.partition("=")[2]
    model, _ = build_model(vision, language_model, connector_kwargs=OPTIONS, connector_weights=str(older))
    assert all(torch.equal(model.state_dict()[f"model.{name}"], weight) for name, weight in saved.items())
    changed = {**OPTIONS, "selector": "grid"}
    with pytest.raises(CheckpointError, match="selector anchors, and this model has grid"):
        build_model(vision, language_model, connector_kwargs=changed, connector_weights=str(older))


def test_an_option_that_was_removed_may_stand_beside_the_weights_where_it_did_nothing(data, text, tmp_path):  # noqa: F811
    """As in `weights/acformer-scenes`."""
    vision, language_model = str(data / "vision"), text.partition("=")[2]
    options = {"connector": "acformer_v2", "connector_kwargs": tiny.small_options("acformer_v2")}
    model, _ = build_model(vision, language_model, **options)
    save_connector(model, tmp_path, model.state_dict(), Parts(vision, language_model))
    path = tmp_path / "connector.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    known = json.loads(metadata["options"])
    for value in (False, True):
        known["connector_kwargs"] |= {"mass": value, "pooled": False}
        save_file(load_file(path), tmp_path / "older.safetensors", {**metadata, "options": json.dumps(known)})
        again = partial(build_model, vision, language_model, **options)
        if value:
            with pytest.raises(CheckpointError, match=r"older\.safetensors: option mass=True .* leave it out"):
                again(connector_weights=str(tmp_path / "older.safetensors"))
        else:
            loaded, _ = again(connector_weights=str(tmp_path / "older.safetensors"))
            assert torch.equal(loaded.model.connector.block.up.weight, model.model.connector.block.up.weight)


@pytest.mark.parametrize("connector", list_connectors())
def test_a_connector_is_taken_from_a_folder_of_its_own_options(connector, tmp_path):
    """All of them, with their defaults, as they come back from JSON (lists for tuples)."""
    model = tiny.model(connector)
    model.save_pretrained(tmp_path)
    tiny.processor(model.config.num_placeholders).save_pretrained(tmp_path)
    other = tiny.model(connector, seed=1)
    load_connector(other, str(tmp_path))
    assert same(other.model.connector.state_dict(), model.model.connector.state_dict())


def test_a_connector_between_other_widths_is_refused(alone, tmp_path):
    from acformer.hf import AcFormerForConditionalGeneration

    config = tiny.config(connector_kwargs=OPTIONS)
    config.text_config.hidden_size = 48
    config.text_config.head_dim = 12
    model = AcFormerForConditionalGeneration(config)
    with pytest.raises(
        CheckpointError, match=r"3 weights differ, first connector.projector.0.weight|weights differ, first"
    ):
        load_connector(model, str(alone))


@pytest.mark.parametrize("name", ["nothing.safetensors", "empty", "text.safetensors", "other.safetensors"])
def test_what_is_no_connector(tmp_path, name):
    from safetensors.torch import save_file

    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("{}")
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_connector(tiny.model(), str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_language_model_that_is_another_one_now_is_told(alone, text):  # noqa: F811
    """What stands beside the connector is read anew: of another width, it is refused."""
    from transformers import AutoModelForCausalLM

    config = tiny.config().text_config
    config.hidden_size, config.head_dim = 48, 12
    AutoModelForCausalLM.from_config(config).save_pretrained(text.partition("=")[2])
    with pytest.raises(CheckpointError):
        load_model(str(alone))
