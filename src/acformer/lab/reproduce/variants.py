"""A recipe changed in one respect: another learning rate of the connector, fewer steps, fewer samples."""

from collections.abc import Callable
from dataclasses import replace

from acformer.data.datasets import load_samples
from acformer.data.skip_log import SkipLog
from acformer.training.recipe import Recipe, StageSpec


def with_fraction(recipe: Recipe, fraction: float) -> Recipe:
    """The first so much of every stage's samples, with as many steps as before."""
    if fraction == 1:
        return recipe

    def fewer(spec: StageSpec) -> StageSpec:
        skipped = SkipLog(max_bad_fraction=spec.max_bad_fraction)
        samples = load_samples(spec.data, image_root=spec.image_root, skipped=skipped, limit=spec.max_samples)
        training = dict(spec.training)
        if training.get("max_steps", -1) < 0:
            training["num_train_epochs"] = training.get("num_train_epochs", 3.0) / fraction
        return replace(spec, max_samples=max(1, round(len(samples) * fraction)), training=training)

    return _stages_changed(recipe, fewer)


def with_factor(recipe: Recipe, factor: float) -> Recipe:
    """The connector's learning rate times `factor`, in every stage that trains it."""

    def scaled(spec: StageSpec) -> StageSpec:
        rates = {name: rate * (factor if name == "connector" else 1) for name, rate in spec.learning_rates.items()}
        return replace(spec, learning_rates=rates)

    return _stages_changed(recipe, scaled)


def shortened(recipe: Recipe, fraction: float) -> Recipe:
    """So much of every stage's steps, the schedule with them."""

    def shorter(spec: StageSpec) -> StageSpec:
        training = dict(spec.training)
        if training.get("max_steps", -1) > 0:
            training["max_steps"] = max(1, round(training["max_steps"] * fraction))
        else:
            training["num_train_epochs"] = training.get("num_train_epochs", 3.0) * fraction
        return replace(spec, training=training)

    return _stages_changed(recipe, shorter)


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """So many steps in every stage."""
    return _stages_changed(recipe, lambda spec: replace(spec, training={**spec.training, "max_steps": steps}))


def _stages_changed(recipe: Recipe, change: Callable[[StageSpec], StageSpec]) -> Recipe:
    pretrain, finetune = (spec and change(spec) for spec in (recipe.pretrain, recipe.finetune))
    return replace(recipe, pretrain=pretrain, finetune=finetune)
