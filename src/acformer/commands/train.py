"""`acformer train`: a recipe."""

import argparse
from typing import Any


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("train", parents=[common], help="train a recipe")
    sub.add_argument("recipe", help="a name (tiny, smol, ...) or a YAML file")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. stage=pretrain model.connector=mlp")
    about = "check everything and show each stage's first batch; train and write nothing"
    sub.add_argument("--dry-run", action="store_true", help=about)
    sub.set_defaults(run=run, resumable=True)


def run(arguments: argparse.Namespace) -> str:
    """The folder of the model, or what a run would begin with."""
    from acformer.training.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)  # before torch: a typo should not take seconds
    if arguments.dry_run:
        from acformer.training.dry_run import dry_run

        return dry_run(recipe)
    from acformer.training.stages import train

    folder = train(recipe, progress=not arguments.quiet)
    from accelerate import PartialState

    PartialState().destroy_process_group()  # gloo's threads would now and then abort a process that just ends
    return str(folder)
