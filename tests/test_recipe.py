"""Recipes are tested data: every YAML that ships loads, fits its dataclasses and its TrainingArguments."""

import pytest
import yaml

from acformer.connectors import connector_options
from acformer.data.templates import TEMPLATES
from acformer.errors import UsageError
from acformer.training.recipe import Recipe, coerce, list_recipes, load_recipe
from acformer.training.stages import training_arguments
from acformer.training.strict_yaml import parse_yaml


def test_what_ships():
    assert list_recipes() == [
        "dinov3-smollm2-360m",
        "llava15-13b-acformer145",
        "llava15-7b-acformer145",
        "llava15-7b-acformer145-lora",
        "llava15-7b-mlp577",
        "openllama3b-acformer145",
        "scenes-cpu-smollm2",
        "scenes-cpu-smollm2-hard",
        "scenes-gpu",
        "siglip2-qwen3-0.6b",
        "smol",
        "tiny",
    ]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_names_things_that_exist(name, tmp_path):
    recipe = load_recipe(name)
    assert set(recipe.model.connector_kwargs) <= set(connector_options(recipe.model.connector))
    assert recipe.model.template in {*TEMPLATES, "tokenizer"}
    assert str(recipe.output) == f"runs/{name}"
    for _, spec in recipe.stages():
        assert training_arguments(spec, tmp_path, recipe.seed, progress=False).output_dir == str(tmp_path)
        assert spec.template is None or spec.template in TEMPLATES


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_says_command_hardware_time_and_score(name):
    from importlib.resources import files

    text = (files("acformer.training") / "recipes" / f"{name}.yaml").read_text()
    head = text[: text.index("\nmodel:")]
    assert f"acformer.cli train {name}" in head or f"acformer train {name}" in head
    assert "hardware" in head
    assert "expect" in head


@pytest.mark.parametrize("name", ["llava15-7b-acformer145", "llava15-13b-acformer145", "openllama3b-acformer145"])
def test_the_papers_recipe_is_the_papers(name):
    from acformer.lab.paper import RECIPE

    recipe = load_recipe(name)
    assert recipe.model.connector_kwargs == {"num_anchors": 144}
    assert recipe.pretrain.learning_rates == {"connector": RECIPE["pretrain"].learning_rate}
    assert set(recipe.finetune.learning_rates.values()) == {RECIPE["finetune"].learning_rate}
    for stage, spec in recipe.stages():
        assert spec.training["per_device_train_batch_size"] * 8 == RECIPE[stage].batch_size


@pytest.mark.parametrize("name", ["llava15-7b-acformer145-lora", "siglip2-qwen3-0.6b", "dinov3-smollm2-360m"])
def test_one_card_has_the_papers_batch_in_more_passes(name):
    from acformer.lab.paper import RECIPE

    for stage, spec in load_recipe(name).stages():
        passes = spec.training["gradient_accumulation_steps"]
        assert spec.training["per_device_train_batch_size"] * passes == RECIPE[stage].batch_size


def test_overrides_are_yaml_and_reach_every_level():
    recipe = load_recipe(
        "smol",
        ["seed=3", "model.connector_kwargs.num_anchors=16", "finetune.training.max_steps=7", "stage=pretrain"],
    )
    assert recipe.seed == 3
    assert recipe.model.connector_kwargs == {"num_anchors": 16, "depth": 2}
    assert recipe.finetune.training["max_steps"] == 7
    assert "max_steps" not in recipe.pretrain.training  # written once in the file, for both stages
    assert [stage for stage, _ in recipe.stages()] == ["pretrain"]


def test_another_connector_does_not_take_over_the_options_of_the_recipes_own():
    assert load_recipe("tiny").model.connector_kwargs
    assert load_recipe("tiny", ["model.connector=mlp"]).model.connector_kwargs == {}
    own = ["model.connector=perceiver", "model.connector_kwargs.depth=1"]
    assert load_recipe("tiny", own).model.connector_kwargs == {"depth": 1}


def test_a_recipe_file_and_its_own_record_say_the_same(tmp_path):
    recipe = load_recipe("tiny", ["seed=5"])
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.conector=mlp"], "unknown recipe key 'model.conector'; did you mean 'model.connector'"),
        (["sed=1"], "did you mean 'seed'"),
        (["stage=finetun"], "did you mean 'finetune'"),
        (["pretrain=null", "stage=pretrain"], "nothing to run for stage=pretrain"),
        (["seed"], "'seed' is not of the form key=value"),
        (["seed=[1"], "not valid YAML"),
        (["seed=2020-13-01"], "not valid YAML: seed=2020-13-01: month must be"),
        (["seed=!!timestamp x"], "not valid YAML: seed=!!timestamp x: .*NoneType"),
        (["seed=!!bool x"], "not valid YAML: seed=!!bool x: 'x'"),
        (["seed=!!python/object/apply:os.getcwd []"], "could not determine a constructor"),
        (["model.text={a: 1, a: 2}"], r"not valid YAML: model.text={.*}: key 'a' is there twice \(line 1\)"),
        (["seed=one"], "recipe key seed must be int, got 'one'"),
        (["seed=true"], "recipe key seed must be int, got True"),
        (["model.image_size=big"], "recipe key model.image_size must be int or nothing"),
        (["name.deep=1"], "'name' is a value, not a section"),
        (["finetune.learning_rates.conector=0.1"], "did you mean 'connector'"),
        (["finetune.learning_rates.connector=5e-4"], r"write 5.0e-4: YAML reads 5e-4 as text"),
        (["finetune.learning_rates.connector=-1"], "must be a positive number"),
        (["finetune.learning_rates={}"], "learning_rates is empty"),
        (["finetune.learning_rates.vision_tower=0.1"], "cache_features needs a frozen encoder"),
        (["finetune.learning_rates.connector=.nan"], "must be a positive number, got nan"),
        (["finetune.max_length=-5"], "recipe key finetune.max_length must be at least 1, got -5"),
        (["finetune.group=0"], "recipe key finetune.group must be at least 1"),
        (["pretrain.max_samples=0"], "recipe key pretrain.max_samples must be at least 1"),
        (["finetune.max_bad_fraction=2"], r"finetune.max_bad_fraction must be in 0\.\.1, got 2"),
        (["finetune.max_bad_fraction=.nan"], "got nan"),
        (["seed=-1"], "recipe key seed must be in 0"),
        (["model.image_size=0"], "model.image_size must be at least 1"),
        (["model.tokenizer_vocab=-1"], "model.tokenizer_vocab must be at least 1"),
        (["model.connector_kwargs={1: 2}"], "model.connector_kwargs: its keys must be names"),
        (["output_dir=/tmp/{x}"], "'/tmp/{x}': {name} is all that can be filled in"),
        (["output_dir=runs/{name}{"], "{name} is all that can be filled in"),
        (["finetune.training.learning_rate=0.1"], "give finetune.learning_rates.MODULE"),
        (["finetune.training.output_dir=x"], "finetune.training.output_dir does nothing here: give output_dir"),
        (["finetune.training.seed=1"], "finetune.training.seed does nothing here: give seed"),
        (["finetune.training.resume_from_checkpoint=true"], "give resume"),
        (["finetune.training.remove_unused_columns=true"], "always false"),
        (["finetune.training.logging_nan_inf_filter=true"], "always false"),
    ],
)
def test_what_is_wrong_is_named(overrides, message):
    with pytest.raises(UsageError, match=message):
        load_recipe("tiny", overrides)


def test_output_is_named_after_the_recipe():
    assert str(load_recipe("tiny", ["output_dir='{name}/of/{name}'"]).output) == "tiny/of/tiny"


def test_values_are_fitted_to_type_hints():
    """As `TrainingArguments` has them, too."""
    assert coerce(float, 3, "x") == 3.0
    assert coerce(None | str | list[str], ["a"], "x") == ["a"]
    assert coerce(dict[str, int] | str, {"a": 1}, "x") == {"a": 1}
    assert coerce(dict[str, int], {"a": 1}, "x") == {"a": 1}
    with pytest.raises(UsageError, match="recipe key x must be nothing or str or list, got 3"):
        coerce(None | str | list[str], 3, "x")


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(UsageError, match="unknown recipe 'tinny'; did you mean 'tiny'"):
        load_recipe("tinny")
    with pytest.raises(UsageError, match="cannot read recipe"):
        load_recipe(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(UsageError, match="not a mapping"):
        load_recipe(str(tmp_path / "list.yaml"))
    (tmp_path / "latin.yaml").write_bytes("name: café\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"cannot read recipe .*latin\.yaml: it is not UTF-8 \(byte 9\)"):
        load_recipe(str(tmp_path / "latin.yaml"))
    for text in ("a: " + "[" * 5000, "a: &a [*a]"):
        (tmp_path / "deep.yaml").write_text(text)
        with pytest.raises(UsageError, match=r"nested too deeply: .*deep\.yaml"):
            load_recipe(str(tmp_path / "deep.yaml"))
    with (tmp_path / "huge.yaml").open("w") as file:
        file.truncate(2_000_000)
    with pytest.raises(UsageError, match=r"huge\.yaml has 2,000,000 bytes: too large for a recipe"):
        load_recipe(str(tmp_path / "huge.yaml"))
    (tmp_path / "half.yaml").write_text(yaml.safe_dump({"model": {"vision": "x"}}))
    with pytest.raises(UsageError, match=r"recipe key model.text is missing"):
        load_recipe(str(tmp_path / "half.yaml"))


LAUGHS = """\
a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]
b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]
c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]
d: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]
e: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]
f: &f [*e, *e, *e, *e, *e, *e, *e, *e, *e, *e]
g: [*f, *f, *f, *f, *f, *f, *f, *f, *f, *f]
"""
MERGES = (
    LAUGHS.replace("[lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]", "{x: 1}")
    .replace("[", "{<<: [")
    .replace("]", "]}")
)
LONG = f"a: &a {'x' * 2000}\nb: [{', '.join(['*a'] * 1000)}]\n"


@pytest.mark.timeout(20)  # the memory would be gone first
@pytest.mark.parametrize("text", [LAUGHS, MERGES, LONG])
def test_aliases_that_multiply(tmp_path, text):
    (tmp_path / "many.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"many.yaml stands for more than 1,000,000 characters"):
        load_recipe(str(tmp_path / "many.yaml"))


def test_a_key_that_is_there_twice(tmp_path):
    (tmp_path / "twice.yaml").write_text("seed: 1\nmodel: {vision: a, text: b}\nseed: 2\n")
    with pytest.raises(UsageError, match=r"twice\.yaml: key 'seed' is there twice \(line 3\)"):
        load_recipe(str(tmp_path / "twice.yaml"))


def test_an_alias_is_a_copy_and_a_merge_can_be_overridden():
    value = parse_yaml("a: &a {x: [1]}\nb: *a\nc: {<<: *a, y: 2}\nd: {<<: *a, x: 3}", "here")
    assert value == {"a": {"x": [1]}, "b": {"x": [1]}, "c": {"x": [1], "y": 2}, "d": {"x": 3}}
    value["a"]["x"].append(4)
    assert value["b"] == {"x": [1]}
    assert value["c"]["x"] == [1]
    assert parse_yaml("", "here") is None


def test_unknown_training_argument(tmp_path):
    recipe = load_recipe("tiny", ["finetune.training.max_step=3"])
    assert isinstance(recipe, Recipe)
    with pytest.raises(UsageError, match="did you mean 'max_steps'"):
        training_arguments(recipe.finetune, tmp_path, 0, progress=False)
