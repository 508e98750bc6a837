"""A language model taught once, from which every row starts: what a table compares is then the connectors alone."""

from dataclasses import replace
from pathlib import Path

from transformers import AutoModelForCausalLM

from acformer.checkpoints import load_model
from acformer.download import locked, whole_folder
from acformer.recipe import load_recipe
from acformer.reproduce.plans import Plan
from acformer.reproduce.runs import start_fingerprint
from acformer.train import train


def warm_start(plan: Plan, work: Path, *, progress: bool = True) -> Path | None:
    """The folder of the plan's language model, trained now unless it is there; None for a plan without one."""
    if plan.scale.warm_start is None:
        return None
    folder = work / f"warm-start-{plan.scale.warm_start}-{start_fingerprint(plan)}"
    exported = folder / "language_model"
    with locked(folder.with_suffix(".lock")):
        if not exported.exists():
            recipe = replace(load_recipe(plan.scale.warm_start), output_dir=str(folder))
            export_language_model(train(recipe, progress=progress), exported)
    return exported


def export_language_model(model_folder: Path, out: Path) -> None:
    """The language model of a trained model, with its head and tokenizer, as a folder that `model.text` can name.

    Differs from what `model.text` named before training in the vocabulary, which holds `<image>` already. Errors:
    `CheckpointError` for a folder without a whole model.
    """
    model, processor = load_model(str(model_folder))
    causal = AutoModelForCausalLM.from_config(model.config.text_config, dtype=model.dtype)
    body = {f"model.{name}": value for name, value in model.model.language_model.state_dict().items()}
    head = {f"lm_head.{name}": value for name, value in model.lm_head.state_dict().items()}
    causal.load_state_dict({**body, **head})
    with whole_folder(out) as folder:
        causal.save_pretrained(folder)
        processor.tokenizer.save_pretrained(folder)
