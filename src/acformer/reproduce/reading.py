"""The reader in place of a language model: trained with the connector from the recipe, then asked the same questions.

A recipe whose `model.text` is `scene-reader` is trained here: the connector and `SceneReader` side by side, in one
stage, on scenes as they are (no conversation). Of `training` it takes max_steps, per_device_train_batch_size,
warmup_steps and bf16; the reader's learning rate is that of `language_model`.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from acformer.build import parse_device, square_image_processor
from acformer.connectors import Connector, build_connector
from acformer.connectors.initialise import initialise
from acformer.data.collate import stack_features
from acformer.embedded import cache_dir, resolve
from acformer.errors import DivergedError
from acformer.evaluate.families import Reply
from acformer.evaluate.report import as_reply
from acformer.features import FeatureCache
from acformer.recipe import Recipe
from acformer.reproduce.runs import geometry_of
from acformer.scenes.answers import SceneAnswers, split
from acformer.scenes.dataset import draw_missing, picture_path, undrawn_samples
from acformer.scenes.facts import Facts, facts_of
from acformer.scenes.layout import make_scene
from acformer.scenes.levels import LEVELS, Level
from acformer.scenes.questions import ask
from acformer.scenes.reader import SceneReader
from acformer.vision import VisionFeatures, load_vision_encoder, resized

READER = "scene-reader"
WIDTH = 128  # E, of the tokens that the heads read


@dataclass(frozen=True)
class Learner:
    """A connector and the heads that read its tokens; `cache` holds what the frozen encoder makes of pictures."""

    level: Level
    connector: Connector
    reader: SceneReader
    cache: FeatureCache
    device: torch.device
    bf16: bool

    def read(self, scenes: list[tuple[str, int]]) -> dict[str, Tensor]:
        """What the heads say of (split, number) scenes, whose features are in the cache."""
        found = stack_features([picture_path(self.level, *scene) for scene in scenes], self.cache)
        sizes = self.connector.geometry
        features = VisionFeatures(
            found["tokens"].float().to(self.device),
            found["cls_attention"].to(self.device) if "cls_attention" in found else None,
            self.connector.input_grid,
            sizes.num_prefix_tokens,
            found["levels"].float().to(self.device) if "levels" in found else None,
        )
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            return self.reader(self.connector(features))

    def parameters(self) -> list[nn.Parameter]:
        """All that learns."""
        return [*self.connector.parameters(), *self.reader.parameters()]

    def see(self, split: str, numbers: list[int]) -> None:
        """Draw and encode the pictures that are not there yet."""
        draw_missing(self.level, split, numbers, progress=False)
        self.cache.add([picture_path(self.level, split, number) for number in numbers], progress=False)


def train_reader(recipe: Recipe) -> tuple[Learner, list[float]]:
    """A learner trained as the recipe says, and the seconds of each step (forward, backward, update).

    Raises:
        DivergedError: a loss is not finite.
    """
    spec = recipe.finetune
    assert spec is not None
    torch.manual_seed(recipe.seed)
    learner = _new_learner(recipe)
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
    seconds = []
    for step, chosen in zip(range(steps), _batches(count, size, recipe.seed), strict=False):
        target = Facts(*(value[chosen].to(learner.device) for value in facts))
        begin = time.perf_counter()
        loss = learner.reader.loss(learner.read([("train", number) for number in chosen.tolist()]), target)
        if not torch.isfinite(loss):
            raise DivergedError(f"loss is {loss.item()} at step {step + 1}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - begin)
    learner.connector.eval(), learner.reader.eval()
    return learner, seconds


def reader_loss(learner: Learner, split_name: str, limit: int) -> float:
    """The mean of the training loss over the first `limit` scenes of another split."""
    numbers = list(range(min(limit, learner.level.num_scenes(split_name))))
    learner.see(split_name, numbers)
    losses = []
    with torch.inference_mode():
        for start in range(0, len(numbers), 32):
            chosen = numbers[start : start + 32]
            facts = facts_of([make_scene(learner.level, split_name, number) for number in chosen])
            said = learner.read([(split_name, number) for number in chosen])
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
            for number, said in zip(chosen, split(learner.read([(part, n) for n in chosen])), strict=True):
                answers = SceneAnswers(learner.level, said)
                for question in ask(make_scene(learner.level, part, number), thorough=True):
                    replies.append(replace(as_reply(next(samples)), prediction=answers.answer(question)))
    return replies


def _new_learner(recipe: Recipe) -> Learner:
    spec, level = recipe.model, LEVELS[recipe.finetune.data.partition(":")[0]]  # type: ignore[union-attr]
    device, geometry = parse_device("auto"), geometry_of(spec)._replace(text_hidden_size=WIDTH)
    connector = build_connector(spec.connector, geometry, **spec.connector_kwargs)
    initialise(connector)
    encoder = load_vision_encoder(resolve(spec.vision), spec.feature_layer, levels=connector.levels)
    encoder.to(device)
    config, grid = encoder.tower.config, connector.input_grid

    def encode(pixels: Tensor) -> VisionFeatures:
        return encoder(pixels if grid == geometry.grid else resized(pixels, config, grid))

    processor = square_image_processor(resolve(spec.vision), spec.image_size or config.image_size)
    folder = cache_dir() / "features"
    cache = FeatureCache(folder, encode, encoder.tower, processor, levels=connector.levels, input_grid=grid)
    reader = SceneReader(level, connector.num_tokens, WIDTH)
    bf16 = bool(recipe.finetune.training.get("bf16", False))  # type: ignore[union-attr]
    return Learner(level, connector.to(device), reader.to(device), cache, device, bf16)


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches: every scene once before one comes twice, in another order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order.split(size) if count >= size else [order]


def _cosine(steps: int, warmup: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return factor


def num_parameters(learner: Learner) -> int:
    """Of the connector."""
    return sum(parameter.numel() for parameter in learner.connector.parameters())
