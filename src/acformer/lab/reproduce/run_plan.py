"""A plan from beginning to end: what is missing is trained, what there is is shown."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from acformer.errors import AcFormerError, UsageError
from acformer.fetch.embedded import fetch
from acformer.files import write_text
from acformer.hf.build import new_text_config
from acformer.lab.reproduce.execute import Task
from acformer.lab.reproduce.measured import Measured, student_t
from acformer.lab.reproduce.plans import PROBES, Plan, TableRow, chosen_rows
from acformer.lab.reproduce.plot_scores import plot_scores
from acformer.lab.reproduce.records import take_over
from acformer.lab.reproduce.runs import (
    Cell,
    Job,
    Run,
    Timing,
    Trial,
    cells_of,
    job_path,
    job_record,
    refuse_idle_overrides,
)
from acformer.lab.reproduce.schedule import default_jobs, run_tasks
from acformer.lab.reproduce.tables import all_errors, table_text
from acformer.training.arguments import check_arguments
from acformer.training.recipe import Recipe

J = TypeVar("J", Run, Trial, Timing)


def reproduce(
    plan: Plan,
    out: Path = Path("results"),
    work: Path = Path("runs/reproduce"),
    *,
    connectors: Sequence[str] | None = None,
    budgets: Sequence[int] | None = None,
    jobs: int | None = None,
    keep_models: bool = False,
    progress: bool = True,
) -> str:
    """Train and score what is missing of a plan; returns the table.

    Writes `<out>/<table>-<scale>/`: `runs/*.json`, `trials/*.json`, `steps/*.json`, `table.md`, `figure.png`,
    `figure.svg`. What is there already is kept, an equal run of another table is taken over, an interrupted one goes
    on.

    Args:
        plan: from `plan_for`, or your own.
        out: where the tables lie. work: where models lie while they are made, kept there with `keep_models`.
        connectors: train the rows of these alone; the table shows what there is of all.
        budgets: train at these numbers of visual tokens alone.
        jobs: runs side by side; default one a core, one on an accelerator.
        progress: show a bar with the time left.

    Raises:
        UsageError: unknown names, records of another plan, an idle override, no accelerator, or no scipy.
        DataError: a record that cannot be read.
        AcFormerError: some runs failed (after all others were made and the table was written).
    """
    chosen = _chosen(plan, connectors, budgets)
    student_t(1)  # tells of a missing scipy now, not when everything is trained
    if plan.scale.needs_accelerator and not torch.accelerator.is_available():
        raise UsageError(f"scale {plan.scale.name!r} is for a GPU, and there is none here; --scale cpu runs anywhere")
    recipe = plan.scale.load_recipe()  # refuses a missing one before anything is fetched
    if recipe.model.text not in PROBES:
        _refuse_unfit_language_model(recipe)
    if plan.scale.fetch:
        fetch(plan.scale.fetch, progress=progress)
    cells = cells_of(plan)
    refuse_idle_overrides(plan, cells)
    ours = [cell for cell in cells if (cell.row, cell.budget) in chosen]
    results = out / plan.folder
    runs = _missing((run for cell in ours for run in cell.runs), results)
    trials = _missing((trial for run in runs for trial in run.trials), results)
    context = (results, work, keep_models)
    stages = [Task(trial, *context) for trial in trials], [Task(run, *context) for run in runs]
    untimed = _missing((Timing(cell.runs[0]) for cell in ours if cell.runs), results)
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} runs, {elapsed} gone, {remaining} left {postfix}"
    todo: list[Job] = [*trials, *runs, *untimed]
    with tqdm(total=sum(job.cost for job in todo), desc=plan.folder, bar_format=form, disable=not progress) as bar:
        try:
            for tasks in stages:  # a run needs all trials of its learning rate
                run_tasks(tasks, jobs or default_jobs(), bar)
            trained = {cell.runs[0].trials_name for cell in ours if Measured.of(cell, results).records}
            run_tasks([Task(timing, *context) for timing in untimed if timing.name in trained], 1, bar)
        finally:
            text = _write(plan, cells, results)
    _tell_failures([Measured.of(cell, results) for cell in ours], results)
    return text


def _chosen(plan: Plan, connectors: Sequence[str] | None, budgets: Sequence[int] | None) -> list[tuple[TableRow, int]]:
    """The rows, at the budgets, that are to be trained."""
    if unknown := set(budgets or ()) - {*plan.scale.budgets, plan.scale.scaling_budget}:
        raise UsageError(f"scale {plan.scale.name!r} is at T = {[*plan.scale.budgets]}, not {min(unknown)}")
    every = budgets or (*plan.scale.budgets, plan.scale.scaling_budget)
    return [(row, budget) for row in chosen_rows(plan, connectors) for budget in every]


def _refuse_unfit_language_model(recipe: Recipe) -> None:
    """Refuse what is wrong with its training now, not when every row has been trained with a probe."""
    if isinstance(recipe.model.text, dict):
        new_text_config(recipe.model.text)
    for _, spec in recipe.stages():
        check_arguments(spec, recipe.seed)


def _missing(jobs: Iterable[J], results: Path) -> list[J]:
    """Those without a record here or in a table beside this one, each once; the first seeds of all rows first."""
    once = {job.name: job for job in jobs}
    take_over({job_path(results, job): job.fingerprint for job in once.values()}, results.parent)
    missing = [job for job in once.values() if job_record(results, job) is None]
    return sorted(missing, key=lambda job: job.seed)


def _write(plan: Plan, cells: list[Cell], results: Path) -> str:
    """The table and the figure of what there is by now."""
    measured = [Measured.of(cell, results) for cell in cells]
    text = table_text(plan, measured)
    write_text(results / "table.md", text)
    plot_scores(plan, measured, results / "figure")
    return text


def _tell_failures(measured: list[Measured], results: Path) -> None:
    if failures := all_errors(measured):
        where = results / "table.md"
        raise AcFormerError(f"{len(failures)} runs failed, the others are in {where}; first: {failures[0]}")
