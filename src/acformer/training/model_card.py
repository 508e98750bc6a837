"""The card of a trained model: the recipe up to its stage and the names of the data, without anybody's folders."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from acformer.hf import AcFormerConfig
from acformer.hf.card import Training, write_card
from acformer.hf.public_names import public_name, without_paths
from acformer.training.recipe import STAGES, Recipe

OF_A_PLACE = ("output_dir", "resume", "stage", "image_root", "run_name", "project")
"""Keys of a recipe that say where a run lies or how it is called, not what it does."""


def write_training_card(folder: Path, config: AcFormerConfig, recipe: Recipe, stage: str) -> None:
    """The card of the model that `stage` has left in `folder`."""
    values = public_recipe(recipe, STAGES[: STAGES.index(stage) + 1])
    data = {name: str(values[name]["data"]) for name in STAGES if name in values}
    write_card(folder, config, Training(values, data))


def public_recipe(recipe: Recipe, stages: tuple[str, ...]) -> dict[str, Any]:
    """The recipe as a mapping without anybody's folders; what is not given, and other stages, are left out."""
    values = without_paths(_given({**asdict(recipe), "model": {}}))
    for stage in set(STAGES) - set(stages):
        values.pop(stage, None)
    model = {**asdict(recipe.model), "vision": public_name(recipe.model.vision) or "a local model"}
    if isinstance(recipe.model.text, str):
        model["text"] = public_name(recipe.model.text) or "a local model"
    if recipe.from_model is not None:
        values["from_model"] = public_name(recipe.from_model) or "a local model"
    return {"name": values.pop("name"), "model": without_paths(_given(model)), **values}


def _given(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    kept = {key: _given(one) for key, one in values.items() if key not in OF_A_PLACE}
    return {key: one for key, one in kept.items() if one is not None and one != {}}
