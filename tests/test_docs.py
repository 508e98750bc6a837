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


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def three_steps() -> str:
    return (ROOT / "docs/connectors.md").read_text().partition("## Add one in three steps")[2]


def commands() -> list[str]:
    """Every call of `acformer` in a shell block."""
    shell = "\n".join(block for page in PAGES for block in blocks(page.read_text(), "bash")).replace("\\\n", "")
    lines = [line.strip().removeprefix(".venv/bin/") for line in shell.splitlines()]
    return [line for line in lines if line.startswith("acformer ")]


def assert_it_can_be_built(recipe: Recipe) -> None:
    """Connector and fusion with their options, for DINOv2-S/14, which is what the recipes of the pages name."""
    assert recipe.model.vision == "embedded:dinov2-s14"
    side = (recipe.model.image_size or 518) // 14
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
    text = (ROOT / "docs" / page).read_text().removesuffix(three_steps())
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


def test_three_steps_are_enough(tmp_path):
    """The page's connector in a copy of the package: the contract tests find it and it passes them."""
    (code,) = blocks(three_steps(), "python")
    imported, line = re.findall(r"```text\n(.*?)\n\n(.*?\n)```", three_steps(), re.DOTALL)[0]
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = tmp_path / "src/acformer/connectors"
    (package / "strided.py").write_text(code)
    registry = (package / "__init__.py").read_text()
    opening = '    "acformer.connectors",\n    {\n'
    assert opening in registry
    first = "CONNECTORS = Registry"
    registry = registry.replace(opening, opening + line).replace(first, f"{imported}\n\n{first}")
    (package / "__init__.py").write_text(registry)
    files = [f"tests/test_{name}.py" for name in ("connectors", "modeling", "bench")]
    command = [sys.executable, "-m", "pytest", *files, "-k", "strided", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    result = subprocess.run([*command, "-rA"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("\nPASSED ") > 40


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
    assert all(len(idea) > 30 for idea, *_ in rows.values())


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
