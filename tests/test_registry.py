"""What packages that are installed beside this one offer, found by name; other names; the options of what is found."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from acformer import cli
from acformer.anchors.selectors import SELECTORS
from acformer.connectors import CONNECTORS, build_connector, connector_options, list_connectors
from acformer.errors import UsageError
from acformer.hf import AcFormerForConditionalGeneration
from acformer.hf.fusion import FUSIONS, Concat
from acformer.registry import Alias, Registry, check_options, check_value, options_of

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


def last(features):
    """Patches by their index, the last ones first."""
    patches = features.patches
    index = torch.arange(patches.shape[1], dtype=torch.float32, device=patches.device)
    return index.expand(patches.shape[0], 1, -1)
'''
ENTRY_POINTS = """
[acformer.connectors]
scaled = acformer_mine:Scaled
broken = acformer_mine:Lost
[acformer.selectors]
last = acformer_mine_too:LAST
[acformer.fusions]
beside = acformer.hf.fusion:Concat
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder on the path with a package in it, as pip leaves it; forgotten afterwards."""
    folder = tmp_path / "site"
    about = folder / "mine-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    (folder / "acformer_mine.py").write_text(MINE)
    selector = (
        "from acformer.anchors.selectors import by_score\nfrom acformer_mine import last\nLAST = by_score(last)\n"
    )
    (folder / "acformer_mine_too.py").write_text(selector)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for registry, name in ((CONNECTORS, "scaled"), (SELECTORS, "last"), (FUSIONS, "beside")):
        registry.pop(name, None)
    for name in ("acformer_mine", "acformer_mine_too"):
        sys.modules.pop(name, None)


def test_a_connector_of_an_installed_package_is_one_of_ours(installed, capsys):
    assert "scaled" in list_connectors()
    assert "scaled" not in CONNECTORS, "imported before anybody asked for it"
    assert connector_options("scaled") == {"start": 3.0}
    assert cli.main(["connectors"]) == 0
    listed = capsys.readouterr().out
    assert "All patches, each feature by a scale of its own." in listed
    assert "broken        connector 'broken', acformer_mine:Lost, cannot be imported" in listed, "the others are listed"


def test_selectors_and_fusions_of_an_installed_package(installed, capsys):
    assert "last" in SELECTORS.names()
    assert cli.main(["selectors"]) == 0
    assert "Patches by their index, the last ones first." in capsys.readouterr().out
    connector = build_connector("direct", tiny.config().geometry, num_anchors=2, selector="last")
    features = connector.zero_features()
    assert connector.queries.choose(features, 3).tolist() == [[13, 14, 15]]
    assert FUSIONS["beside"] is Concat


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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("connector", "options", "former", "former_options"),
    [
        ("direct", {"num_anchors": 4}, "top_p", {"num_anchors": 4}),
        ("acformer", {**tiny.CONNECTORS["acformer"], "selector": "random"}, "random_pr", tiny.CONNECTORS["acformer"]),
        ("token_packer", {"num_heads": 2, "hidden_layers": [1]}, "token_packer", {"num_heads": 2, "levels": [1]}),
    ],
)
def test_models_saved_under_former_names_load(connector, options, former, former_options, tmp_path):
    model = tiny.model(connector, connector_kwargs=options)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"connector": former, "connector_kwargs": former_options}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AcFormerForConditionalGeneration.from_pretrained(tmp_path)
    inputs = tiny.inputs("<image> red", [tiny.picture()], num_visual_tokens=model.config.num_placeholders)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["connector"] == former


class TestAliases:
    NUMBERS = Registry(
        "number", "acformer.numbers", {"one": 1, "two": 2}, {"uno": Alias("one"), "more": Alias("two", {"by": 3})}
    )

    def test_can_be_asked_for(self):
        assert (self.NUMBERS["uno"], self.NUMBERS["more"]) == (1, 2)
        assert self.NUMBERS.resolve("more") == ("two", {"by": 3})
        assert self.NUMBERS.resolve("two") == ("two", {})

    def test_are_not_listed_as_names(self):
        assert self.NUMBERS.names() == ["one", "two"]
        listed = self.NUMBERS.listing(lambda name: (f"is {name}", "")).splitlines()
        assert listed == [
            "one  is one",
            "two  is two",
            "more another name for two with by=3",
            "uno  another name for one",
        ]

    def test_are_told_to_who_mistypes_them(self):
        with pytest.raises(UsageError, match=r"did you mean 'uno'.* valid: more, one, two, uno"):
            self.NUMBERS["unno"]

    def test_a_name_of_ones_own_goes_before(self):
        mine = Registry("number", "acformer.numbers", {"one": 1, "uno": 11}, {"uno": Alias("one")})
        assert mine["uno"] == 11
        assert mine.resolve("uno") == ("uno", {})


class Parent:
    def __init__(self, first, *, depth: int = 2, width: int | None = None):
        self.options = depth, width


class Child(Parent):
    def __init__(self, first, *, sizes: Sequence[int] = (), depth: int = 3, **rest: Any):
        super().__init__(first, depth=depth, **rest)


class Grandchild(Child):
    """Without a constructor of its own."""


class TestOptions:
    def test_of_a_class_that_passes_them_on(self):
        assert list(options_of(Parent)) == ["depth", "width"]
        assert list(options_of(Child)) == list(options_of(Grandchild)) == ["sizes", "depth", "width"]
        assert options_of(Child)["depth"].default == 3

    def test_of_a_function(self):
        def function(a, b=1, *, c: float = 0.5):
            return a, b, c

        assert list(options_of(function)) == ["c"]
        check_options("it", function, {"c": 2})
        with pytest.raises(UsageError, match=r"^option c of it must be a positive float, got 0$"):
            check_options("it", function, {"c": 0})
        with pytest.raises(UsageError, match=r"^unknown option of it 'b'; valid: c$"):
            check_options("it", function, {"b": 2})

    def test_a_parents_are_checked_too(self):
        check_options("it", Grandchild, {"width": None, "depth": 1, "sizes": [1, -2]})
        with pytest.raises(UsageError, match=r"^option width of it must be a positive int or nothing, got -1$"):
            check_options("it", Grandchild, {"width": -1})

    @pytest.mark.parametrize(
        ("hint", "good", "bad", "wanted"),
        [
            (int, [0, -2, 10**400], [True, 1.0, "1", None], "an int"),
            (float, [0, -2.5, 3], [True, "1", float("nan"), float("inf"), -float("inf")], "a float"),
            (bool, [True, False], [0, 1, None], "a bool"),
            (str, ["", "x"], [1, None], "a str"),
            (int | None, [None, 2], ["x"], "an int or nothing"),
            (list[int], [[], [1, 2], (1,)], [[1, "x"], "12", 3], "a list of ints"),
            (int | Sequence[int], [1, [1]], [[1.5]], "an int or list of ints"),
            (list, [[], [1, "x"]], ["x", {}], "a list"),
            (dict | None, [{}, {"a": 1}, None], [[1], "x"], "a dict or nothing"),
            (tuple, [[1], (1,)], [1], "a list"),
            (Path, [Path()], ["x"], "a Path"),
            (Any, [1, None, "x"], [], ""),
        ],
    )
    def test_types(self, hint, good, bad, wanted):
        for value in good:
            check_value("it", hint, value)
        for value in bad:
            with pytest.raises(UsageError) as caught:
                check_value("it", hint, value)
            assert str(caught.value) == f"it must be {wanted}, got {value!r}"

    def test_ranges(self):
        check_value("it", int | None, 3, low=3)
        with pytest.raises(UsageError, match=r"^it must be an int or nothing of at least 3, got 2$"):
            check_value("it", int | None, 2, low=3)
        check_value("it", float, 1e-9, positive=True)
        for value in (0, -1.0, float("inf")):
            with pytest.raises(UsageError, match="it must be a positive float, got"):
                check_value("it", float, value, positive=True)
        check_value("it", str, "", positive=True)
