"""examples/anchors.ipynb: its cells run in order, in a kernel too; git keeps it without outputs."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from acformer.fetch.embedded import EMBEDDED

NOTEBOOK = Path(__file__).parents[1] / "examples/anchors.ipynb"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache in which a random encoder and an image of noise lie where `acformer fetch` puts the real ones."""
    monkeypatch.setenv("ACFORMER_CACHE", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    folders = {name: tmp_path / name for name in ("dinov2-s14", "photographs")}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "SOURCE.json").write_text(json.dumps(EMBEDDED[name].source))
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=6, image_size=336, mlp_ratio=1)
    Dinov2Model(config).save_pretrained(folders["dinov2-s14"])
    BitImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folders["dinov2-s14"])
    tiny.picture(size=(60, 40)).save(folders["photographs"] / "coffee.png")


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_cells_run_in_order(cache, capsys):
    namespace: dict = {}
    for cell in code_cells():
        exec(cell, namespace)
    assert [label for label, _ in namespace["panels"]] == [f"{n} anchors" for n in (6, 12, 24, 64, 144, 256)]
    said = capsys.readouterr().out
    assert "their share of the area: 11.1%" in said
    counts = [int(line.split(": ")[1].split()[0]) for line in said.splitlines() if line.startswith("among")]
    assert len(counts) == 6
    assert sum(counts) == 64


def test_git_keeps_no_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.extras
@pytest.mark.filterwarnings("default")  # of the kernel's libraries
def test_a_kernel_shows_its_figures(cache):
    """Three cells end in a figure, and Jupyter gets an image of each although pyplot is never imported."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 3
    assert not [output for output in outputs if output.output_type == "error"]
