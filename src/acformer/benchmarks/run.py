"""A model's answers to a benchmark, written as they come: a run that was killed goes on where it was.

What is on disk while it runs are lines `{"number": ..., "id": ..., "prediction": ...}` of each process; at the end
`predictions.jsonl` in the order of the questions, and `scores.json`. Under torchrun processes share the questions.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from acformer.benchmarks import BENCHMARKS
from acformer.benchmarks.answers import Answer, Question
from acformer.benchmarks.benchmark import LLAVA, Benchmark
from acformer.benchmarks.hub import open_folder
from acformer.benchmarks.image_files import Source, find_images
from acformer.benchmarks.processes import Processes
from acformer.benchmarks.records import read_json
from acformer.benchmarks.score import Answered, score_answers
from acformer.data.lengths import estimated_length
from acformer.data.samples import Sample
from acformer.errors import DataError, ImageError
from acformer.evaluate.generate import answer
from acformer.files import locked, write_text
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.hf.public_names import as_recorded
from acformer.hf.publish import weights_fingerprint

Parts = tuple[AcFormerForConditionalGeneration, AcFormerProcessor]
Line = dict[str, Any]
SAME_LENGTH = 8
"""Prompts that differ by fewer tokens count as of one length, so that an image's questions stay together."""
NUM_TIMED = 5
"""Questions of which the time to the first token is measured."""


def evaluate_benchmark(
    parts: Parts,
    name: str,
    root: Path,
    out: Path,
    *,
    budgets: Sequence[int | None] = (None,),
    model_name: str = "",
    limit: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    protocol: str = LLAVA,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Answer a benchmark at each number of visual tokens, and score the answers.

    Args:
        root: the folder of its published files, images among them; or a data set of the hub, see `hub.open_folder`.
        out: answers and scores go to `OUT/NAME[-first-LIMIT]/TOKENS-tokens`. What is there is not answered again.
        budgets: numbers of visual tokens an image; None is the model's own.
        model_name: by which answers of another model are told apart from this one's.
        max_new_tokens: another number than the benchmark's.

    Returns:
        For each budget what `score_answers` gives and what the answers cost, see `Job.costs`; with `score` None where
        the right answers are not published. The first of several processes returns them, the others nothing.

    Raises:
        DataError: files or images that are missing; answers of another run in the folder.
        UsageError: a number of visual tokens that the connector cannot give.
    """
    benchmark, model_name = BENCHMARKS[name], as_recorded(model_name)
    folder = open_folder(root, images=True)
    questions = benchmark.questions(folder)[:limit]
    images = find_images(folder, questions)
    place = out / (name if limit is None else f"{name}-first-{limit}")
    results = []
    with Processes() as processes:
        for budget in budgets:
            job = Job(parts, benchmark, questions, images, budget, max_new_tokens or benchmark.max_new_tokens)
            path = place / f"{job.visual_tokens}-tokens"
            answers = job.run(path, model_name, batch_size, processes, progress)
            if processes.rank == 0:
                answered = Answered(benchmark, folder, questions, answers, protocol)
                result = {**_score(answered), "model": model_name, "limit": limit, **job.costs()}
                write_text(path / "scores.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
                results.append(result)
    return results


def _score(answered: Answered) -> dict[str, Any]:
    if reason := answered.benchmark.not_scored_because(answered.questions, answered.texts):
        return {"benchmark": answered.benchmark.name, "score": None, "reason": reason}
    return score_answers(answered)


@dataclass(frozen=True)
class Job:
    """A model that answers the questions at one number of visual tokens."""

    parts: Parts
    benchmark: Benchmark
    questions: Sequence[Question]
    images: Sequence[Source | None]
    budget: int | None
    max_new_tokens: int

    @property
    def visual_tokens(self) -> int:
        """An image."""
        return self.budget or self.parts[0].model.connector.num_tokens

    def run(self, path: Path, model_name: str, batch_size: int, processes: Processes, progress: bool) -> list[Answer]:
        """The answers in the order of the questions; nothing in processes but the first.

        Of two runs in one folder the second waits for the first.
        """
        with locked(path / ".lock") if processes.rank == 0 else nullcontext():
            return self._run(path, model_name, batch_size, processes, progress)

    def _run(self, path: Path, model_name: str, batch_size: int, processes: Processes, progress: bool) -> list[Answer]:
        if processes.rank == 0:
            self._claim(path, model_name)
            whole = (line for line in _read_lines(path).values() if "error" not in line)  # images may have been mended
            _write_lines(path / "answers.partial.jsonl", list(whole))
            for part in path.glob("answers.partial.*.jsonl"):
                part.unlink()
        processes.wait()
        done = {number for number, line in _read_lines(path).items() if "error" not in line}
        processes.wait()  # until all have read: what is left is the same to all
        left = self._in_batches([i for i in range(len(self.questions)) if i not in done], batch_size)
        mine = left[processes.rank :: processes.count]
        with (path / f"answers.partial.{processes.rank}.jsonl").open("w", encoding="utf-8") as file:
            hidden = not progress or processes.rank > 0
            total = len(done) + sum(map(len, mine))
            with tqdm(total=total, initial=len(done), desc="answer", unit="q", disable=hidden) as bar:
                for batch in mine:
                    file.write("".join(_as_text(line) for line in self._answer(batch)))
                    file.flush()
                    bar.update(len(batch))
        processes.wait()
        return self._finish(path) if processes.rank == 0 else []

    def _claim(self, path: Path, model_name: str) -> None:
        """Say what is answered here; `DataError` if it was something else."""
        asked = "\n".join(f"{question.id} {self.benchmark.prompt(question)}" for question in self.questions)
        settings = {
            "benchmark": self.benchmark.name,
            "model": model_name,
            "weights": weights_fingerprint(self.parts[0]),
            "visual_tokens": self.visual_tokens,
            "max_new_tokens": self.max_new_tokens,
            "dtype": str(self.parts[0].dtype),
            "questions": hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest(),
        }
        file = path / "settings.json"
        if file.exists():
            before = read_json(file)
            if other := [key for key, value in settings.items() if before.get(key) != value]:
                what = ", ".join(other)
                raise DataError(
                    f"{path} holds answers of another run ({what} differ): remove it, or name another --out"
                )
        write_text(file, json.dumps(settings, indent=1) + "\n")

    def _in_batches(self, numbers: list[int], batch_size: int) -> list[list[int]]:
        """Of like length, the longest first; within one length in the order of the questions."""
        placeholders = self.parts[1].count_placeholders(self.budget)
        lengths = {i: estimated_length(self._sample(i), placeholders) // SAME_LENGTH for i in numbers}
        ordered = sorted(numbers, key=lambda i: -lengths[i])
        return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]

    def _sample(self, number: int, *, opened: bool = False) -> Sample:
        """The question as a chat; only if `opened` with its image."""
        text = {"type": "text", "text": self.benchmark.prompt(self.questions[number])}
        image = self.images[number]
        content = [{"type": "image"}, text] if image is not None else [text]
        source: Any = image() if opened and callable(image) else image
        images = () if image is None else (source,)
        return Sample(self.questions[number].id, ({"role": "user", "content": content},), images)

    def _answer(self, numbers: Sequence[int]) -> Iterator[Line]:
        """A line for each; of a batch with an image that cannot be read, one by one."""
        try:
            said = self._say(numbers)
        except ImageError as error:
            if len(numbers) > 1:
                for number in numbers:
                    yield from self._answer([number])
            else:
                name = str(self.questions[numbers[0]].image)
                yield self._line(numbers[0], "", str(error).replace(str(self.images[numbers[0]]), name))
        else:
            for number, text in zip(numbers, said, strict=True):
                yield self._line(number, text)

    def _say(self, numbers: Sequence[int], max_new_tokens: int | None = None) -> list[str]:
        samples = [self._sample(number, opened=True) for number in numbers]
        said = answer(
            *self.parts,
            samples,
            num_visual_tokens=self.budget,
            batch_size=len(samples),
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            progress=False,
        )
        return list(said)

    def _line(self, number: int, text: str, error: str = "") -> Line:
        question = self.questions[number]
        line = {"number": number, "id": question.id, "image": question.image}
        line |= {"question": self.benchmark.prompt(question), "prediction": text}
        return {**line, "error": error} if error else line

    def _finish(self, path: Path) -> list[Answer]:
        lines = _read_lines(path)
        errors = [line["error"] for line in lines.values() if "error" in line]
        if errors and len(errors) == sum(image is not None for image in self.images):
            raise DataError(f"none of the images of {self.benchmark.name} could be read, the first: {errors[0]}")
        ordered = [lines[number] for number in range(len(self.questions))]
        _write_lines(path / "predictions.jsonl", ordered)
        for part in path.glob("answers.partial*.jsonl"):
            part.unlink()
        return [
            Answer(line["id"], None if "error" in line else line["prediction"], line["question"]) for line in ordered
        ]

    def costs(self) -> dict[str, Any]:
        """Connector, visual tokens of an image and the encoder's own, time to the first token, size of the KV cache."""
        model, processor = self.parts
        config = model.config.text_config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        a_token = 2 * config.num_hidden_layers * heads * head * model.dtype.itemsize
        return {
            "connector": model.config.connector,
            "visual_tokens": self.visual_tokens,
            "vision_tokens": model.config.num_vision_tokens,
            "first_token_ms": self._first_token_ms(),
            "kv_bytes_image": a_token * processor.count_placeholders(self.budget),
        }

    def _first_token_ms(self) -> float | None:
        """The median over a few questions, one at a time: image, prompt, one token; the first warms up."""
        times = []
        for number in [i for i, image in enumerate(self.images) if image is not None][: NUM_TIMED + 1]:
            started = time.perf_counter()
            try:
                self._say([number], max_new_tokens=1)
            except ImageError:
                continue
            times.append(1000 * (time.perf_counter() - started))
        return round(statistics.median(times[1:]), 1) if len(times) > 1 else None


def _read_lines(path: Path) -> dict[int, Line]:
    """By number, what has been answered in a folder; what a killed process wrote half is not there."""
    found: dict[int, Line] = {}
    whole = path / "predictions.jsonl"
    for file in [*path.glob("answers.partial*.jsonl"), *([whole] if whole.exists() else [])]:
        for text in file.read_bytes().split(b"\n")[:-1]:  # a line without its end is not whole
            line = json.loads(text)
            found.setdefault(line["number"], line)
    return found


def _write_lines(file: Path, lines: Iterable[Line]) -> None:
    write_text(file, "".join(map(_as_text, lines)))


def _as_text(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
