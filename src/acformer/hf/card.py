"""The model card, `README.md` in a model's folder: what it is made of, how to use it, what was measured.

The block at its top is what a hub reads. Scores live there alone (`model-index`); their table is written from it. The
manifest does not vouch for the card: whoever publishes a model edits it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import acformer
from acformer.connectors import CONNECTORS, complete_options
from acformer.files import write_text
from acformer.hf.configuration_acformer import AcFormerConfig
from acformer.hf.public_names import public_name
from acformer.hf.publish import CARD

TASK = "image-text-to-text"
ON_A_HUB = {
    "embedded:dinov2-s14": "facebook/dinov2-small",
    "embedded:smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""What the models are on a hub that `acformer fetch` brings."""
NO_SCORES = "Not measured: `acformer eval FOLDER --data ...` adds what it measures."
HERE = "  # this folder; or its name on a hub"
SCORES, LICENCE = "## Scores\n", "## Licence\n"
PAPER = "[Visual Anchors Are Strong Information Aggregators](https://arxiv.org/abs/2405.17815)"


class Training(NamedTuple):
    """How a model was trained: the recipe, and the names of the data of each stage; nobody's paths in them."""

    recipe: Mapping[str, Any]
    data: Mapping[str, str]


def write_card(folder: Path, config: AcFormerConfig, training: Training | None = None, name: str = ".") -> None:
    """The card of a model that nothing was measured of yet, into its folder.

    name: under which its code loads it; by default from the folder that the card is in.
    """
    write_text(folder / CARD, str(model_card(config, training, name)) + "\n")


def model_card(config: AcFormerConfig, training: Training | None = None, name: str = ".") -> ModelCard:
    """See `write_card`."""
    tags = ["acformer", "visual-anchors", "vision-language", config.connector]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        base_model=_base_models(config) or None,
        license="other",
        license_name="not-chosen-yet",
        license_link=f"{CARD}#licence",
        tags=tags,
        datasets=None,
    )
    sections = [_made_of(config), _use(name), _trained(training), f"{SCORES}\n{NO_SCORES}", _licence(config)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def sign(folder: Path, name: str, tags: Sequence[str] = ()) -> None:
    """Let a card's code load the model from a hub under that name, and add tags."""
    if not (folder / CARD).is_file():  # a processor or a config alone
        return
    card = ModelCard((folder / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True)
    card.text = card.text.replace(
        f'model=".", trust_remote_code=True){HERE}', f'model="{name}", trust_remote_code=True)'
    )
    card.text = card.text.replace("acformer ask . ", f"acformer ask {name} ")
    data: Any = card.data
    data.tags = list(dict.fromkeys([*(data.tags or []), *tags])) or None
    write_text(folder / CARD, str(card).rstrip("\n") + "\n")


def with_section(text: str, title: str, body: str) -> str:
    """A card with another text under `## title`, behind the sections that it has where it has none of that name."""
    before, found, rest = text.partition(f"## {title}\n")
    _, following, after = rest.partition("\n## ")
    tail = f"\n\n## {after}" if following else "\n"
    return f"{before if found else before.rstrip() + 2 * chr(10)}## {title}\n\n{body}{tail}"


def add_score(folder: Path, result: EvalResult) -> None:
    """Put a score into the card of a model's folder, in place of an older one of the same questions and tokens.

    Nothing happens where there is no card of ours, or the folder cannot be written.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if SCORES not in text or LICENCE not in text:
        return
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    kept = [one for one in data.eval_results or [] if _what(one) != _what(result)]
    data.model_name = data.model_name or "acformer"
    data.eval_results = [*kept, result]
    before, _, rest = card.text.partition(SCORES)
    card.text = f"{before}{SCORES}\n{_table(data.eval_results)}\n\n{LICENCE}{rest.partition(LICENCE)[2]}"
    try:
        write_text(path, str(card).rstrip("\n") + "\n")
    except PermissionError:
        return


def _what(result: EvalResult) -> tuple:
    details = result.metric_args or {}
    return result.dataset_name, result.metric_type, details.get("num_questions"), details.get("num_visual_tokens")


def _base_models(config: AcFormerConfig) -> list[str]:
    names = [public_name(part.name_or_path) for part in (config.vision_config, config.text_config)]
    names = [ON_A_HUB.get(name, name.removeprefix("timm:").removeprefix("hf-hub:")) for name in names]
    return [name for name in names if name.count("/") == 1 and ":" not in name and "@" not in name]


def _made_of(config: AcFormerConfig) -> str:
    vision, text, geometry = config.vision_config, config.text_config, config.geometry
    connector = config.build_connector()
    options = complete_options(config.connector, config.connector_kwargs)
    shown = ", ".join(f"`{key}={value!r}`" for key, value in options.items()) or "no options"
    idea = (CONNECTORS[config.connector].__doc__ or "").partition("\n")[0]
    tokens = f"{connector.num_tokens} of {config.num_vision_tokens}"
    others = "; any other number of tokens, if asked for" if connector.elastic else ""
    h, w = connector.input_grid
    rows = [
        ("image", f"{config.image_size} x {config.image_size} pixels, {h} x {w} patches"),
        (
            "image encoder",
            f"{_name(vision)}, {vision.num_hidden_layers} blocks of width {vision.hidden_size}, read at hidden layer "
            f"{config.feature_layer}",
        ),
        ("connector", f"`{config.connector}`: {idea} Options: {shown}{others}"),
        ("visual tokens", f"**{tokens}** an image, of width {geometry.text_hidden_size}"),
        ("fusion", f"`{config.fusion}`"),
        ("language model", f"{_name(text)}, {text.num_hidden_layers} layers of width {text.hidden_size}"),
    ]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    return (
        f"# AcFormer: {tokens} visual tokens\n\nA multimodal language model, made with acformer "
        f"{acformer.__version__} after {PAPER}: it reads a few visual tokens of an image in place of all patches.\n\n"
        f"| | |\n|---|---|\n{table}"
    )


def _name(config: Any) -> str:
    name = public_name(config.name_or_path)
    return f"`{ON_A_HUB.get(name, name)}` ({config.model_type})" if name else f"of type `{config.model_type}`"


def _use(name: str) -> str:
    return f"""## Use it

`pip install acformer`, then

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="{name}", trust_remote_code=True){HERE if name == "." else ""}
question = [{{"type": "image", "image": "photo.jpg"}}, {{"type": "text", "text": "What is this?"}}]
said = ask(text=[{{"role": "user", "content": question}}], max_new_tokens=16, return_full_text=False)
print(said[0]["generated_text"])
```

or, from a shell, `acformer ask {name} photo.jpg "What is this?"`. Pixels and prompts are made by the
processor beside the weights; it refuses URLs."""


def _trained(training: Training | None) -> str:
    if training is None:
        return "## Training\n\nNot recorded."
    data = "\n".join(f"- {stage}: `{name}`" for stage, name in training.data.items())
    recipe = yaml.safe_dump(dict(training.recipe), sort_keys=False, allow_unicode=True, width=100)
    return (
        f"## Training\n\n{data}\n\nThe recipe, for `acformer train`, with transformers {transformers.__version__}; of "
        f"paths the last part is left:\n\n```yaml\n{recipe}```"
    )


def _table(results: Sequence[EvalResult]) -> str:
    lines = [
        "| questions | measure | score | 95 % interval | without looking | visual tokens |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        details = result.metric_args or {}
        low, high = details.get("interval") or (None, None)
        cells = [
            f"{result.dataset_name} ({details.get('num_questions', '?')})",
            str(result.metric_type),
            _percent(result.metric_value, details),
            f"{_percent(low, details)} to {_percent(high, details)}" if low is not None else "not known",
            _percent(details["blind"], details) if details.get("blind") is not None else "not known",
            str(details.get("num_visual_tokens", "?")),
        ]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _percent(value: Any, details: Mapping[str, Any]) -> str:
    return f"{100 * value:.1f} %" if details.get("is_share") else f"{value:.1f}"


def _licence(config: AcFormerConfig) -> str:
    parts = " and ".join(filter(None, (_name(part) for part in (config.vision_config, config.text_config))))
    return (
        f"{LICENCE}\nIts parts, {parts}, have licences of their own, which hold for it too. Whoever publishes it "
        "chooses its licence, in the block at the top."
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
