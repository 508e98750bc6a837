"""One evaluation from beginning to end: answers, scores, files."""

import json
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from acformer.data.sources import Sample, SkipLog, load_samples
from acformer.errors import DataError
from acformer.evaluate.generate import answer
from acformer.evaluate.scorers import accuracy_by_kind, blind_accuracy, blind_answers, exact_match, interval
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor


def evaluation_samples(data: str, limit: int | None = None) -> list[Sample]:
    """Records with an answer to compare with; `easy-vqa` means its test questions. No record may be bad."""
    samples = load_samples("easy-vqa:test" if data == "easy-vqa" else data, skipped=SkipLog(max_bad_fraction=0.0))
    samples = list(islice(samples, limit))
    if unanswered := [sample.id for sample in samples if sample.answer is None]:
        raise DataError(f"{data}: {len(unanswered)} records have no answer to compare with, first: {unanswered[0]}")
    return samples


def evaluate(
    parts: tuple[AcFormerForConditionalGeneration, AcFormerProcessor],
    data: str,
    out: Path,
    *,
    limit: int | None = None,
    num_image_tokens: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer `data`, write `predictions.jsonl` and `scores.json` under `out`, return the scores.

    accuracy (exact match), interval (95 %, bootstrap over pictures), accuracy_by_kind, num_questions, num_images,
    blind_accuracy (see `blind_table`), num_image_tokens of num_vision_tokens, seconds.
    """
    model, processor = parts
    samples = evaluation_samples(data, limit)
    started = time.monotonic()
    answers = answer(
        model,
        processor,
        samples,
        num_image_tokens=num_image_tokens,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    out.mkdir(parents=True, exist_ok=True)
    correct = write_predictions(samples, answers, out / "predictions.jsonl")
    low, high = interval(correct, [str(sample.images or sample.id) for sample in samples])
    scores = {
        "data": data,
        "accuracy": sum(correct) / len(correct),
        "interval": [low, high],
        "num_questions": len(samples),
        "num_images": len({path for sample in samples for path in sample.images}),
        "blind_accuracy": blind_accuracy(blind_table(data, samples), *questions_and_answers(samples)),
        "accuracy_by_kind": accuracy_by_kind(correct, [sample.kind for sample in samples]),
        "num_image_tokens": num_image_tokens or processor.num_image_tokens,
        "num_vision_tokens": model.config.num_vision_tokens,
        "seconds": round(time.monotonic() - started, 1),
    }
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    return scores


def write_predictions(samples: Sequence[Sample], answers: Any, path: Path) -> list[bool]:
    """One JSON line a question as its answer comes; returns which are right."""
    correct = []
    with path.open("w", encoding="utf-8") as file:
        for sample, prediction in zip(samples, answers, strict=True):
            right = exact_match(prediction, sample.answer or "")
            question = question_text(sample)
            record = {
                "id": sample.id,
                "question": question,
                "answer": sample.answer,
                "prediction": prediction,
            }
            file.write(json.dumps({**record, "correct": right, "kind": sample.kind}, ensure_ascii=False) + "\n")
            correct.append(right)
    return correct


def blind_table(data: str, samples: Sequence[Sample]) -> dict[str, str]:
    """Most frequent answers: of easy-VQA's training questions, or of the evaluated ones where there are no others."""
    known = load_samples("easy-vqa:train") if data.partition(":")[0] == "easy-vqa" else samples
    return blind_answers(*questions_and_answers(known))


def questions_and_answers(samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    """Two lists side by side."""
    return [question_text(sample) for sample in samples], [sample.answer or "" for sample in samples]


def question_text(sample: Sample) -> str:
    """The words of the last question, without the picture."""
    content = sample.prompt[-1]["content"]
    if isinstance(content, str):
        return content.strip()
    return " ".join(part["text"] for part in content if part["type"] == "text").strip()
