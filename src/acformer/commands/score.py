"""`acformer score`: what a file of answers to a benchmark, or to a data set, is worth."""

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

NAMES = (
    "pope, mme, mmbench, mm_vet, textvqa, gqa, vqav2, vizwiz, scienceqa, okvqa, an installed package's, or what --data "
    "of `acformer eval` takes: a data set's name or a file of conversations"
)


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Its arguments."""
    sub = commands.add_parser("score", parents=[common], help="score a file of answers to a benchmark or a data set")
    sub.add_argument("benchmark", help=NAMES)
    sub.add_argument(
        "--answers",
        type=Path,
        required=True,
        help="LLaVA's, lmms-eval's log of samples, our predictions.jsonl, or what was uploaded to a test server",
    )
    sub.add_argument(
        "--truth",
        "--image-root",
        dest="truth",
        type=Path,
        help="folder of the benchmark's published files, the one file, or a hub data set (default: the answers'); of a "
        "file of conversations the folder of its images",
    )
    sub.add_argument("--protocol", default="llava", help="llava (default, as the paper), lmms-eval or official")
    sub.add_argument("--against", type=Path, help="another file of answers: the paired difference of the two")
    sub.add_argument("--submission", type=Path, help="write the file that the test server takes")
    sub.add_argument("--per-question", type=Path, help="write a JSON line for every question, with its points")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """The score, as text or as JSON."""
    gc.disable()  # VQAv2 is millions of objects that all stay: to look through them again and again is a third of it
    try:
        return _score(arguments)
    finally:
        gc.enable()


def _score(arguments: argparse.Namespace) -> str:
    from acformer.benchmarks import score
    from acformer.benchmarks.score_text import score_text

    benchmark = _benchmark(arguments)
    answered = score.read_answered(benchmark, arguments.answers, arguments.truth, arguments.protocol)
    if arguments.submission:
        rows = score.write_submission(arguments.submission, answered)
        sys.stderr.write(f"{arguments.submission}: {rows:,} rows\n")
        if answered.benchmark.not_scored_because(answered.questions, answered.texts):
            return ""
    result = score.score_answers(answered)
    other = None
    if arguments.against:
        other = answered.read_others(arguments.against)
        result["against"] = {"answers": str(arguments.against), **score.compare(answered, other)}
    if arguments.per_question:
        score.write_questions(arguments.per_question, answered, other)
    return json.dumps(result, indent=1, ensure_ascii=False) if arguments.json else score_text(result)


def _benchmark(arguments: argparse.Namespace) -> Any:
    """A benchmark's name, or a data set or file of conversations as a benchmark."""
    from acformer.benchmarks import BENCHMARKS

    name = arguments.benchmark
    if name in BENCHMARKS.names() or not _is_data(name, BENCHMARKS.names()):
        return name
    from acformer.benchmarks.answers import read_answers
    from acformer.benchmarks.data_set import DataSetBenchmark

    return DataSetBenchmark(name, len(read_answers(arguments.answers)), arguments.truth)


def _is_data(name: str, benchmarks: Sequence[str]) -> bool:
    """Whether it names a data set or a path; `UsageError` for what is nearly a data set's name, and no benchmark's."""
    from acformer.data.datasets import DATASETS, named_dataset

    if name.partition(":")[0] in DATASETS.names() or "/" in name or Path(name).suffix or Path(name).exists():
        return True
    if not get_close_matches(name, benchmarks):
        named_dataset(name)
    return False
