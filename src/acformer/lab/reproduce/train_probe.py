"""A probe in place of a language model: trained with the connector by a recipe, then asked the same questions.

A recipe whose `model.text` is one of `plans.PROBES` is trained here: the connector and `SceneProbe` side by side, in
one stage (`finetune`), on scenes as they are (no conversation). Of `training` it takes max_steps and
per_device_train_batch_size, which must be there, warmup_steps and bf16; the probe's learning rate is that of
`language_model`. With `elastic` every step has its own number of tokens, as in `acformer.training.elastic`.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from acformer.connectors import Connector, build_connector
from acformer.data.collate import stack_features
from acformer.data.entries import data_title
from acformer.errors import DivergedError, UsageError, unknown_name
from acformer.evaluate.families import Reply
from acformer.evaluate.report import as_reply, score_replies, write_predictions
from acformer.fetch.embedded import cache_dir
from acformer.hf.build import parse_device, parse_dtype, square_image_processor
from acformer.lab.reproduce.plans import MIXING_PROBE, PROBE, WORD_PROBE
from acformer.lab.reproduce.runs import geometry_of
from acformer.lab.scenes.answers import ProbeAnswers, split
from acformer.lab.scenes.dataset import draw_missing, image_path, undrawn_samples
from acformer.lab.scenes.difficulty import DIFFICULTIES, Difficulty
from acformer.lab.scenes.layout import make_scene
from acformer.lab.scenes.prior import prior_predictions
from acformer.lab.scenes.probe import SceneProbe
from acformer.lab.scenes.questions import Question, ask
from acformer.lab.scenes.targets import SceneTargets, targets_of
from acformer.lab.scenes.word_probe import WordProbe
from acformer.lab.training_step import autocast, training_step
from acformer.training.elastic import elastic_choices, sample_budget
from acformer.training.recipe import Recipe, StageSpec
from acformer.vision.encoder import load_vision_encoder
from acformer.vision.families import image_size
from acformer.vision.feature_cache import FeatureCache
from acformer.vision.features import VisionFeatures

WIDTH = 384  # E, of the tokens that the probe is given: DINOv2-S's own, so that no projector is a bottleneck
BATCH = 32  # scenes at a time, in evaluation


@dataclass(frozen=True)
class ProbedConnector:
    """A connector and the probe of its tokens; `cache` holds what the frozen encoder makes of images."""

    difficulty: Difficulty
    connector: Connector
    probe: SceneProbe
    cache: FeatureCache
    device: torch.device
    bf16: bool
    num_tokens: int | None = None
    """T asked of the connector, if it is not its own."""

    def features(self, scenes: list[tuple[str, int]]) -> VisionFeatures:
        """What the encoder made of (split, number) scenes, from the cache."""
        found = stack_features([image_path(self.difficulty, *scene) for scene in scenes], self.cache)
        return VisionFeatures(
            found["tokens"].float().to(self.device),
            found["cls_attention"].to(self.device) if "cls_attention" in found else None,
            self.connector.input_grid,
            self.connector.geometry.num_prefix_tokens,
            found["hidden_layers"].float().to(self.device) if "hidden_layers" in found else None,
        )

    def predict(self, features: VisionFeatures) -> dict[str, Tensor]:
        """What the probe predicts of the images."""
        with autocast(self.device, torch.bfloat16 if self.bf16 else torch.float32):
            return self.probe(self.connector(features, self.num_tokens))

    def loss(self, features: VisionFeatures, targets: SceneTargets) -> Tensor:
        """The probe's, of a batch."""
        return self.probe.loss(self.predict(features), targets)

    def encode(self, split_name: str, numbers: list[int]) -> None:
        """Draw and encode the images that are not there yet."""
        draw_missing(self.difficulty, split_name, numbers, progress=False)
        self.cache.add([image_path(self.difficulty, split_name, number) for number in numbers], progress=False)

    def predictions(self, split_name: str, limit: int | None) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Numbers and predictions of the first `limit` scenes of a split, in batches."""
        count = self.difficulty.num_scenes(split_name)
        numbers = list(range(min(limit or count, count)))
        self.encode(split_name, numbers)
        for start in range(0, len(numbers), BATCH):
            chosen = numbers[start : start + BATCH]
            with torch.inference_mode():
                predicted = self.predict(self.features([(split_name, number) for number in chosen]))
            yield chosen, predicted


class TrainedProbe(NamedTuple):
    """The modules; of each step the seconds (forward, backward and update, without loading features) and the loss."""

    probed: ProbedConnector
    seconds: list[float]
    losses: list[float]

    def curve(self, points: int = 15) -> list[float]:
        """The mean loss of each of so many stretches of the training: whether it had gone flat."""
        return [round(float(stretch.mean()), 3) for stretch in torch.tensor(self.losses).chunk(points)]


def train_probe(recipe: Recipe, width: int = WIDTH, words: Tensor | None = None) -> TrainedProbe:
    """Train a connector and a probe as the recipe says; `width`: E, of the tokens that the probe is given.

    words: (V, E), what a probe by words scores tokens by.

    Raises:
        UsageError: a recipe that a probe cannot be trained by.
        DivergedError: a loss is not finite.
    """
    spec = _only_stage(recipe)
    if recipe.model.text == WORD_PROBE and words is None:
        raise UsageError(f"model.text {WORD_PROBE} is a probe before a language model: take it as a scale's probe")
    torch.manual_seed(recipe.seed)
    probed = _new_probe(recipe, spec, width, words)
    choices = _choices(probed.connector, spec)
    available = probed.difficulty.num_scenes("train")
    count = min(spec.max_samples or available, available)
    probed.encode("train", list(range(count)))
    targets = targets_of([make_scene(probed.difficulty, "train", number) for number in range(count)])
    groups = [
        {"params": list(module.parameters()), "lr": spec.learning_rates[name]}
        for name, module in (("connector", probed.connector), ("language_model", probed.probe))
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps, size = spec.training["max_steps"], spec.training["per_device_train_batch_size"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(steps, spec.training.get("warmup_steps", 0)))
    seconds, losses = [], []
    for step, chosen in zip(range(steps), _batches(count, size, recipe.seed), strict=False):
        target = SceneTargets(*(value[chosen] for value in targets)).to(probed.device)
        features = probed.features([("train", number) for number in chosen.tolist()])
        begin = time.perf_counter()
        asked = replace(probed, num_tokens=sample_budget(choices, recipe.seed, step))
        loss = training_step(partial(asked.loss, features, target), optimizer, max_grad_norm=1.0)
        schedule.step()
        losses.append(loss.item())  # waits for the device, so that the step is timed whole
        seconds.append(time.perf_counter() - begin)
        if not math.isfinite(losses[-1]):
            raise DivergedError(f"loss is {losses[-1]} at step {step + 1}")
    nn.ModuleList([probed.connector, probed.probe]).eval()
    return TrainedProbe(probed, seconds, losses)


def probe_loss(probed: ProbedConnector, split_name: str, limit: int) -> float:
    """The mean of the training loss over the first `limit` scenes of another split."""
    losses = []
    for numbers, predicted in probed.predictions(split_name, limit):
        targets = targets_of([make_scene(probed.difficulty, split_name, number) for number in numbers])
        losses.append(float(probed.probe.loss(predicted, targets.to(probed.device))))
    return statistics.fmean(losses)


def probe_replies(probed: ProbedConnector, data: str, limit: int | None = None) -> list[Reply]:
    """The answers to the questions of `openmoji-scenes...:SPLIT`, of its first `limit` scenes."""
    name, _, part = data.partition(":")
    samples, replies = undrawn_samples(name, part), []
    for numbers, predicted in probed.predictions(part, limit):
        for number, predictions in zip(numbers, split(predicted), strict=True):
            answers = ProbeAnswers(probed.difficulty, predictions)
            for question in _questions(probed.difficulty, part, number):
                replies.append(replace(as_reply(next(samples)), prediction=answers.answer(question)))
    return replies


def probe_scores(probed: ProbedConnector, data: str, out: Path, limit: int | None = None) -> dict[str, Any]:
    """As `evaluate` has them, with `predictions.jsonl` under `out`; *blind* as in `with_prior`."""
    replies = probe_replies(probed, data, limit)
    samples = list(islice(undrawn_samples(*data.split(":")), len(replies)))
    out.mkdir(parents=True, exist_ok=True)
    write_predictions(samples, (reply.prediction for reply in replies), out / "predictions.jsonl")
    return with_prior(score_replies(data, replies), data, replies)


def with_prior(scores: dict[str, Any], data: str, replies: list[Reply]) -> dict[str, Any]:
    """Scores of questions about scenes, *blind* raised, in each family, to the prior's (`scenes/prior.py`).

    The prior says yes to every noun, which the most frequent answers do not; so may a language model. Scores of other
    data are left as they are. `replies`: to the questions, in their order; their predictions do not count.
    """
    difficulty = DIFFICULTIES.get(data.partition(":")[0])
    if difficulty is None:
        return scores
    prior = score_replies(data, prior_replies(difficulty, data, replies))["families"]
    families = {
        name: {**family, "blind": max(family["blind"], prior[name]["score"])}
        for name, family in scores["families"].items()
    }
    average = {**scores["average"], "blind": statistics.fmean(family["blind"] for family in families.values())}
    return {**scores, "families": families, "average": average}


def prior_replies(difficulty: Difficulty, data: str, replies: list[Reply]) -> list[Reply]:
    """The same questions answered by what is frequent."""
    answers, part = ProbeAnswers(difficulty, prior_predictions(difficulty)), data.partition(":")[2]
    numbers = range(difficulty.num_scenes(part))
    questions = (question for number in numbers for question in _questions(difficulty, part, number))
    return [replace(reply, prediction=answers.answer(next(questions))) for reply in replies]


def _questions(difficulty: Difficulty, part: str, number: int) -> list[Question]:
    """As the data set asks them about a scene."""
    return ask(make_scene(difficulty, part, number), thorough=part != "train")


def _only_stage(recipe: Recipe) -> StageSpec:
    spec, where = recipe.finetune, f"recipe {recipe.name!r}, model.text {recipe.model.text}:"
    if spec is None or recipe.pretrain is not None:
        raise UsageError(f"{where} a probe is trained in one stage; give finetune and pretrain: null")
    if (name := data_title(spec.data).partition(":")[0]) not in DIFFICULTIES:
        raise unknown_name("scenes in finetune.data", name, DIFFICULTIES)
    if unknown := set(spec.training) - {"max_steps", "per_device_train_batch_size", "warmup_steps", "bf16"}:
        raise UsageError(f"{where} finetune.training.{min(unknown)} does nothing here; leave it out")
    for section, keys in (
        ("learning_rates", ("connector", "language_model")),
        ("training", ("max_steps", "per_device_train_batch_size")),
    ):
        if missing := [key for key in keys if key not in getattr(spec, section)]:
            raise UsageError(f"{where} finetune.{section}.{missing[0]} is missing")
    return spec


def _new_probe(recipe: Recipe, stage: StageSpec, width: int, words: Tensor | None) -> ProbedConnector:
    spec, difficulty = recipe.model, DIFFICULTIES[data_title(stage.data).partition(":")[0]]
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
    most = _choices(connector, stage)[-1]
    if spec.text == WORD_PROBE and words is not None:
        torch.manual_seed(recipe.seed)  # the same start for every connector, as `paired_probe`
        probe: SceneProbe = WordProbe(difficulty, most, words)
    elif spec.text == PROBE:
        probe = SceneProbe(difficulty, most, width)
    else:
        probe = paired_probe(difficulty, most, width, recipe.seed, attends=spec.text == MIXING_PROBE)
    bf16 = bool(stage.training.get("bf16", False))
    return ProbedConnector(difficulty, connector.to(device), probe.to(device), cache, device, bf16)


def _choices(connector: Connector, stage: StageSpec) -> tuple[int, ...]:
    """The numbers of tokens that steps are drawn from, ascending: of `elastic`, else the connector's own."""
    choices = elastic_choices(connector, *stage.elastic) if stage.elastic else (connector.num_tokens,)
    if connector.num_tokens not in choices:
        raise UsageError(
            f"finetune.elastic {stage.elastic} must hold the {connector.num_tokens} tokens of the connector"
        )
    return choices


def paired_probe(difficulty: Difficulty, num_tokens: int, width: int, seed: int, *, attends: bool) -> SceneProbe:
    """One that starts from the same weights for every connector, whatever that has drawn and how many tokens it gives.

    But for the vectors of its slots, of which there are as many as tokens.
    """
    torch.manual_seed(seed)
    start = SceneProbe(difficulty, 1, width, attends=attends).state_dict()
    del start["slots"]
    probe = SceneProbe(difficulty, num_tokens, width, attends=attends)
    probe.load_state_dict(start, strict=False)
    return probe


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
