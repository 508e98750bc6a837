"""One evaluation from beginning to end: answers, scores, files."""

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from acformer.data.datasets import load_samples, named_dataset
from acformer.data.samples import Sample
from acformer.data.skip_log import SkipLog
from acformer.errors import DataError
from acformer.evaluate.families import Reply, blind_replies, family_scores
from acformer.evaluate.generate import Features, answer
from acformer.evaluate.resume import resumed
from acformer.evaluate.scorers import accuracy_by_kind, interval
from acformer.files import locked, whole_file, write_text
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.hf.public_names import as_recorded
from acformer.hf.publish import weights_fingerprint


def evaluation_samples(data: str, limit: int | None = None, image_root: Path | None = None) -> list[Sample]:
    """Records with an answer to compare with; a data set's bare name means its test questions. No record may be bad."""
    named = named_dataset(data)
    part = f"{data}:{named[0].test_part}" if named and not named[1] else data
    samples = load_samples(part, image_root=image_root, skipped=SkipLog(max_bad_fraction=0.0), limit=limit)
    if unanswered := [sample.id for sample in samples if sample.answer is None]:
        raise DataError(f"{data}: {len(unanswered)} records have no answer to compare with, first: {unanswered[0]}")
    return samples


def evaluate(
    parts: tuple[AcFormerForConditionalGeneration, AcFormerProcessor],
    data: str,
    out: Path,
    *,
    image_root: Path | None = None,
    limit: int | None = None,
    features: Features | None = None,
    num_visual_tokens: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer `data`, write `predictions.jsonl` and `scores.json` under `out`, return the scores.

    One that was stopped goes on behind the answers that it has left in `out`, if model and questions are the same.

    accuracy (exact match), interval (95 %, bootstrap over images), accuracy_by_kind, num_questions, num_images,
    blind_accuracy (see `blind_replies`), num_image_tokens of num_vision_tokens, seconds; with questions of families
    that have a measure also families and average (see `family_scores`).
    """
    model, processor = parts
    samples = evaluation_samples(data, limit, image_root)
    started = time.monotonic()
    settings = {
        "weights": weights_fingerprint(model),
        "dtype": str(model.dtype),
        "visual_tokens": num_visual_tokens or model.model.connector.num_tokens,
        "max_new_tokens": max_new_tokens,
        "template": processor.chat_template,
        "questions": _fingerprint(samples),
    }

    def answers(start: int) -> Iterable[str]:
        return answer(
            model,
            processor,
            samples[start:],
            features=features,
            num_visual_tokens=num_visual_tokens,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )

    with locked(out / ".lock"):  # of two evaluations in one folder the second waits for the first
        said = resumed(out / "predictions.partial.jsonl", settings, answers)
        replies = write_predictions(samples, said, out / "predictions.jsonl")
    scores = {
        **score_replies(data, replies),
        "num_images": len({path for sample in samples for path in sample.images}),
        "num_image_tokens": num_visual_tokens or model.model.connector.num_tokens,
        "num_vision_tokens": model.config.num_vision_tokens,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_text(out / "scores.json", json.dumps(scores, indent=1) + "\n")
    return scores


def _fingerprint(samples: Sequence[Sample]) -> str:
    """Of what is asked about which images, and of the right answers."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.id, sample.messages, sample.images], default=str).encode())
    return digest.hexdigest()


def score_replies(data: str, replies: Sequence[Reply]) -> dict[str, Any]:
    """What the replies to questions of `data` are worth, whoever gave them; see `evaluate`."""
    # Of data without a split to learn from, its own answers, which flatters the blind score.
    blind = blind_replies(training_questions(data) or replies, replies)
    correct = [reply.right for reply in replies]
    low, high = interval(correct, [reply.image for reply in replies])
    return {
        "data": as_recorded(data),
        "accuracy": sum(correct) / len(correct),
        "interval": [low, high],
        "num_questions": len(replies),
        "blind_accuracy": sum(reply.right for reply in blind) / len(blind),
        "accuracy_by_kind": accuracy_by_kind(correct, [reply.kind for reply in replies]),
        **family_scores(replies, blind),
    }


def write_predictions(samples: Sequence[Sample], answers: Iterable[str], path: Path) -> list[Reply]:
    """One JSON line a question, all of them or none; returns them with what was answered."""
    replies = []
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        for sample, prediction in zip(samples, answers, strict=True):
            reply = replace(as_reply(sample), prediction=prediction)
            record = {
                "id": reply.id,
                "question": reply.question,
                "answer": sample.answer,
                "prediction": prediction,
                "correct": reply.right,
                "kind": reply.kind,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            replies.append(reply)
    return replies


def training_questions(data: str) -> list[Reply]:
    """The questions that blind answers are learnt from; none where a data set has no split of its own for that."""
    named = named_dataset(data)
    return [as_reply(sample) for sample in named[0].known_samples()] if named else []


def as_reply(sample: Sample) -> Reply:
    """A sample as what is scored, nothing being said yet."""
    image = str(sample.images or sample.id)
    return Reply(sample.id, image, sample.kind, question_text(sample), sample.answer or "")


def question_text(sample: Sample) -> str:
    """The words of the last question, without the image."""
    content = sample.prompt[-1]["content"]
    if isinstance(content, str):
        return content.strip()
    return " ".join(part["text"] for part in content if part["type"] == "text").strip()
