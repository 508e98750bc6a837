"""A connector pretrained with a probe before a language model reads its tokens: a curriculum for small machines.

A language model from nothing does not find out in what two cores allow that image tokens tell it anything; a probe
does, in minutes. What it leaves behind is a connector whose tokens name things; the language model starts there.
"""

from dataclasses import asdict, replace
from pathlib import Path

from transformers import set_seed

from acformer.fetch.embedded import resolve
from acformer.files import whole_folder
from acformer.hf.build import build_model, new_text_config
from acformer.lab.reproduce.plans import table_recipe
from acformer.lab.reproduce.runs import Run
from acformer.lab.reproduce.train_probe import train_probe
from acformer.training.recipe import ModelSpec, Recipe
from acformer.training.stages import recipe_texts
from acformer.untrusted import load_config


def probe_recipe(run: Run) -> Recipe:
    """The probe's training with the connector, the encoder and the seed of the run; its data and steps are its own."""
    if run.scale.probe is None:
        raise ValueError(f"scale {run.scale.name!r} has no probe")
    probe = table_recipe(run.scale.probe)
    return replace(probe, model=replace(run.recipe.model, text=probe.model.text), seed=run.seed)


def pretrained_by_probe(recipe: Recipe, probe: Recipe, folder: Path) -> Recipe:
    """The recipe going on from a model in `folder`, new but for the connector, which was trained with a probe.

    It is made unless it is there already: the name of the folder must tell one training of the probe from another.
    """
    if not folder.exists():
        set_seed(recipe.seed)
        model, processor = build_model(**asdict(recipe.model), texts=recipe_texts(recipe))
        connector = train_probe(probe, text_width(recipe.model)).probed.connector
        model.model.connector.load_state_dict(connector.state_dict())
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as made:
            model.save_pretrained(made)
            processor.save_pretrained(made)
    return replace(recipe, from_model=str(folder))


def text_width(spec: ModelSpec) -> int:
    """The width of the embeddings of the language model, which is that of the tokens it reads.

    Errors: `UsageError` for options that do not describe a new language model.
    """
    if isinstance(spec.text, dict):
        return new_text_config(spec.text).hidden_size
    return load_config(resolve(spec.text)).get_text_config().hidden_size
