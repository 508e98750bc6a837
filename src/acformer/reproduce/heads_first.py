"""A connector taught by small heads before a language model reads its tokens: a curriculum for small machines.

A language model from nothing does not find out in what two cores allow that image tokens tell it anything; heads do,
in minutes. What they leave behind is a connector whose tokens name things; the language model starts there.
"""

from dataclasses import replace
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, set_seed

from acformer.build import build_model
from acformer.download import whole_folder
from acformer.embedded import resolve
from acformer.recipe import ModelSpec, Recipe, load_recipe
from acformer.reproduce.reading import train_reader
from acformer.reproduce.runs import Run
from acformer.reproduce.variants import with_factor, with_fraction
from acformer.train import recipe_texts


def heads_recipe(run: Run) -> Recipe:
    """The heads' training, of the connector, the encoder and the seed of the run."""
    if run.scale.heads is None:
        raise ValueError(f"scale {run.scale.name!r} has no heads")
    heads = load_recipe(run.scale.heads)
    return replace(heads, model=replace(run.recipe.model, text=heads.model.text), seed=run.seed)


def after_heads(recipe: Recipe, run: Run, factor: float) -> Recipe:
    """The recipe going on from a new model whose connector the heads have taught, `factor` times their rate for it.

    The model lies in the recipe's folder and is made once.
    """
    folder = recipe.output / "heads" / "model"
    if not folder.exists():
        teach(recipe, with_factor(with_fraction(heads_recipe(run), run.fraction), factor), folder)
    return replace(recipe, from_model=str(folder))


def text_width(spec: ModelSpec) -> int:
    """E: that of the language model, for which the heads' tokens are meant."""
    if isinstance(spec.text, dict):
        return CONFIG_MAPPING[spec.text.get("model_type", "llama")](**spec.text).hidden_size
    return AutoConfig.from_pretrained(resolve(spec.text)).get_text_config().hidden_size


def teach(recipe: Recipe, heads: Recipe, out: Path) -> None:
    """Save the recipe's model, untrained but for the connector."""
    set_seed(recipe.seed)
    model, processor = build_model(recipe.model, recipe_texts(recipe))
    learner = train_reader(heads, text_width(recipe.model)).learner
    model.model.connector.load_state_dict(learner.connector.state_dict())
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
