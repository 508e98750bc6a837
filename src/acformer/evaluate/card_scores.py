"""What an evaluation has measured, into the card of the model that was evaluated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from acformer.hf.card import TASK, add_score
from acformer.hf.checkpoints import model_folder
from acformer.hf.public_names import without_paths


def record_scores(model: str, scores: Mapping[str, Any]) -> None:
    """Add what `evaluate` or a benchmark gave (`scores.json`) to the card beside a local model.

    Nothing happens for a model of a hub, and where there is no score.
    """
    folder = Path(model_folder(model))
    if "benchmark" in scores:
        name, metric, value = scores["benchmark"], scores.get("metric"), scores["score"]
    else:
        name, metric, value = without_paths(str(scores["data"])), "accuracy", scores["accuracy"]
    if value is None or not folder.is_dir():
        return
    details = {
        "num_questions": scores["num_questions"],
        "num_visual_tokens": scores.get("visual_tokens", scores.get("num_image_tokens")),
        "interval": scores.get("interval"),
        "blind": scores.get("blind", scores.get("blind_accuracy")),
        "protocol": scores.get("protocol"),
        "is_share": "benchmark" not in scores,  # of 1; a benchmark's is in its own unit
    }
    result = EvalResult(
        task_type=TASK,
        dataset_type=name,
        dataset_name=name,
        metric_type=str(metric),
        metric_value=value,
        metric_args={key: one for key, one in details.items() if one is not None},
    )
    add_score(folder, result)
