"""`acformer plan`: what a recipe will need, before anything is downloaded or trained."""

import argparse
import json
from typing import Any

from acformer.commands.arguments import positive

GIB = 2**30


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("plan", parents=[common], help="tell what a recipe will need: memory, FLOP, hours")
    sub.add_argument("recipe", help="a name (tiny, smol, ...) or a YAML file")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. stage=finetune model.connector=mlp")
    sub.add_argument("--gpus", type=positive, default=1, help="processes, one a GPU")
    sub.add_argument("--memory", type=float, default=80.0, metavar="GIB", help="of one GPU")
    sub.add_argument("--tflops", type=float, default=312.0, help="of one GPU at best (default: A100 in bf16)")
    sub.add_argument("--mfu", type=float, default=0.4, help="the share of it that training gets")
    sub.add_argument("--sharding", metavar="HOW", help="ddp, zero2, zero3, fsdp (default: the recipe's own)")
    sub.add_argument("--text", type=positive, metavar="TOKENS", help="of a sample's text (default: from the data)")
    sub.add_argument("--longest", type=positive, metavar="TOKENS", help="of the longest text")
    sub.add_argument("--packing", action="store_true", help="rows of max_length tokens, several samples in each")
    sub.add_argument("--json", action="store_true", help="print all of it as JSON")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """A table, a column a stage."""
    from acformer.training.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)  # before torch: a typo should not take seconds
    from dataclasses import asdict

    from acformer.training.plan import Hardware, Texts, plan

    given = arguments.gpus, arguments.memory, arguments.tflops, arguments.mfu, arguments.sharding
    made = plan(recipe, Hardware(*given), Texts(arguments.text, arguments.longest, arguments.packing))
    if arguments.json:
        return json.dumps({**asdict(made), "fits": made.fits}, indent=1)
    return table(made)


def table(plan: Any) -> str:
    """The plan for people."""
    hardware = plan.hardware
    count = f"{hardware.gpus} GPU{'s' if hardware.gpus > 1 else ''} of {hardware.memory:g} GiB"
    head = [
        f"{plan.recipe}: {_amount(sum(plan.parameters.values()))} parameters ({_modules(plan.parameters)})",
        f"{count}, {hardware.tflops:g} TFLOP/s at best, of which training gets {hardware.mfu:g} (assumed); "
        "memory is that of one GPU",
    ]
    columns = [_column(stage, plan) for stage in plan.stages]
    names = [name for name in columns[0] if any(column[name] for column in columns)]
    first = max(map(len, names))
    widths = [max(len(column[name]) for name in names) for column in columns]
    rows = (
        [name.ljust(first), *(column[name].ljust(width) for column, width in zip(columns, widths, strict=True))]
        for name in names
    )
    return "\n".join([*head, "", *("  ".join(row).rstrip() for row in rows)])


def _column(stage: Any, plan: Any) -> dict[str, str]:
    """One stage's cells; empty where there is nothing to tell."""
    return {
        "stage": stage.stage,
        "learns": _modules(stage.trained),
        "frozen": _modules(stage.frozen),
        "sharding": stage.sharding,
        "rows x passes x GPUs": f"{stage.rows} x {stage.accumulation} x {plan.hardware.gpus}",
        "tokens a row": f"{stage.visual_tokens} visual + {stage.text.mean} of text",
        "text lengths": stage.text.source,
        "tokens a step": f"{stage.tokens_a_step:,} of {stage.samples_a_step:,} samples",
        "longest row": f"{stage.longest_row:,} tokens",
        "weights": _gib(stage.weights),
        "gathered, buckets": _gib(stage.working),
        "gradients": _gib(stage.gradients),
        "optimizer": _gib(stage.optimizer),
        "activations": f"{_gib(stage.activations)}, of it logits {_gib(stage.logits)}",
        "reserve": f"{plan.reserve:.2f} GiB (a guess)",
        "all": f"{stage.total / GIB + plan.reserve:.2f} GiB",
        "fits": _fits(stage, plan),
        "FLOP a step": f"{stage.flops_a_step:.4g}",
        "steps": "not known: give max_samples" if stage.steps is None else f"{stage.steps:,}",
        "time": "" if stage.hours is None else _span(stage.hours),
        "cached features": _features(stage),
    }


def _fits(stage: Any, plan: Any) -> str:
    """Yes, or what would."""
    if stage.fits:
        return "yes"
    room = plan.hardware.memory - plan.reserve
    others = {name: total for name, total in stage.other_shardings.items() if total / GIB <= room}
    able = ", ".join(f"{name} does ({total / GIB + plan.reserve:.1f} GiB)" for name, total in others.items())
    return f"no; {able}" if able else "no; take fewer rows with more passes, lora, quantize or more GPUs"


def _features(stage: Any) -> str:
    if stage.features_bytes is None:
        return ""
    return f"{_gib(stage.features_bytes)} on disk, made in {_span(stage.encoding_hours)}"


def _span(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 60 else "less than a minute"


def _modules(counts: dict[str, int]) -> str:
    return ", ".join(f"{module} {_amount(count)}" for module, count in counts.items())


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes else "0"
