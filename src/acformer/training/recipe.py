"""A run as data: YAML plus `key=value` overrides. What is in a recipe is all there is to a run.

    model:      what is built (encoder, language model, connector)
    pretrain:   stage 1, if the run has one
    finetune:   stage 2, if the run has one
    stage:      all | pretrain | finetune: which of them to run now

A stage's `learning_rates` name the modules that train; whatever is not named is frozen. Everything under `training`
goes to `transformers.TrainingArguments` as it stands, but for what the recipe itself says elsewhere.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from acformer.data.entries import data_entries
from acformer.errors import UsageError, unknown_name
from acformer.training.lora import LoraSpec, check_adapters
from acformer.training.strict_yaml import LIMIT, parse_yaml

STAGES = ("pretrain", "finetune")
SAVES = ("model", "connector")
MODULES = ("vision_tower", "connector", "fusion", "language_model")
RESERVED = {
    "learning_rate": "give {stage}.learning_rates.MODULE, one rate a module",
    "output_dir": "give output_dir, the folder of the whole run",
    "seed": "give seed, that of the whole run",
    "resume_from_checkpoint": "give resume",
    "remove_unused_columns": "it is always false: the collator takes samples whole",
    "logging_nan_inf_filter": "it is always false: a loss that is not finite stops the run",
}
"""Keys of `TrainingArguments` that a recipe's `training` may not set, and what to do instead."""


@dataclass
class ModelSpec:
    """What is built before training.

    vision: `embedded:dinov2-s14`, a hub name or a folder. text: likewise, or a dict that configures a new language
    model (then `tokenizer_vocab` is the size of the byte-level BPE that is trained on the data).
    fusion: `concat` or `gated_cross_attention` (`acformer.hf.fusion`), with its options in fusion_kwargs.
    template: chat template saved with the model: `vicuna_v1`, `bare`, or `tokenizer` for the language model's own.
    connector_weights: a trained connector to start from (`connector.safetensors`, a model's folder, LLaVA's
    `mm_projector.bin`); its options must be these.
    """

    vision: str
    text: str | dict
    connector: str = "acformer"
    connector_kwargs: dict = field(default_factory=dict)
    fusion: str = "concat"
    fusion_kwargs: dict = field(default_factory=dict)
    feature_layer: int = -2
    image_size: int | None = None
    template: str = "vicuna_v1"
    tokenizer_vocab: int = 512
    dtype: str = "float32"
    connector_weights: str | None = None

    def architecture(self) -> dict[str, Any]:
        """What it says of the fields of `AcFormerConfig`, encoder and language model left out."""
        names = ("connector", "connector_kwargs", "fusion", "fusion_kwargs", "feature_layer", "image_size")
        return {name: getattr(self, name) for name in names}


@dataclass
class StageSpec:
    """One stage: its data, which modules learn and how fast, and `TrainingArguments` as they are.

    data: one source or a list of them with weights (`acformer.data.entries`). packing: several samples in a row.
    template: for this stage's data only (`plain` in stage 1); default the model's. max_bad_fraction: of the
    records, above which the run stops. max_length: tokens; a longer sample is cut, never inside an image. group: so
    many records of one image stand together in a batch, and the connector runs once for them. elastic: [low, high],
    every step draws its number of visual tokens from this range (`acformer.training.elastic`). lora: adapters of the
    language model instead of its own weights. quantize: `nf4` or `int8`, its frozen weights in few bits.
    compile_layers: `torch.compile` of each of its layers; on a CPU that needs a C++ compiler. save: `model`, or
    `connector` for its weights alone, with a note where the others are. Adapters are always saved with the connector
    alone.
    """

    data: str | dict | list
    learning_rates: dict
    training: dict = field(default_factory=dict)
    template: str | None = None
    image_root: str | None = None
    max_samples: int | None = None
    max_length: int = 2048
    group: int = 1
    elastic: list | None = None
    packing: bool = False
    lora: LoraSpec | None = None
    quantize: str | None = None
    compile_layers: bool = False
    save: str = "model"
    max_bad_fraction: float = 0.01


@dataclass
class Recipe:
    """A whole run; see the module's docstring. `cache_features`: run the frozen encoder once an image, on disk."""

    name: str
    model: ModelSpec
    pretrain: StageSpec | None = None
    finetune: StageSpec | None = None
    stage: str = "all"
    seed: int = 0
    output_dir: str = "runs/{name}"
    cache_features: bool = False
    resume: bool = True
    from_model: str | None = None
    """A folder with a model to go on from, instead of building one (say, after stage 1 on another machine)."""

    @property
    def output(self) -> Path:
        """Where the run writes; `{name}` in `output_dir` stands for the recipe's name."""
        return Path(self.output_dir.replace("{name}", self.name))

    def stages(self) -> Iterator[tuple[str, StageSpec]]:
        """The stages to run now, in order."""
        for stage in STAGES:
            spec = getattr(self, stage)
            if spec is not None and self.stage in ("all", stage):
                yield stage, spec

    def to_yaml(self) -> str:
        """The recipe with every override in it: saved beside the model, it repeats the run."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _folder().iterdir() if p.name.endswith(".yaml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or path, with `section.key=value` overrides (values are YAML).

    `model.connector=NAME` starts from that connector's own defaults: give its options after it (`model.fusion` too).

    Raises:
        UsageError: no such recipe, key or stage (with the nearest valid name), or a value of the wrong type.
    """
    values = _read(name)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise UsageError(f"override {override!r} is not of the form key=value")
        _assign(values, key.strip().split("."), parse_yaml(value, override))
    recipe = _build(Recipe, values, "")
    _check_recipe(recipe)
    return recipe


def _folder() -> Any:
    return files("acformer.training") / "recipes"


def _read(name: str) -> dict:
    path = Path(name)
    if name.endswith((".yaml", ".yml")) or path.is_file():
        try:
            if (size := path.stat().st_size) > LIMIT:
                raise UsageError(f"{name} has {size:,} bytes: too large for a recipe")
            values = parse_yaml(path.read_text(encoding="utf-8"), name)
        except OSError as error:
            raise UsageError(f"cannot read recipe {name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"cannot read recipe {name}: it is not UTF-8 (byte {error.start})") from error
        if not isinstance(values, dict):
            raise UsageError(f"recipe {name} is not a mapping of keys to values")
        return {"name": path.stem, **values}
    if name not in list_recipes():
        raise unknown_name("recipe", name, list_recipes())
    return {"name": name, **parse_yaml((_folder() / f"{name}.yaml").read_text(encoding="utf-8"), name)}


def _assign(values: dict, keys: list[str], value: Any) -> None:
    *sections, last = keys
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UsageError(f"recipe key {'.'.join(keys)!r}: {section!r} is a value, not a section")
    values[last] = value
    if keys in (["model", "connector"], ["model", "fusion"]):
        values[f"{last}_kwargs"] = {}  # the recipe's options belong to the one that it names


def _build(spec: type, values: Mapping, where: str) -> Any:
    """A dataclass from a mapping, sections recursively; every key must exist and every value fit its type."""
    hints = get_type_hints(spec)
    kwargs = {}
    for key, value in values.items():
        path = f"{where}{key}"
        if key not in hints:
            raise unknown_name("recipe key", path, [f"{where}{name}" for name in hints])
        kwargs[key] = coerce(hints[key], value, path)
    required = [f.name for f in fields(spec) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in kwargs]
    if missing:
        raise UsageError(f"recipe key {where}{missing[0]} is missing")
    return spec(**kwargs)


def coerce(hint: Any, value: Any, path: str) -> Any:
    """The value as its type hint wants it (an int may stand for a float); `UsageError` if it does not fit."""
    kinds = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    allowed = tuple(get_origin(kind) or kind for kind in kinds)
    for kind in allowed:
        if kind in (ModelSpec, StageSpec, LoraSpec) and isinstance(value, Mapping):
            return _build(kind, value, f"{path}.")
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in allowed)
        raise UsageError(f"recipe key {path} must be {names}, got {value!r}")
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise UsageError(f"recipe key {path}: its keys must be names, got {value!r}")
    return value


def _check_recipe(recipe: Recipe) -> None:
    if recipe.stage not in ("all", *STAGES):
        raise unknown_name("stage", recipe.stage, ("all", *STAGES))
    if not list(recipe.stages()):
        raise UsageError(f"recipe {recipe.name!r} has nothing to run for stage={recipe.stage}")
    if "{" in recipe.output_dir.replace("{name}", ""):
        raise UsageError(f"output_dir {recipe.output_dir!r}: {{name}} is all that can be filled in")
    _check_range("seed", recipe.seed, 0, 2**32 - 1)
    _check_range("model.image_size", recipe.model.image_size, 1)
    _check_range("model.tokenizer_vocab", recipe.model.tokenizer_vocab, 1)
    for stage, spec in recipe.stages():
        _check_stage(stage, spec)
    first = recipe.pretrain or recipe.finetune
    if recipe.model.fusion != "concat" and not recipe.from_model and first and "fusion" not in first.learning_rates:
        raise UsageError(
            f"model.fusion {recipe.model.fusion} starts with closed gates, through which nothing learns: give the "
            "first stage learning_rates.fusion"
        )
    if recipe.stage == "all" and recipe.finetune and recipe.finetune.lora and recipe.pretrain and recipe.pretrain.lora:
        raise UsageError("finetune.lora: pretrain has adapters too; run it alone and merge its model (acformer merge)")
    is_new = isinstance(recipe.model.text, dict) and not recipe.from_model
    if is_new and (first := recipe.pretrain or recipe.finetune) and first.save == "connector":
        raise UsageError("save: connector would lose the new language model (model.text): not in the first stage")
    if recipe.cache_features and any("vision_tower" in spec.learning_rates for _, spec in recipe.stages()):
        raise UsageError("cache_features needs a frozen encoder: take vision_tower out of learning_rates")


def _check_stage(stage: str, spec: StageSpec) -> None:
    for module, rate in spec.learning_rates.items():
        if module not in MODULES:
            raise unknown_name(f"module under {stage}.learning_rates", module, MODULES)
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            hint = " (write 5.0e-4: YAML reads 5e-4 as text)" if isinstance(rate, str) else ""
            raise UsageError(f"{stage}.learning_rates.{module} must be a positive number, got {rate!r}{hint}")
    if not spec.learning_rates:
        raise UsageError(f"{stage}.learning_rates is empty: name the modules that train")
    for key in spec.training:
        if key in RESERVED:
            raise UsageError(f"{stage}.training.{key} does nothing here: {RESERVED[key].format(stage=stage)}")
    data_entries(spec.data, spec.image_root, key=f"{stage}.data")
    if spec.packing and spec.elastic is not None:
        raise UsageError(f"{stage}.packing and {stage}.elastic do not go together: take one of them")
    for key in ("max_samples", "max_length", "group"):
        _check_range(f"{stage}.{key}", getattr(spec, key), 1)
    if spec.elastic is not None:
        low, high = spec.elastic if len(spec.elastic) == 2 else (None, None)
        if not (type(low) is int and type(high) is int and 1 <= low <= high):
            raise UsageError(f"{stage}.elastic must be [low, high], two numbers of visual tokens, got {spec.elastic}")
    _check_range(f"{stage}.max_bad_fraction", spec.max_bad_fraction, 0, 1)
    check_adapters(stage, spec.lora, spec.quantize, spec.learning_rates)
    _check_save(stage, spec)


def _check_save(stage: str, spec: StageSpec) -> None:
    """`UsageError` where what is to be saved would lack something that was trained, or be what was quantised."""
    if spec.save not in SAVES:
        raise unknown_name(f"{stage}.save", spec.save, SAVES)
    others = sorted(spec.learning_rates.keys() - {"connector", "fusion"})
    if spec.save == "connector" and spec.lora:
        raise UsageError(f"{stage}.save: connector: with lora, adapters and connector are saved; leave save out")
    if spec.save == "connector" and others:
        raise UsageError(f"{stage}.save: connector would lose {', '.join(others)}, which {stage}.learning_rates trains")
    if spec.quantize and not spec.lora and spec.save != "connector":
        raise UsageError(f"{stage}.quantize: the model in few bits is not worth saving; add {stage}.save=connector")


def _check_range(path: str, value: float | None, low: float, high: float = math.inf) -> None:
    if value is not None and not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"in {low}..{high}"
        raise UsageError(f"recipe key {path} must be {limits}, got {value!r}")
