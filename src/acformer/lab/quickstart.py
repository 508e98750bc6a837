"""`acformer quickstart`: from nothing to answers about images, and a report that says what it took."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from acformer.commands.arguments import default_model
from acformer.data.sources import Sample
from acformer.evaluate.card_scores import record_scores
from acformer.evaluate.generate import ask
from acformer.evaluate.report import evaluate, evaluation_samples, question_text
from acformer.fetch.embedded import PREFIX
from acformer.files import write_text
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.hf.checkpoints import load_model, model_folder
from acformer.hf.trained import examples, fetch_models
from acformer.hf.visual_token_cache import VisualTokenCache
from acformer.images import load_image
from acformer.provenance import peak_resident_bytes
from acformer.training.recipe import load_recipe
from acformer.training.stages import train
from acformer.viz import draw_anchors, find_anchors

Parts = tuple[AcFormerForConditionalGeneration, AcFormerProcessor]


def quickstart(out: Path, overrides: Sequence[str] = (), *, limit: int = 2400, progress: bool = True) -> dict[str, Any]:
    """Fetch, train the `tiny` recipe, evaluate it on easy-VQA, ask three questions, draw the anchors, report.

    A trained model of ours (`default_model`), if there is one, is asked, too, about an image that comes with it;
    `report.json` has that as `scene`, or null.

    Everything lies under `out`; `report.json` holds accuracy, num_questions, blind_accuracy, num_image_tokens,
    num_vision_tokens, seconds (without the fetch) and seconds per phase. `limit`: test questions. What an earlier call
    has trained there is trained again, so that the seconds are true.
    """
    phases: dict[str, float] = {}
    name = default_model()
    ours = [name.removeprefix(PREFIX)] if name else []
    with _timed(phases, "fetch"):
        fetch_models(["dinov2-s14", "easy-vqa", *ours], progress=progress)
    with _timed(phases, "ask a trained model"):  # before the training, for which its memory is free again
        scene = _ask_about_a_scene(name) if name else None
    with _timed(phases, "train"):
        folder = train(load_recipe("tiny", [f"output_dir={out}", "resume=false", *overrides]), progress=progress)
    with _timed(phases, "evaluate"):
        parts = load_model(str(folder))
        scores = evaluate(parts, "easy-vqa", out, limit=limit, progress=progress)
        record_scores(str(folder), scores)
    with _timed(phases, "ask and draw"):
        shown = [_show(parts, sample, out) for sample in _three(evaluation_samples("easy-vqa", limit))]
    report = {
        **scores,
        "seconds": round(sum(seconds for phase, seconds in phases.items() if phase != "fetch"), 1),
        "seconds_per_phase": {phase: round(seconds, 1) for phase, seconds in phases.items()},
        "peak_memory_gib": round(peak_resident_bytes() / 2**30, 2),
        "model": str(folder),
        "predictions": str(out / "predictions.jsonl"),
        "asked": shown,
        "scene": scene,
    }
    write_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    print(_report_text(report, out))
    return report


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    phases[name] = time.monotonic() - start


def _three(samples: list[Sample]) -> list[Sample]:
    """Questions of three kinds about three images."""
    chosen: dict[str | None, Sample] = {}
    for sample in samples:
        if all(sample.images != other.images for other in chosen.values()):
            chosen.setdefault(sample.kind, sample)
    return list(chosen.values())[:3]


def _show(parts: Parts, sample: Sample, out: Path) -> dict[str, Any]:
    """Ask, and draw the anchors that the model looked through, if its connector has any."""
    model, processor = parts
    shown = sample.images[0]
    if model.config.connector == "acformer":
        image, shown = load_image(shown), out / f"anchors-{sample.id}.png"
        num_anchors = processor.num_placeholders - 1
        found = find_anchors(image, model.get_vision_features, processor.image_processor, num_anchors)
        draw_anchors(image, found.indices, found.grid, pad_to_square=True).save(shown)
    question = question_text(sample)
    prediction = ask(*parts, sample.images[0], question, max_new_tokens=16)
    return {"question": question, "said": prediction, "answer": sample.answer, "picture": str(shown)}


def _ask_about_a_scene(name: str) -> dict[str, Any]:
    """The questions of the first image that comes with our trained model, what it says, and what is right."""
    shown = examples(Path(model_folder(name)))
    first = [one for one in shown if one.image == shown[0].image]
    model, processor = load_model(name)
    tokens = VisualTokenCache(model, processor)  # the image is encoded once
    asked = [
        {
            "question": one.question,
            "said": ask(model, processor, one.image, one.question, tokens=tokens, max_new_tokens=16),
            "answer": one.answer,
        }
        for one in first
    ]
    return {"model": name, "picture": str(first[0].image), "asked": asked}


def _report_text(report: dict[str, Any], out: Path) -> str:
    low, high = report["interval"]
    asked = [f"{_line(one)}  {one['picture']}" for one in report["asked"]]
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["seconds_per_phase"].items())
    return "\n".join(
        [
            "",
            f"accuracy       {report['accuracy']:.1%}  [{low:.1%}, {high:.1%}] on {report['num_questions']} questions "
            f"about {report['num_images']} images",
            f"blind          {report['blind_accuracy']:.1%}  the most frequent answer, without looking",
            f"visual tokens  {report['num_image_tokens']} of {report['num_vision_tokens']}",
            f"time           {report['seconds']:.0f} s ({phases}), peak memory {report['peak_memory_gib']} GiB",
            "asked",
            *asked,
            f"model          {report['model']}",
            f"predictions    {report['predictions']}",
            f"report         {out / 'report.json'}",
            f"ask it more    {Path(sys.argv[0])} ask {out} IMAGE 'what color is the shape?'",
            *_scene_text(report["scene"]),
        ]
    )


def _scene_text(scene: dict[str, Any] | None) -> list[str]:
    if scene is None:
        return []
    return [
        "",
        f"and {scene['model']}, which was trained before, about a drawn scene: {scene['picture']}",
        *map(_line, scene["asked"]),
        f"ask it more    {Path(sys.argv[0])} ask {scene['picture']} 'how many objects are there?'",
    ]


def _line(asked: dict[str, str]) -> str:
    return f"  {asked['question']}  ->  {asked['said']}  (right: {asked['answer']})"
