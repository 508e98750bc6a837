"""What the pages say can be done as they say it: Python runs, commands parse, recipes load, three steps are enough."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_connectors
import test_selectors
import tiny
import torch
import yaml

from acformer import cli
from acformer.anchors.selectors import SELECTORS
from acformer.connectors import CONNECTORS, Geometry, build_connector
from acformer.data.datasets import DATASETS
from acformer.hf.fusion import FUSIONS, build_fusion
from acformer.training.recipe import Recipe, list_recipes, load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
YOURS = ("NAME", "strided")
"""Connectors that a reader is told to write."""
ADD_CONNECTOR, ADD_SELECTOR = "## Add one in three steps", "## Add a selector"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def section(title: str) -> str:
    """Of the page of connectors."""
    return (ROOT / "docs/connectors.md").read_text().partition(f"{title}\n")[2].partition("\n## ")[0]


def commands() -> list[str]:
    """Every call of `acformer` in a shell block."""
    shell = "\n".join(block for page in PAGES for block in blocks(page.read_text(), "bash")).replace("\\\n", "")
    lines = [line.strip().removeprefix(".venv/bin/") for line in shell.splitlines()]
    return [line for line in lines if line.startswith("acformer ")]


def assert_it_can_be_built(recipe: Recipe) -> None:
    """Connector and fusion with their options, for DINOv2-S/14, which most recipes of the pages name, or CLIP-L/14."""
    assert recipe.model.vision in ("embedded:dinov2-s14", "openai/clip-vit-large-patch14-336")
    side = (recipe.model.image_size or (518 if recipe.model.vision.startswith("embedded:") else 336)) // 14
    if recipe.model.connector not in YOURS:
        with torch.device("meta"):
            geometry = Geometry(384, 128, (side, side), num_prefix_tokens=1)
            build_connector(recipe.model.connector, geometry, **recipe.model.connector_kwargs)
    build_fusion(recipe.model.fusion, tiny.model().model.language_model, **recipe.model.fusion_kwargs)


@pytest.fixture
def registries_as_they_were():
    """What a page registers is forgotten after it."""
    registries = [(registry, dict(registry)) for registry in (CONNECTORS, DATASETS, FUSIONS, SELECTORS)]
    yield
    for registry, before in registries:
        registry.clear()
        registry.update(before)


@pytest.mark.usefixtures("registries_as_they_were")
@pytest.mark.parametrize("page", ["api.md", "connectors.md", "add-a-data-set.md", "add-a-fusion.md"])
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path))
    text = (ROOT / "docs" / page).read_text().partition(ADD_CONNECTOR)[0]
    assert blocks(text, "python")
    for block in blocks(text, "python"):
        exec(block, {})


@pytest.mark.parametrize("command", commands())
def test_commands_are_taken(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = vars(cli._parse(shlex.split(command, comments=True)[1:]))
    if arguments.get("recipe") in list_recipes():
        assert_it_can_be_built(load_recipe(arguments["recipe"], arguments["overrides"]))


@pytest.mark.parametrize("page", ["connectors.md", "training.md"])
def test_recipes_load(page, tmp_path):
    """A whole recipe, or a part of one laid over `tiny`."""
    found = blocks((ROOT / "docs" / page).read_text(), "yaml")
    assert found
    for number, block in enumerate(found):
        path = tmp_path / f"recipe{number}.yaml"
        path.write_text(yaml.safe_dump(laid_over(yaml.safe_load(load_recipe("tiny").to_yaml()), yaml.safe_load(block))))
        assert_it_can_be_built(load_recipe(str(path)))


def laid_over(below: Any, above: Any) -> Any:
    """Sections key by key; options (`..._kwargs`) as a whole."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {k: v if k.endswith("_kwargs") else laid_over(below.get(k), v) for k, v in above.items()}


def copy_of_the_package(folder: Path) -> Path:
    """To be changed: its sources and tests; returns the package."""
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder / "src/acformer"


def insert(path: Path, before: str, text: str) -> None:
    old = path.read_text()
    assert old.count(before) == 1
    path.write_text(old.replace(before, text + before))


def passed_tests(folder: Path, files: list[str], name: str) -> list[str]:
    """`file::test[id]` of the tests that `pytest FILES -k NAME` runs there; none of them fails."""
    command = [sys.executable, "-m", "pytest", *files, "-k", name, "-p", "no:cacheprovider", "-rA"]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    passed = re.findall(r"^PASSED (.*)", result.stdout, re.MULTILINE)
    assert all(name in re.split(r"[\[\] -]", test) for test in passed), "its own tests alone"
    return passed


def contract_tests(scope: Any) -> set[str]:
    """The tests of a module or class that every name of a registry goes through."""
    marks = {name: getattr(test, "pytestmark", []) for name, test in vars(scope).items() if name.startswith("test_")}
    by_name = {name for name, found in marks.items() if any("name" in mark.args[0] for mark in found)}
    assert len(by_name) > 9
    return by_name


def names_of(passed: list[str], file: str) -> set[str]:
    tests = [test.partition("[")[0].split("::") for test in passed]
    return {parts[-1] for parts in tests if parts[0] == f"tests/{file}.py"}


@pytest.mark.slow
def test_three_steps_are_enough(tmp_path):
    """The page's connector in a copy of the package: all contract tests find it by its name, and it passes them."""
    (code,) = blocks(section(ADD_CONNECTOR), "python")
    imported, line = re.findall(r"```text\n(.*?)\n\n(.*?\n)```", section(ADD_CONNECTOR), re.DOTALL)[0]
    package = copy_of_the_package(tmp_path) / "connectors"
    (package / "strided.py").write_text(code)
    insert(package / "__init__.py", '        "acformer": AcFormerConnector,\n', line)
    insert(package / "__init__.py", "CONNECTORS = Registry", f"{imported}\n\n")
    assert "pytest tests/test_connectors.py -k strided`" in section(ADD_CONNECTOR)
    passed = passed_tests(
        tmp_path, [f"tests/test_{name}.py" for name in ("connectors", "modeling", "bench")], "strided"
    )
    assert names_of(passed, "test_connectors") == contract_tests(test_connectors)
    assert names_of(passed, "test_modeling")
    assert names_of(passed, "test_bench")


@pytest.mark.slow
def test_a_selector_is_a_function_and_a_line(tmp_path):
    """As above, of the page's selector; `acformer` and `direct` take it."""
    (code,) = blocks(section(ADD_SELECTOR), "python")
    (line,) = blocks(section(ADD_SELECTOR), "text")
    path = copy_of_the_package(tmp_path) / "anchors/selectors.py"
    insert(path, '        "anchors": by_score(cls_attention),\n', line)
    insert(path, "SELECTORS = Registry", f"{code}\n\n")
    assert "pytest tests/test_selectors.py tests/test_connectors.py -k contrast`" in section(ADD_SELECTOR)
    files = ["tests/test_selectors.py", "tests/test_connectors.py"]
    passed = passed_tests(tmp_path, files, "contrast")
    assert names_of(passed, "test_selectors") == contract_tests(test_selectors.TestEvery) - {
        "test_nan_is_refused_by_the_name_of_what_holds_it"
    }
    assert {"test_any_number_of_tokens_or_a_refusal", "test_any_selector"} <= names_of(passed, "test_connectors")


@pytest.fixture(scope="module")
def hooks():
    """`docs/hooks.py`, as mkdocs loads it."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(table: str) -> dict[str, list[str]]:
    """By name; every row has as many cells as the head and none of them is empty."""
    head, _, *rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines())
    assert all(len(row) == len(head) and all(row) for row in rows)
    return {name.strip("`"): rest for name, *rest in rows}


def test_table_of_connectors(hooks):
    rows = cells(hooks.connector_table())
    assert {*rows} == {*CONNECTORS}
    assert rows["acformer"][1:] == ["145", "yes", "yes", "84 M"]
    assert rows["mlp"][1:] == ["576", "no", "no", "21 M"]


def test_other_names_are_on_the_page(hooks):
    assert hooks.aliases(CONNECTORS) == "- `random_pr` is `acformer` with `selector: random`\n- `top_p` is `direct`"


def test_table_of_selectors(hooks):
    rows = cells(hooks.selector_table())
    assert {*rows} == {*SELECTORS}
    assert rows["anchors"][1:] == ["yes", "if asked"]
    assert rows["random"][1:] == ["no", "always"]
    assert rows["diverse"][1:] == ["no", "no"]


def test_every_list_is_on_a_page(hooks):
    for mark in hooks.LISTS:
        page = next(page.read_text() for page in PAGES if mark in page.read_text())
        assert mark not in hooks.on_page_markdown(page)
    full = hooks.connectors_in_full()
    assert all(f".{connector.__qualname__}\n" in full for connector in CONNECTORS.values())
    assert full.count("Options: ") == len(CONNECTORS)
    assert "`num_queries=145`, `depth=6`" in full, "those of the stack too"


def test_every_promise_is_held_by_a_test_that_there_is():
    named, file = [], ""
    for part, test in re.findall(r"`(\w*)::(\w+)`", (ROOT / "docs/promises.md").read_text()):
        file = part or file
        named.append((file, test))
    assert len(named) > 70
    texts = {file: (ROOT / "tests" / f"{file}.py").read_text() for file, _ in named}
    assert [one for one in named if f"def {one[1]}(" not in texts[one[0]]] == []
