"""What a table of the paper asks, as data: which rows, at which numbers of visual tokens, with how many seeds.

A plan is a table (its rows) at a scale (its recipe, data and budget). Rows come from the registries of connectors and
selectors, so that a new one has its row without a line here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from acformer.data.entries import data_title
from acformer.errors import UsageError, unknown_name
from acformer.training.recipe import Recipe, load_recipe

PROBE = "scene-reader"
"""As `model.text` of a recipe: no language model, a small probe is given the tokens. The name is in records.

Its weights start from what drawing the connector's has left of the seed, so from others in every row.
"""
PAIRED_PROBE, MIXING_PROBE = "scene-probe", "scene-probe-attends"
"""The same probe, and one that lets the tokens read each other first; both start from the same weights in every row."""
WORD_PROBE = "scene-probe-words"
"""One that scores tokens by the language model's embeddings of nouns and words: where it comes before one alone."""
PROBES = (PROBE, PAIRED_PROBE, MIXING_PROBE, WORD_PROBE)
OWN_RECIPES = {
    name: Path(__file__).with_name(f"{name}.yaml")
    for name in ("scenes-cpu", "scenes-cpu-hard", "scenes-cpu-words", "scenes-cpu-words-hard")
}
"""Recipes with a probe, by name; not of `acformer train`, since there would be no model to save."""


def table_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """As `load_recipe`, of `OWN_RECIPES` too."""
    return load_recipe(str(OWN_RECIPES.get(name, name)), overrides)


@dataclass(frozen=True)
class TableRow:
    """A line of a table: a connector with the options in which it differs from its defaults at a budget.

    rate_of: the connector whose search for a learning rate it takes over instead of making its own; "" for none.
    """

    name: str
    connector: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rate_of: str = ""


@dataclass(frozen=True)
class Search:
    """How every row finds its learning rate: the same short trials, the lowest loss on held-out data wins.

    factors: of the recipe's learning rate of the connector, in every stage. fraction: of the steps of a run.
    data, limit: the first so many questions (for a probe: scenes) of another data set than the table's. seed: of the
    trials.
    """

    data: str
    factors: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    fraction: float = 0.25
    limit: int = 512
    seed: int = 1000


@dataclass(frozen=True)
class Scale:
    """What a machine of some size can run; every row of a table runs under it.

    recipe: name or file; all that there is to a training but connector, learning rate and seed. overrides: changes of
    it, `key=value` as in `acformer train`. budgets: T, visual tokens. data: what is evaluated, the first `limit`
    questions. sizes: options of single connectors where their defaults are not of this size (a recipe's own
    `connector_kwargs` are taken by all stacks). probe: a recipe (see `acformer.lab.reproduce.train_probe`) by which
    every run's connector is trained with a probe first; the learning rate is then looked for there. fetch: embedded
    names that must be there.
    """

    name: str
    recipe: str
    budgets: tuple[int, ...]
    data: tuple[str, ...]
    search: Search
    seeds: int = 3
    limit: int | None = None
    scaling_budget: int = 33
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    probe: str | None = None
    fetch: tuple[str, ...] = ()
    needs_accelerator: bool = False
    note: str = ""
    overrides: tuple[str, ...] = ()

    def load_recipe(self) -> Recipe:
        """The recipe as it is run, without what every run sets itself.

        Raises:
            UsageError: there is no such recipe; a probe would be trained on one kind of scenes and asked about another.
        """
        recipe = table_recipe(self.recipe, self.overrides)
        if recipe.from_model is not None:
            raise UsageError(f"from_model={recipe.from_model}: what a table compares is trained from nothing")
        probe = table_recipe(self.probe) if self.probe else recipe
        if self.probe and (probe.model.text not in PROBES or recipe.model.text in PROBES):
            raise UsageError(
                f"scale {self.name!r}: model.text must be a probe ({', '.join(PROBES)}) in probe={self.probe} "
                "and in no other recipe"
            )
        if probe.model.text in PROBES and probe.finetune:
            self._refuse_other_scenes(data_title(probe.finetune.data))
        return replace(recipe, name=Path(self.recipe).stem, output_dir="", resume=True)

    def _refuse_other_scenes(self, trained_on: str) -> None:
        """A probe knows the nouns and words of one difficulty: of another's questions it would be scored on noise."""
        scenes = trained_on.partition(":")[0]
        for data in (*self.data, self.search.data):
            if (asked := data.partition(":")[0]) != scenes:
                raise UsageError(
                    f"finetune.data={trained_on} trains the probe on {scenes}, but scale {self.name!r} asks about "
                    f"{data}: give finetune.data={asked}:captions, or in Python a Scale whose data and search.data "
                    f"are {scenes}"
                )


@dataclass(frozen=True)
class Plan:
    """A table at a scale. fractions: of the samples, below 1, with which the rows are trained too (same steps).

    table: the one that it is a variant of, where it has a name of its own. against: rows that every other row is
    compared with, seed by seed.
    """

    name: str
    asks: str
    scale: Scale
    rows: tuple[TableRow, ...]
    fractions: tuple[float, ...] = ()
    table: str | None = None
    against: tuple[str, ...] = ("acformer",)

    @property
    def folder(self) -> str:
        """`table3-cpu`: where its results lie."""
        return f"{self.name}-{self.scale.name}"

    @property
    def command(self) -> str:
        """What makes it, but for `--connectors`, `--seeds` and `--tokens`."""
        scale = self.scale
        name = ("--name", self.name) if self.table else ()
        words = ["acformer reproduce", self.table or self.name, *scale.overrides, "--scale", scale.name, *name]
        if scale.search.factors != SCALES.get(scale.name, scale).search.factors:
            words += ["--factors", *(f"{factor:g}" for factor in scale.search.factors)]
        return " ".join(words)


@dataclass(frozen=True)
class Table:
    """A plan without its scale; `rows` looks into the registries when it is called."""

    asks: str
    rows: Callable[[], tuple[TableRow, ...]]
    fractions: tuple[float, ...] = ()
    against: tuple[str, ...] = ("acformer",)


def plan_for(
    table: str,
    scale: str,
    seeds: int | None = None,
    *,
    overrides: Sequence[str] = (),
    factors: Sequence[float] | None = None,
    name: str | None = None,
) -> Plan:
    """The plan of a table at a scale.

    With `overrides`, `key=value` changes of the scale's recipe, or `factors`, those of the learning rate that every row
    tries (one alone: no search), the plan needs a `name` of its own: what is trained otherwise does not belong into the
    same table.

    Raises:
        UsageError: no such table or scale; a changed recipe or search without a new name; another connector for all
            rows; a factor that is not above 0.
    """
    if table not in TABLES:
        raise unknown_name("table", table, TABLES)
    if scale not in SCALES:
        raise unknown_name("scale", scale, SCALES)
    for changed, what in ((overrides, "recipe"), (factors, "search")):
        if changed and (name is None or name in TABLES):
            raise UsageError(f"a changed {what} makes another table than {name or table}: give it a --name of its own")
    if any(override.partition("=")[0].strip() == "model.connector" for override in overrides):
        raise UsageError(
            "model.connector is what the rows of a table differ in: choose rows with --connectors; options of all "
            "stacks are model.connector_kwargs.KEY=VALUE"
        )
    chosen, size = TABLES[table], replace(SCALES[scale], overrides=tuple(overrides))
    if seeds is not None:
        size = replace(size, seeds=seeds)
    if factors:
        if wrong := [factor for factor in factors if not 0 < factor < math.inf]:
            raise UsageError(f"a learning rate is not multiplied by {wrong[0]:g}: --factors are numbers above 0")
        size = replace(size, search=replace(size.search, factors=tuple(sorted(set(factors)))))
    variant_of = None if name in (None, table) else table
    return Plan(name or table, chosen.asks, size, chosen.rows(), chosen.fractions, variant_of, chosen.against)


def chosen_rows(plan: Plan, names: Sequence[str] | None) -> tuple[TableRow, ...]:
    """The rows of that name or, where none is called so, of that connector; all by default."""
    if names is None:
        return plan.rows
    from acformer.connectors import CONNECTORS

    valid = {name for row in plan.rows for name in (row.name, row.connector)}
    names = [name if name in valid else CONNECTORS.resolve(name).name for name in names]
    for name in names:
        if name not in valid:
            raise unknown_name(f"connector of {plan.name}", name, valid)
    by_name = {row.name for row in plan.rows} & set(names)
    return tuple(row for row in plan.rows if row.name in by_name or row.connector in set(names) - by_name)


def every_connector() -> tuple[TableRow, ...]:
    """Table 3: one row a connector."""
    from acformer.connectors import CONNECTORS, list_connectors

    variants = [name for name, alias in CONNECTORS.aliases.items() if alias.options]  # an experiment with its own name
    return tuple(TableRow(name, name) for name in sorted([*list_connectors(), *variants]))


def every_selector() -> tuple[TableRow, ...]:
    """Table 4: every selector's tokens direct in, and as queries; the anchors drawn while training; all tokens."""
    from acformer.anchors.selectors import SELECTORS

    selectors = sorted([*SELECTORS.names(), *SELECTORS.aliases])
    pairs = [(connector, selector) for connector in ("acformer", "direct") for selector in selectors]
    pairs.remove(("acformer", "random"))  # as in Table 3, it is called random_pr
    selected = (TableRow(f"{connector}-{selector}", connector, {"selector": selector}) for connector, selector in pairs)
    drawn = TableRow("acformer-stochastic", "acformer", {"stochastic_anchors": True})
    return (*selected, drawn, *(TableRow(name, name) for name in ("random_pr", "e_vit", "mlp")))


def few_connectors() -> tuple[TableRow, ...]:
    """Figure 1: learned, pooled and anchor queries, and all tokens."""
    return tuple(TableRow(name, name) for name in ("acformer", "mlp", "perceiver", "pooling"))


SUCCESSOR = "acformer_v2"
ALONE = ("places", "talk", "stem")
"""Parts of `acformer_v2` that have a row alone, with the anchors of the paper."""
TAKEN_AWAY = ("block", "near", "places")
"""Parts that are on by default, and have a row without them, and one more where tokens talk."""


def parts_of_the_successor() -> tuple[TableRow, ...]:
    """`acformer_v2`, every connector of Table 3, `acformer_v2` less a part, `acformer` with parts or other queries."""
    from acformer.anchors.selectors import SELECTORS

    bare: dict[str, Any] = {"selector": "anchors", **dict.fromkeys((*ALONE, *TAKEN_AWAY), False)}
    talks = {**bare, "places": True, "talk": True}
    rows: dict[str, dict[str, Any]] = {}
    for name, own in ((SUCCESSOR, {}), (f"{SUCCESSOR}+talk", {"talk": True})):
        rows[name] = own
        rows |= {f"{name}-{part}": {**own, part: False} for part in TAKEN_AWAY}
        rows |= {f"{name}+{selector}": {**own, "selector": selector} for selector in ("anchors", "grid")}
    rows |= {
        **{f"acformer+{part}": {**bare, part: True} for part in ALONE},
        "acformer+block+places+talk": {**talks, "block": True},
        "acformer+stem+places+talk": {**talks, "stem": True},
        "acformer+stem+places+talk+near": {**talks, "stem": True, "near": True},
        "acformer+stem+places+talk+spaced": {**talks, "stem": True, "selector": "spaced"},
        "acformer+stem+places+talk+grid": {**talks, "stem": True, "selector": "grid"},
    }
    changed = [TableRow(name, SUCCESSOR, options, "acformer") for name, options in rows.items()]
    for selector in sorted({*SELECTORS.names(), *SELECTORS.aliases} - {"anchors", "random"}):  # rows already
        changed.append(TableRow(f"acformer+{selector}", "acformer", {"selector": selector}, "acformer"))
    changed.append(TableRow("c_abstractor+deeper", "c_abstractor", {"depth": 2}, "c_abstractor"))
    rivals = (row for row in every_connector() if row.name != SUCCESSOR)
    return (*rivals, *changed)


TABLES = {
    "table3": Table("Which connector answers best at the same number of visual tokens?", every_connector),
    "table4": Table(
        "Direct in or aggregated; and is it the anchors, or any query that comes from the image?",
        every_selector,
        against=("acformer-anchors",),
    ),
    "figure1": Table(
        "Accuracy against the time of a training step, and against the number of training samples",
        few_connectors,
        (0.125, 0.25, 0.5),
    ),
    "successor": Table(
        "Does it matter which tokens, and that they know their place and talk to each other?",
        parts_of_the_successor,
        against=("acformer", "c_abstractor", SUCCESSOR),
    ),
}
# DINOv2-S/14 has 12 blocks: a half, two thirds, and the last two below the feature layer, as of CLIP-L's 24.
DINOV2_S = {"token_packer": {"hidden_layers": [6, 8, 10, 11]}}
ON_TWO_CORES: dict[str, dict[str, Any]] = {
    "c_abstractor": {"depth": 1},
    "d_abstractor": {"depth": 1, "num_heads": 4, "ff_mult": 2},
    "q_former": {"depth": 2, "hidden_size": 256, "num_heads": 4, "ff_mult": 2},
    "token_packer": {"hidden_layers": [], "num_heads": 4},  # the feature layer alone, encoded already
}
SMOLLM2 = Scale(
    "cpu-smollm2",
    recipe="scenes-cpu-smollm2",
    budgets=(37,),
    data=("openmoji-scenes-small:test", "openmoji-scenes-small:novel"),
    search=Search("openmoji-scenes-small:validation", factors=(0.1, 0.3, 1.0), fraction=0.2, limit=128),
    limit=900,
    scaling_budget=37,
    sizes=ON_TWO_CORES,
    probe="scenes-cpu-words",
    fetch=("dinov2-s14", "smollm2-135m", "openmoji", "photographs"),
    note="SmolLM2-135M-Instruct answers. A small probe trained every row's connector first, by the language "
    "model's embeddings of nouns and words, so that tokens are read as words from the first step on "
    "(`docs/reproduce.md`). Stacks, abstractors and the Q-Former have one or two layers in place of six or "
    "more, `token_packer` the feature layer alone.",
)
SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "cpu",
            recipe="scenes-cpu",
            budgets=(37,),  # 36 is 6 x 6 of the 12 x 12 patches, so that pools are even; and [CLS]
            data=("openmoji-scenes-small:test", "openmoji-scenes-small:novel"),
            search=Search("openmoji-scenes-small:validation", fraction=0.2),
            scaling_budget=37,
            sizes=ON_TWO_CORES,
            fetch=("dinov2-s14", "openmoji", "photographs"),
            note="No language model: a small probe is given the tokens, and rules turn its predictions into answers "
            "(`docs/reproduce.md`). This shows what the tokens still hold, not how a model would answer. The probe "
            "does not mix tokens, which favours connectors that do; `mlp` over all tokens is no ceiling. Stacks, "
            "abstractors and the Q-Former have one or two layers in place of six or more, `token_packer` the feature "
            "layer alone. A printed number counts as wrong: the probe names words only.",
        ),
        Scale(
            "cpu-hard",
            recipe="scenes-cpu-hard",
            budgets=(17, 37),  # 6 and 14 % of 257; 16 is 4 x 4 of the 16 x 16 patches, 36 an uneven 6 x 6
            data=("openmoji-scenes-hard:test", "openmoji-scenes-hard:novel"),
            search=Search("openmoji-scenes-hard:validation", factors=(0.1, 0.3, 1.0, 3.0), fraction=0.2),
            seeds=5,
            scaling_budget=37,
            sizes=ON_TWO_CORES,
            fetch=("dinov2-s14", "openmoji", "photographs"),
            note="As the scale `cpu`, on harder scenes (`docs/scenes.md`), at 224 pixels, and with a probe that starts "
            "from the same weights in every row of a seed, so that rows can be compared seed by seed.",
        ),
        SMOLLM2,
        replace(
            SMOLLM2,
            name="cpu-smollm2-hard",
            recipe="scenes-cpu-smollm2-hard",
            budgets=(17,),
            data=("openmoji-scenes-hard:test", "openmoji-scenes-hard:novel"),
            search=replace(SMOLLM2.search, data="openmoji-scenes-hard:validation"),
            scaling_budget=17,
            probe="scenes-cpu-words-hard",
            note="As the scale `cpu-smollm2`, on harder scenes (`docs/scenes.md`) at 224 pixels, with 17 of 257 "
            "tokens, after a probe of three times the steps.",
        ),
        Scale(
            "gpu",
            recipe="scenes-gpu",
            budgets=(17, 33, 65, 145),
            data=("openmoji-scenes:test", "openmoji-scenes:novel"),
            search=Search("openmoji-scenes:validation"),
            scaling_budget=65,
            sizes=DINOV2_S,
            fetch=("dinov2-s14", "smollm2-135m", "openmoji", "photographs"),
            needs_accelerator=True,
        ),
    )
}
