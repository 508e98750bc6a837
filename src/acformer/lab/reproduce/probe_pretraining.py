"""A connector pretrained with a probe before a language model reads its tokens: a curriculum for small machines.

A language model from nothing does not find out in what two cores allow that image tokens tell it anything; a probe
does, in minutes. What it leaves behind is a connector whose tokens name things; the language model starts there.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import set_seed

from acformer.data.entries import data_title
from acformer.errors import UsageError
from acformer.fetch.embedded import resolve
from acformer.files import whole_folder
from acformer.hf.build import build_model, new_text_config, pretrained_text
from acformer.lab.reproduce.plans import WORD_PROBE, table_recipe
from acformer.lab.reproduce.runs import Run
from acformer.lab.reproduce.train_probe import train_probe
from acformer.lab.scenes.difficulty import DIFFICULTIES
from acformer.lab.scenes.targets import class_names
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
        connector = train_probe(probe, text_width(recipe.model), probe_words(probe, recipe.model)).probed.connector
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


def probe_words(probe: Recipe, spec: ModelSpec) -> Tensor | None:
    """(V, E): the language model's embedding of each class of the probe, of several tokens their mean.

    None for a probe without them. `UsageError` where the language model is new, and so knows no words.
    """
    if probe.model.text != WORD_PROBE or probe.finetune is None:
        return None
    if not isinstance(spec.text, str):
        raise UsageError(f"model.text {WORD_PROBE} needs the words of a pre-trained language model, by its name")
    tokenizer, language_model = pretrained_text(resolve(spec.text), torch.float32)
    embeddings = language_model.get_input_embeddings().weight.detach()
    names = class_names(DIFFICULTIES[data_title(probe.finetune.data).partition(":")[0]])
    tokens = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names]  # as within a sentence
    return torch.stack([embeddings[ids].mean(0) for ids in tokens])
