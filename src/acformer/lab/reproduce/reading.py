"""The reader in place of a language model: trained with the connector from the recipe, then asked the same questions.

A recipe whose `model.text` is `scene-reader` is trained here: the connector and `SceneReader` side by side, in one
stage (`finetune`), on scenes as they are (no conversation). Of `training` it takes max_steps and
per_device_train_batch_size, which must be there, warmup_steps and bf16; the reader's learning rate is that of
`language_model`.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from acformer.connectors import Connector, build_connector
from acformer.data.collate import stack_features
from acformer.errors import DivergedError, UsageError, unknown_name
from acformer.evaluate.families import Reply
from acformer.evaluate.report import as_reply, score_replies, write_predictions
from acformer.fetch.embedded import cache_dir
from acformer.hf.build import parse_device, parse_dtype, square_image_processor
from acformer.lab.reproduce.plans import READER
from acformer.lab.reproduce.runs import geometry_of
from acformer.lab.scenes.answers import SceneAnswers, split
from acformer.lab.scenes.dataset import draw_missing, picture_path, undrawn_samples
from acformer.lab.scenes.facts import Facts, facts_of
from acformer.lab.scenes.layout import make_scene
from acformer.lab.scenes.levels import LEVELS, Level
from acformer.lab.scenes.prior import prior_said
from acformer.lab.scenes.questions import ask
from acformer.lab.scenes.reader import SceneReader
from acformer.training.recipe import Recipe, StageSpec
from acformer.vision.encoder import load_vision_encoder
from acformer.vision.families import image_size
from acformer.vision.feature_cache import FeatureCache
from acformer.vision.features import VisionFeatures

WIDTH = 384  # E, of the tokens that the heads read: DINOv2-S's own, so that no projector is a bottleneck


@dataclass(frozen=True)
class Learner:
    """A connector and the heads that read its tokens; `cache` holds what the frozen encoder makes of pictures."""

    level: Level
    connector: Connector
    reader: SceneReader
    cache: FeatureCache
    device: torch.device
    bf16: bool

    def features(self, scenes: list[tuple[str, int]]) -> VisionFeatures:
        """What the encoder made of (split, number) scenes, from the cache."""
        found = stack_features([picture_path(self.level, *scene) for scene in scenes], self.cache)
        return VisionFeatures(
            found["tokens"].float().to(self.device),
            found["cls_attention"].to(self.device) if "cls_attention" in found else None,
            self.connector.input_grid,
            self.connector.geometry.num_prefix_tokens,
            found["hidden_layers"].float().to(self.device) if "hidden_layers" in found else None,
        )

    def read(self, features: VisionFeatures) -> dict[str, Tensor]:
        """What the heads say of the pictures."""
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            return self.reader(self.connector(features))

    def parameters(self) -> list[nn.Parameter]:
        """All that learns."""
        return [*self.connector.parameters(), *self.reader.parameters()]

    def see(self, split: str, numbers: list[int]) -> None:
        """Draw and encode the pictures that are not there yet."""
        draw_missing(self.level, split, numbers, progress=False)
        self.cache.add([picture_path(self.level, split, number) for number in numbers], progress=False)


class Trained(NamedTuple):
    """A learner; of each step the seconds (forward, backward and update, without reading the features) and the loss."""

    learner: Learner
    seconds: list[float]
    losses: list[float]

    def curve(self, points: int = 15) -> list[float]:
        """The mean loss of each of so many stretches of the training: whether it had gone flat."""
        return [round(float(stretch.mean()), 3) for stretch in torch.tensor(self.losses).chunk(points)]


def train_reader(recipe: Recipe, width: int = WIDTH) -> Trained:
    """A learner trained as the recipe says; `width`: E, of the tokens that the heads read.

    Raises:
        UsageError: a recipe that heads cannot be trained by.
        DivergedError: a loss is not finite.
    """
    spec = _only_stage(recipe)
    torch.manual_seed(recipe.seed)
    learner = _new_learner(recipe, spec, width)
    level = learner.level
    count = min(spec.max_samples or level.scenes[0], level.scenes[0])
    learner.see("train", list(range(count)))
    facts = facts_of([make_scene(level, "train", number) for number in range(count)])
    groups = [
        {"params": list(module.parameters()), "lr": spec.learning_rates[name]}
        for name, module in (("connector", learner.connector), ("language_model", learner.reader))
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps, size = spec.training["max_steps"], spec.training["per_device_train_batch_size"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(steps, spec.training.get("warmup_steps", 0)))
    seconds, losses = [], []
    for step, chosen in zip(range(steps), _batches(count, size, recipe.seed), strict=False):
        target = Facts(*(value[chosen].to(learner.device) for value in facts))
        features = learner.features([("train", number) for number in chosen.tolist()])
        begin = time.perf_counter()
        loss = learner.reader.loss(learner.read(features), target)
        if not torch.isfinite(loss):
            raise DivergedError(f"loss is {loss.item()} at step {step + 1}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())  # waits for the device, so that the step is timed whole
        seconds.append(time.perf_counter() - begin)
    learner.connector.eval()
    learner.reader.eval()
    return Trained(learner, seconds, losses)


def reader_loss(learner: Learner, split_name: str, limit: int) -> float:
    """The mean of the training loss over the first `limit` scenes of another split."""
    numbers = list(range(min(limit, learner.level.num_scenes(split_name))))
    learner.see(split_name, numbers)
    losses = []
    with torch.inference_mode():
        for start in range(0, len(numbers), 32):
            chosen = numbers[start : start + 32]
            facts = facts_of([make_scene(learner.level, split_name, number) for number in chosen])
            said = learner.read(learner.features([(split_name, number) for number in chosen]))
            losses.append(float(learner.reader.loss(said, Facts(*(value.to(learner.device) for value in facts)))))
    return statistics.fmean(losses)


def reader_replies(learner: Learner, data: str, limit: int | None = None) -> list[Reply]:
    """The answers to the questions of `openmoji-scenes...:SPLIT`, of its first `limit` scenes."""
    name, _, part = data.partition(":")
    numbers = list(range(min(limit or learner.level.num_scenes(part), learner.level.num_scenes(part))))
    learner.see(part, numbers)
    samples = undrawn_samples(name, part)
    replies = []
    with torch.inference_mode():
        for start in range(0, len(numbers), 32):
            chosen = numbers[start : start + 32]
            read = learner.read(learner.features([(part, number) for number in chosen]))
            for number, said in zip(chosen, split(read), strict=True):
                answers = SceneAnswers(learner.level, said)
                for question in ask(make_scene(learner.level, part, number), thorough=part != "train"):
                    replies.append(replace(as_reply(next(samples)), prediction=answers.answer(question)))
    return replies


def reader_scores(learner: Learner, data: str, out: Path, limit: int | None = None) -> dict[str, Any]:
    """As `evaluate` has them, with `predictions.jsonl` under `out`; *blind* as in `with_prior`."""
    replies = reader_replies(learner, data, limit)
    samples = list(islice(undrawn_samples(learner.level.name, data.partition(":")[2]), len(replies)))
    out.mkdir(parents=True, exist_ok=True)
    write_predictions(samples, (reply.prediction for reply in replies), out / "predictions.jsonl")
    return with_prior(score_replies(data, replies), data, replies)


def with_prior(scores: dict[str, Any], data: str, replies: list[Reply]) -> dict[str, Any]:
    """Scores of questions about scenes, *blind* raised, in each family, to heads that see nothing (`scenes/prior.py`).

    They say yes to every noun, which the most frequent answers do not; so may a language model. Scores of other data
    are left as they are. `replies`: to the questions, in their order; what they say does not count.
    """
    level = LEVELS.get(data.partition(":")[0])
    if level is None:
        return scores
    prior = score_replies(data, prior_replies(level, data, replies))["families"]
    families = {
        name: {**family, "blind": max(family["blind"], prior[name]["score"])}
        for name, family in scores["families"].items()
    }
    average = {**scores["average"], "blind": statistics.fmean(family["blind"] for family in families.values())}
    return {**scores, "families": families, "average": average}


def prior_replies(level: Level, data: str, replies: list[Reply]) -> list[Reply]:
    """The same questions answered by heads that say what is frequent."""
    answers, part = SceneAnswers(level, prior_said(level)), data.partition(":")[2]
    questions = (
        question
        for number in range(level.num_scenes(part))
        for question in ask(make_scene(level, part, number), thorough=part != "train")
    )
    return [replace(reply, prediction=answers.answer(next(questions))) for reply in replies]


def _only_stage(recipe: Recipe) -> StageSpec:
    spec, say = recipe.finetune, f"recipe {recipe.name!r}, model.text {READER}:"
    if spec is None or recipe.pretrain is not None:
        raise UsageError(f"{say} it learns in one stage; give finetune and pretrain: null")
    if (name := spec.data.partition(":")[0]) not in LEVELS:
        raise unknown_name("scenes in finetune.data", name, LEVELS)
    if unknown := set(spec.training) - {"max_steps", "per_device_train_batch_size", "warmup_steps", "bf16"}:
        raise UsageError(f"{say} finetune.training.{min(unknown)} does nothing here")
    for section, keys in (
        ("learning_rates", ("connector", "language_model")),
        ("training", ("max_steps", "per_device_train_batch_size")),
    ):
        if missing := [key for key in keys if key not in getattr(spec, section)]:
            raise UsageError(f"{say} finetune.{section}.{missing[0]} is missing")
    return spec


def _new_learner(recipe: Recipe, stage: StageSpec, width: int) -> Learner:
    spec, level = recipe.model, LEVELS[stage.data.partition(":")[0]]
    device, geometry = parse_device("auto"), geometry_of(spec)._replace(text_hidden_size=width)
    connector = build_connector(spec.connector, geometry, **spec.connector_kwargs)
    dtype = parse_dtype(spec.dtype)
    hidden_layers, grid = connector.hidden_layers, connector.input_grid
    encoder = load_vision_encoder(
        spec.vision,
        spec.feature_layer,
        hidden_layers=hidden_layers,
        input_grid=None if grid == geometry.grid else grid,
        dtype=dtype,
    )
    encoder.to(device)
    processor = square_image_processor(encoder.tower, spec.image_size or image_size(encoder.tower.config))
    folder = cache_dir() / "features"
    cache = FeatureCache(folder, encoder, encoder.tower, processor, hidden_layers=hidden_layers, input_grid=grid)
    reader = SceneReader(level, connector.num_tokens, width)
    bf16 = bool(stage.training.get("bf16", False))
    return Learner(level, connector.to(device), reader.to(device), cache, device, bf16)


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches: every scene once before one comes twice, in another order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order.split(size)


def _cosine(steps: int, warmup: float) -> Callable[[int], float]:
    rising = warmup * steps if warmup < 1 else warmup  # as `TrainingArguments` reads it

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(1, rising)) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return factor


def num_parameters(learner: Learner) -> int:
    """Of the connector."""
    return sum(parameter.numel() for parameter in learner.connector.parameters())
