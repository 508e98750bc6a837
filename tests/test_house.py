"""The habits of docs/architecture.md that a machine can hold: sizes, lazy imports, docs that run."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from mutants import read_mutants
from transformers import AutoModel, AutoModelForCausalLM

import acformer

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src/acformer").rglob("*.py"))
HEAVY = ("torch", "transformers", "numpy", "matplotlib")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= 500
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "every file says what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is too long"


def test_no_drawer_for_odds_and_ends():
    assert not {path.stem for path in SOURCES} & {"utils", "common", "helpers", "misc"}
    parts = [path.relative_to(ROOT / "src/acformer").parts for path in SOURCES]
    assert max(len(names) for names in parts if names[0] != "lab") <= 2
    assert max(map(len, parts)) <= 3


def rooms() -> list[list[str]]:
    """The rooms in the order of docs/architecture.md, those that may not import one another side by side."""
    text = (ROOT / "docs/architecture.md").read_text()
    listed = text.split("## Which way imports go")[1].split("```text\n")[1].split("```")[0]
    return [line.split() for line in listed.splitlines()]


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports, also where it does so inside a function."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "acformer":
            modules |= {f"acformer.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
        elif isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
    return {module.split(".")[1] for module in modules if module.startswith("acformer.")} - {"__version__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT / "src/acformer").parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return  # loads the public names on first use
    order = rooms()
    above = next(place for place, line in enumerate(order) if room in line)
    allowed = {name for line in order[:above] for name in line}
    assert imported_rooms(path) - {room} <= allowed


def test_the_list_of_rooms_is_whole():
    here = {path.relative_to(ROOT / "src/acformer").parts[0].removesuffix(".py") for path in SOURCES} - {
        "__init__",
        "__main__",
    }
    assert here == {name for line in rooms() for name in line}


def test_connectors_load_neither_transformers_nor_the_downloader():
    code = "import sys, acformer.connectors; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "acformer.fetch"} & set(result.stdout.split())


def test_every_public_name_is_there():
    assert len(acformer.__all__) == 12
    for name in acformer.__all__:
        assert getattr(acformer, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = acformer.nothing


def imported(*arguments: str) -> set[str]:
    """Which heavy libraries a command of ours has imported when it is done, in a process of its own."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['acformer', *{arguments!r}]\n"
        "try:\n    runpy.run_module('acformer.cli', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        f"print('\\nloaded:', *[m for m in {HEAVY!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.rsplit("loaded:", 1)[1].split())


COMMANDS = ["quickstart", "fetch", "train", "eval", "score", "ask", "anchors", "visualize", "stats", "demo"]
COMMANDS += ["connectors", "selectors", "bench", "reproduce", "plan", "export", "serve", "convert", "merge"]


@pytest.mark.parametrize("command", tiny.mostly_slow(["", *COMMANDS], "", "train", "score"))
def test_help_imports_nothing_heavy(command):
    assert imported(*command.split(), "--help") == set()


def test_a_typo_is_told_before_torch_is_imported():
    assert imported("train", "tinny") == set()
    assert imported("plan", "tinny") == set()
    assert imported("anchors", "/no/such/picture.png") <= {"numpy"}


def test_scoring_needs_no_torch(tmp_path):
    import benchmark_files

    answers = benchmark_files.lines(tmp_path / "answers.jsonl", benchmark_files.write("pope", tmp_path))
    assert imported("score", "pope", "--answers", str(answers), "--json") == {"numpy"}


def python_blocks() -> list[str]:
    """Every ```python block of the README and of the page that a newcomer reads first."""
    pages = [ROOT / "README.md", ROOT / "docs/getting-started.md"]
    return [block for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]


def save_stand_ins(folder: Path) -> None:
    """Tiny models under the names that the pages use: a local folder goes before a hub's model of that name."""
    import tiny

    model, processor = tiny.model(), tiny.processor()
    model.save_pretrained(folder / "runs/quickstart/finetune/model")
    processor.save_pretrained(folder / "runs/quickstart/finetune/model")
    vision, text = folder / "openai/clip-vit-large-patch14-336", folder / "HuggingFaceTB/SmolLM2-135M-Instruct"
    encoder = model.config.vision_config
    encoder.image_size, encoder.patch_size = 336, 14  # as the real one: 24 x 24 patches
    AutoModel.from_config(encoder).save_pretrained(vision)
    processor.image_processor.save_pretrained(vision)
    AutoModelForCausalLM.from_config(model.config.text_config).save_pretrained(text)
    processor.tokenizer.save_pretrained(text)
    tiny.picture().save(folder / "photo.jpg")


def test_every_public_name_is_shown():
    shown = "\n".join(python_blocks())
    assert [name for name in acformer.__all__ if not re.search(rf"\b{name}\b", shown)] == []


@pytest.mark.slow
def test_the_python_of_the_first_pages_runs(tmp_path):
    """Each block in a process of its own."""
    save_stand_ins(tmp_path)
    for block in python_blocks():
        result = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, f"{block}\n{result.stderr}"


def test_raises_sections_have_one_exception_a_line():
    """The page of the API reads them so."""
    section = re.compile(r"^( *)Raises:\n((?:\1    .*\n)+)", re.MULTILINE)
    wrong = []
    for path in SOURCES:
        for indent, entries in section.findall(path.read_text()):
            starts = [line.removeprefix(indent + "    ") for line in entries.splitlines()]
            named = [line for line in starts if not line.startswith(" ")]
            wrong += [(path.name, one) for one in named if not re.match(r"[A-Z]\w+: |As `", one)]
            wrong += [(path.name, one) for one in starts if re.search(r"\. [A-Z]\w*Error: ", one)]
    assert wrong == []


@pytest.mark.parametrize("mutant", read_mutants(), ids=lambda mutant: f"{mutant.file}: {mutant.new[:40]}")
def test_a_mutant_is_still_one(mutant):
    """What it changes is in its file once, and the tests that it names are there."""
    assert (ROOT / "src/acformer" / mutant.file).read_text().count(mutant.old) == 1
    files, _, chosen = mutant.tests.partition(" -k ")
    text = "".join((ROOT / "tests" / name).read_text() for name in files.split() if name.endswith(".py"))
    names = re.findall(r"^ *def (test_\w+)", text, re.MULTILINE)
    for word in re.findall(r"\w+", chosen):
        assert word in ("or", "and", "not") or any(word in name for name in names), word
