"""Connectors of packages that are installed beside this one, found by name."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from acformer import cli
from acformer.connectors import CONNECTORS, build_connector, connector_options, list_connectors
from acformer.errors import UsageError
from acformer.hf import AcFormerForConditionalGeneration
from acformer.registry import Registry

MINE = '''
import torch
from torch import nn
from acformer.connectors import Connector
from acformer.connectors.blocks import Projector

class Scaled(Connector):
    """All patches, each feature by a scale of its own."""

    def __init__(self, geometry, *, start: float = 3.0):
        super().__init__(geometry)
        self.scale = nn.Parameter(torch.full((geometry.vision_hidden_size,), start))
        self.register_buffer("places", torch.arange(geometry.num_patches), persistent=False)
        self.projector = Projector(geometry.vision_hidden_size, geometry.text_hidden_size)

    @property
    def num_tokens(self):
        return self.geometry.num_patches

    def aggregate(self, features, num_tokens):
        return self.projector(self.scale * features.patches[:, self.places])
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder on the path with a package in it, as pip leaves it; forgotten afterwards."""
    folder = tmp_path / "site"
    about = folder / "mine-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[acformer.connectors]\nscaled = acformer_mine:Scaled\nbroken = acformer_mine:Lost\n"
    )
    (folder / "acformer_mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("scaled", "broken"):
        CONNECTORS.pop(name, None)
    sys.modules.pop("acformer_mine", None)


def test_a_connector_of_an_installed_package_is_one_of_ours(installed, capsys):
    assert "scaled" in list_connectors()
    assert "scaled" not in CONNECTORS, "imported before anybody asked for it"
    assert connector_options("scaled") == {"start": 3.0}
    (installed / "mine-1.0.dist-info/entry_points.txt").write_text(
        "[acformer.connectors]\nscaled = acformer_mine:Scaled\n"
    )
    assert cli.main(["connectors"]) == 0
    assert "All patches, each feature by a scale of its own." in capsys.readouterr().out


def test_a_package_that_cannot_be_imported_is_told(installed):
    with pytest.raises(UsageError, match=r"connector 'broken', acformer_mine:Lost, cannot be imported: AttributeError"):
        connector_options("broken")


def test_a_name_that_nobody_has_says_where_one_may_come_from():
    with pytest.raises(UsageError, match=r"unknown connector 'scaled'.*acformer.connectors"):
        build_connector("scaled", tiny.config().geometry)
    with pytest.raises(UsageError, match="did you mean 'one'"):
        Registry("number", "acformer.numbers", {"one": 1})["onne"]


def test_any_weight_starts_as_its_constructor_makes_it(installed):
    """Of a model that is built without memory: a weight that no rule knows, a buffer that no checkpoint holds."""
    config = tiny.config("scaled", connector_kwargs={"start": 2.0})
    model = AcFormerForConditionalGeneration.from_pretrained(None, config=config, state_dict={}, strict=False)
    connector = model.model.connector
    assert torch.equal(connector.scale, torch.full((32,), 2.0))
    assert torch.equal(connector.places, torch.arange(16))


IN_A_FRESH_PROCESS = """
import sys, torch
from acformer.hf import AcFormerForConditionalGeneration
folder = sys.argv[1]
model = AcFormerForConditionalGeneration.from_pretrained(folder)
assert torch.equal(model.model.connector.scale, torch.full((32,), 0.5))
assert torch.equal(model.model.connector.places, torch.arange(16))
assert torch.equal(model(**torch.load(f"{folder}/inputs.pt")).logits, torch.load(f"{folder}/logits.pt"))
"""


def test_its_model_loads_in_a_fresh_process(installed, tmp_path, monkeypatch):
    model = tiny.model("scaled")
    with torch.no_grad():
        model.model.connector.scale.fill_(0.5)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    inputs = tiny.inputs("USER: <image> red ASSISTANT:", [tiny.picture()], num_visual_tokens=16)
    torch.save(dict(inputs), folder / "inputs.pt")
    torch.save(model(**inputs).logits, folder / "logits.pt")
    monkeypatch.setenv("PYTHONPATH", str(installed))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
