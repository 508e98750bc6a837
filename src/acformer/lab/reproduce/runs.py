"""From a plan to its runs: each a recipe with one connector, one seed, one share of the samples.

A run knows itself by a fingerprint of all that decides its scores: adding a row to a plan changes no other run.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from acformer.connectors import CONNECTORS, Geometry, budget_options, build_connector, connector_options
from acformer.connectors.resampler import Resampler
from acformer.errors import AcFormerError, UsageError
from acformer.hf.build import parse_dtype
from acformer.lab.reproduce.plans import MIXING_PROBE, Plan, Scale, TableRow, table_recipe
from acformer.lab.reproduce.records import made_record, read_record
from acformer.lab.scenes.difficulty import VERSION
from acformer.lab.scenes.probe import MIXING_VERSION, PROBE_VERSION
from acformer.training.recipe import STAGES, ModelSpec, Recipe
from acformer.vision.families import image_size, num_prefix_tokens, patch_grid
from acformer.vision.load import load_tower


@dataclass(frozen=True)
class Run:
    """One training and what is measured of it.

    recipe: but for what is found when it runs: the learning rate, the number of samples that is a `fraction` of all.
    start: fingerprint of the probe's recipe, where the connector is trained with a probe first. searched: the run of
    another row whose trials choose this one's learning rate too.
    """

    row: str
    num_tokens: int
    seed: int
    fraction: float
    recipe: Recipe
    scale: Scale
    start: str = ""
    searched: "Run | None" = None

    folder = "runs"
    cost = 1.0

    @property
    def name(self) -> str:
        """`acformer-T33-seed0`, or `acformer-T33-0.25-seed0` with a quarter of the samples."""
        return f"{self.trials_name}{'' if self.fraction == 1 else f'-{self.fraction:g}'}-seed{self.seed}"

    @property
    def trials_name(self) -> str:
        """`acformer-T33`: its learning rate is looked for once for all seeds and shares of the samples."""
        return f"{self.row}-T{self.num_tokens}"

    @property
    def fingerprint(self) -> str:
        """Two runs of one fingerprint give the same scores, but for the noise of the machine."""
        evaluation = {"data": self.scale.data, "limit": self.scale.limit, "search": asdict(self.scale.search)}
        training = {"recipe": as_recorded(self.recipe), "fraction": self.fraction, "start": self.start}
        borrowed = {"rate_of": [trial.fingerprint for trial in self.trials]} if self.searched else {}
        return fingerprint({**training, **evaluation, **what_decides(self.recipe), **borrowed})

    def with_seed(self, seed: int) -> "Run":
        """The same with another seed."""
        return replace(self, seed=seed, recipe=replace(self.recipe, seed=seed))

    @property
    def trials(self) -> tuple["Trial", ...]:
        """The trials of its learning rate; none where there is no choice."""
        factors = self.scale.search.factors
        return tuple(Trial(self.searched or self, factor) for factor in factors) if len(factors) > 1 else ()


@dataclass(frozen=True)
class Trial:
    """A short run with all samples and `factor` times the learning rate: one for all seeds and shares of a row."""

    run: Run
    factor: float

    folder = "trials"

    @property
    def seed(self) -> int:
        """Of its training."""
        return self.run.scale.search.seed

    @property
    def cost(self) -> float:
        """In runs."""
        return self.run.scale.search.fraction

    @property
    def name(self) -> str:
        """`acformer-T33-x0.3`."""
        return f"{self.run.trials_name}-x{self.factor:g}"

    @property
    def fingerprint(self) -> str:
        """The same for every seed and share of the samples."""
        recipe, search = replace(self.run.recipe, seed=0), asdict(self.run.scale.search)
        if self.run.start:  # what comes after the probe does not change this one
            recipe = replace(recipe, pretrain=None, finetune=None)
        del search["factors"]  # what else is tried does not change this one
        tried = {"recipe": as_recorded(recipe), "factor": self.factor, "search": search, "start": self.run.start}
        return fingerprint({**tried, **what_decides(self.run.recipe)})


@dataclass(frozen=True)
class Timing:
    """A few steps with nothing beside them: the time of one, the same for all seeds and shares of a row."""

    run: Run

    folder = "steps"
    seed = 0
    cost = 0.02

    @property
    def name(self) -> str:
        """`acformer-T33`."""
        return self.run.trials_name

    @property
    def fingerprint(self) -> str:
        """Of what a step computes; data of evaluation and search have no part in it."""
        recipe = as_recorded(replace(self.run.recipe, seed=0))
        timed = {"measures": "step", "recipe": recipe, "start": self.run.start}
        return fingerprint({**timed, **what_decides(self.run.recipe)})


Job = Run | Trial | Timing


def job_path(results: Path, job: Job) -> Path:
    """Where the record of a job lies in the folder of a table."""
    return results / job.folder / f"{job.name}.json"


def job_record(results: Path, job: Job) -> dict[str, Any] | None:
    """What was measured of it, if it was; errors as `made_record`."""
    return made_record(job_path(results, job), job.fingerprint)


@dataclass(frozen=True)
class Cell:
    """A row at a budget with a share of the samples: its runs, one a seed, or why it cannot be run."""

    row: TableRow
    budget: int
    fraction: float
    runs: tuple[Run, ...] = ()
    error: str = ""


def records_of(cell: Cell, results: Path) -> list[dict[str, Any]]:
    """What was measured of a cell in every seed that there is, asked for now or not.

    `UsageError` where another plan made a seed of this one; such a record of a further seed is not of this cell.
    """
    found = {run.seed: job_record(results, run) for run in cell.runs}
    for run in cell.runs[:1]:
        stem = run.name.removesuffix(str(run.seed))
        for path in (results / run.folder).glob("*.json"):
            ending = path.stem.removeprefix(stem)
            if ending.isdecimal() and int(ending) not in found:
                further, record = run.with_seed(int(ending)), read_record(path)
                found[further.seed] = record if record.get("fingerprint") == further.fingerprint else None
    return [record for _, record in sorted(found.items()) if record]


def fingerprint(value: Any) -> str:
    """Twelve hex digits for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


FORMER_NAMES = {"direct": "top_p", "hidden_layers": "levels"}
"""Connectors and options that had another name when the first records were made."""
NEW_FIELDS = {
    "lora": None,
    "quantize": None,
    "packing": False,
    "save": "model",
    "connector_weights": None,
    "compile_layers": False,
}
"""Of a stage or the model, which recipes did not have then: with these values the run is the same."""
NOT_RECORDED = {"random_pr": {"selector", "stochastic_anchors"}, "acformer_v2": {"near", "block"}}
"""Options that it did not have then: it was no alias; these parts were off by default when they came."""


def as_recorded(recipe: Recipe) -> dict[str, Any]:
    """The recipe in the names that its records were made with: the same run has the same fingerprint still."""
    spelled = asdict(recipe)
    model = spelled["model"]
    for section in (model, *(spelled[stage] or {} for stage in STAGES)):
        for key in NEW_FIELDS.keys() & section.keys():
            if section[key] == NEW_FIELDS[key]:
                del section[key]
    model["connector"] = FORMER_NAMES.get(model["connector"], model["connector"])
    former, options = CONNECTORS[recipe.model.connector].former_defaults, model["connector_kwargs"]
    known = connector_options(recipe.model.connector)
    options = {**{key: known[key] for key in former}, **options}  # a record names what was no default then
    options = {key: value for key, value in options.items() if key not in former or former[key] != value}
    model["connector_kwargs"] = {FORMER_NAMES.get(key, key): value for key, value in options.items()}
    return spelled


def what_decides(recipe: Recipe) -> dict[str, Any]:
    """What decides a score and is not in the recipe: the connector's defaults, the versions of scenes and probe."""
    name = recipe.model.connector
    connector = CONNECTORS[name]
    defaults = {**connector_options(name), **connector.removed_options, **connector.former_defaults}
    known = {key: str(value) for key, value in defaults.items() if key not in NOT_RECORDED.get(name, ())}
    options = {FORMER_NAMES.get(key, key): value for key, value in known.items()}
    mixing = {"mixing": MIXING_VERSION} if recipe.model.text == MIXING_PROBE else {}
    return {"defaults": options, "scenes": VERSION, "reader": PROBE_VERSION, **mixing}


def start_fingerprint(scale: Scale) -> str:
    """Of the recipe of the probe that comes first; empty without one."""
    return fingerprint(as_recorded(table_recipe(scale.probe))) if scale.probe else ""


def cells_of(plan: Plan) -> list[Cell]:
    """Every row at every budget, then with every share of the samples; connectors that cannot are kept, with why."""
    base = plan.scale.load_recipe()
    geometry = geometry_of(base.model)
    places = [(budget, 1.0) for budget in plan.scale.budgets]
    places += [(plan.scale.scaling_budget, fraction) for fraction in plan.fractions]
    return [_cell(plan, base, geometry, row, budget, fraction) for budget, fraction in places for row in plan.rows]


def _cell(plan: Plan, base: Recipe, geometry: Geometry, row: TableRow, budget: int, fraction: float) -> Cell:
    try:
        run = _first_run(plan, base, geometry, row, budget, fraction)
        if row.rate_of:
            searched = _first_run(plan, base, geometry, TableRow(row.rate_of, row.rate_of), budget, 1.0)
            run = replace(run, searched=searched)
    except AcFormerError as error:
        return Cell(row, budget, fraction, error=str(error))
    return Cell(row, budget, fraction, tuple(run.with_seed(seed) for seed in range(plan.scale.seeds)))


def _first_run(plan: Plan, base: Recipe, geometry: Geometry, row: TableRow, budget: int, fraction: float) -> Run:
    """Of the first seed."""
    options = row_options(row, base.model, plan.scale.sizes, geometry, budget)
    with torch.device("meta"):
        num_tokens = build_connector(row.connector, geometry, **options).num_tokens
    model = replace(base.model, connector=row.connector, connector_kwargs=options)
    return Run(row.name, num_tokens, 0, fraction, replace(base, model=model), plan.scale, start_fingerprint(plan.scale))


def refuse_idle_overrides(plan: Plan, cells: list[Cell]) -> None:
    """`UsageError` for an override without which all runs are the same: the table would claim what is not so."""
    given = plan.scale.overrides
    for number, override in enumerate(given):
        others = (*given[:number], *given[number + 1 :])
        try:
            without = cells_of(replace(plan, scale=replace(plan.scale, overrides=others)))
        except AcFormerError:  # the others cannot do without it
            continue
        if _what_is_made(without) == _what_is_made(cells):
            raise UsageError(
                f"{override} changes no run of {plan.name}, and the table would say that it does: leave it out. Seeds, "
                "folders and numbers of tokens are the plan's (--seeds, --out, --work; budgets of the scale)"
            )


def _what_is_made(cells: list[Cell]) -> list[tuple[str, list[str]]]:
    return [(cell.error, [run.fingerprint for run in cell.runs]) for cell in cells]


def row_options(
    row: TableRow, model: ModelSpec, sizes: Mapping[str, Mapping[str, Any]], geometry: Geometry, budget: int
) -> dict[str, Any]:
    """A row's connector_kwargs at a budget, without what is default anyway.

    The recipe's own options go to every stack, so that all stacks are of one size; then come the scale's, the row's,
    and those that give `budget` tokens, or the nearest number that the connector can give.
    """
    known = connector_options(row.connector)
    is_stack = issubclass(CONNECTORS[row.connector], Resampler)
    shared = {key: value for key, value in model.connector_kwargs.items() if is_stack and key in known}
    own = {**sizes.get(row.connector, {}), **row.options}
    options = {**shared, **own, **budget_options(row.connector, geometry, budget)}
    return {key: value for key, value in options.items() if key not in known or known[key] != value}


def geometry_of(model: ModelSpec) -> Geometry:
    """The sizes at which tokens are counted; the language model's width does not count, and is left at 64."""
    config = load_tower(model.vision, parse_dtype(model.dtype)).config
    side = model.image_size or image_size(config)
    return Geometry(config.hidden_size, 64, patch_grid(config, side, side), num_prefix_tokens(config))
