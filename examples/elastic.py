"""One checkpoint for any number of tokens beside one for each: `acformer_v2` on harder scenes, read by a probe.

    acformer fetch dinov2-s14 openmoji photographs
    python examples/elastic.py                       # results/elastic/runs, a file a training; then table.md
    python examples/elastic.py --seeds 3             # goes on with what is not there yet

The recipe is that of `acformer reproduce successor finetune.max_samples=16000 --scale cpu-hard` with the learning rate
that `acformer` found there. The elastic run draws T anew at every step, from the fewest to the most of `--tokens`.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from acformer.connectors import budget_options, complete_options
from acformer.evaluate.report import score_replies
from acformer.files import write_text
from acformer.lab.markdown import markdown_table
from acformer.lab.reproduce.execute import with_all_options
from acformer.lab.reproduce.pairs import Difference
from acformer.lab.reproduce.plans import SCALES, table_recipe
from acformer.lab.reproduce.runs import geometry_of
from acformer.lab.reproduce.train_probe import ProbedConnector, probe_replies, train_probe
from acformer.lab.reproduce.variants import with_factor
from acformer.provenance import machine
from acformer.training.recipe import Recipe

CONNECTOR, OPTIONS, RATE = "acformer_v2", {"talk": True}, 0.3  # with talk, as results/elastic was made
SCALE = SCALES["cpu-hard"]
DATA = {"test": SCALE.data[0], "held-out pairs": SCALE.data[1]}


def recipe_for(seed: int, tokens: int, elastic: list[int] | None) -> Recipe:
    """Trained for `tokens`, or at every number of the range `elastic`."""
    recipe = table_recipe(SCALE.recipe, ("finetune.max_samples=16000",))
    own = {**recipe.model.connector_kwargs, **OPTIONS, **budget_options(CONNECTOR, geometry_of(recipe.model), tokens)}
    model = replace(recipe.model, connector=CONNECTOR, connector_kwargs=own)
    assert recipe.finetune is not None
    recipe = replace(recipe, model=model, seed=seed, finetune=replace(recipe.finetune, elastic=elastic))
    return with_factor(recipe, RATE)


def scores(probed: ProbedConnector, tokens: int) -> dict[str, float]:
    """The mean of the families of each split."""
    asked = replace(probed, num_tokens=tokens)
    return {split: score_replies(data, probe_replies(asked, data))["average"]["score"] for split, data in DATA.items()}


def record(path: Path, recipe: Recipe, asked: list[int]) -> dict[str, Any]:
    """Of one training; it is done if the file is not there. `SystemExit` where that is of another recipe."""
    asked_for = json.loads(json.dumps(asdict(with_all_options(recipe)), default=str))
    if not path.exists():
        trained = train_probe(recipe)
        found = {
            "scores": {str(tokens): scores(trained.probed, tokens) for tokens in asked},
            "loss_curve": trained.curve(),
            "recipe": asked_for,
            **machine(),
        }
        write_text(path, json.dumps(found, indent=1) + "\n")
    found = json.loads(path.read_text())
    model = found["recipe"]["model"]  # which may name options that are gone
    model["connector_kwargs"] = complete_options(CONNECTOR, model["connector_kwargs"])
    if any(found["recipe"][key] != asked_for[key] for key in ("model", "finetune", "seed")):
        raise SystemExit(f"{path} was made by another recipe: remove it, or take another --out")
    return found


def main() -> None:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[9, 17, 33, 65])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/elastic"))
    given = parser.parse_args()
    tokens, runs = sorted(given.tokens), given.out / "runs"
    span = [tokens[0], tokens[-1]]
    elastic, dedicated = [], []
    for seed in range(given.seeds):
        name = f"elastic-{'-'.join(map(str, tokens))}-seed{seed}.json"
        elastic.append(record(runs / name, recipe_for(seed, span[1], span), tokens)["scores"])
        dedicated.append({})
        for number in tokens:
            path = runs / f"T{number}-seed{seed}.json"
            dedicated[-1] |= record(path, recipe_for(seed, number, None), [number])["scores"]
    write_text(given.out / "table.md", table(tokens, elastic, dedicated))


def table(tokens: list[int], elastic: list[dict[str, Any]], dedicated: list[dict[str, Any]]) -> str:
    """A line for each number of tokens: both in percent, and the paired difference in points."""
    lines = []
    for number in map(str, tokens):
        line = [number]
        for split in DATA:
            ours, theirs = ([seed[number][split] for seed in rows] for rows in (elastic, dedicated))
            pairs = [one - other for one, other in zip(ours, theirs, strict=True)]
            line += [f"{100 * sum(row) / len(row):.1f}" for row in (ours, theirs)] + [str(Difference.of(pairs))]
        lines.append(line)
    head = ["T"] + [f"{split}, {what}" for split in DATA for what in ("one checkpoint", "its own", "difference")]
    given = ", ".join(f"`{key}={value}`" for key, value in OPTIONS.items())
    command = f"python examples/elastic.py --tokens {' '.join(map(str, tokens))} --seeds {len(elastic)}"
    return (
        f"# `{CONNECTOR}` with {given}: one checkpoint for every T, and one trained for each\n\n"
        f"Made by `{command}`; mean of the families in percent, a probe reads the tokens of `openmoji-scenes-hard`; "
        "differences of the same seeds, with 95 % intervals where there are several.\n\n"
        f"{markdown_table(head, lines)}\n"
    )


if __name__ == "__main__":
    main()
