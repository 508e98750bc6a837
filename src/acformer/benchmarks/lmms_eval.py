"""`lmms_eval --model acformer --model_args pretrained=FOLDER,num_image_tokens=65 --tasks ...`: our models in lmms-eval.

Answers are those of `acformer eval`, given the same prompt; lmms-eval writes its own prompts.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image, ImageFile
from tqdm import tqdm

from acformer.data.lengths import estimated_length
from acformer.data.samples import Sample
from acformer.errors import UsageError
from acformer.evaluate.generate import answer
from acformer.hf.build import parse_device, parse_dtype
from acformer.hf.checkpoints import load_model

MAX_NEW_TOKENS = 1024
"""Where a task does not say."""


class AcFormer(lmms):
    """A saved model, greedy, in batches of like length, with any number of images a question.

    Args:
        pretrained: a model folder, a run's folder or a hub name.
        num_image_tokens: visual tokens an image, where the connector can choose; by default the model's own.
        batch_size: questions at once.
        device: cpu, cuda, ...; by default this process's accelerator.
        dtype: auto (as saved), float32, bfloat16, float16.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        num_image_tokens: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval always passes it
        if unknown:
            raise UsageError(f"acformer knows no model_args {', '.join(unknown)}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = parse_device(device) if device and self._world_size == 1 else self.accelerator.device
        kind = dtype if dtype == "auto" else parse_dtype(dtype)
        self.model, self.processor = load_model(pretrained, dtype=kind, device=self.device)
        self.num_visual_tokens = num_image_tokens
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answer to each request, cut off where one of its `until` begins."""
        said: dict[int, str] = {}
        with tqdm(total=len(requests), desc="answer", unit="q", disable=self._rank > 0) as bar:
            for batch, options in self._batches(requests):
                new = int(options.get("max_new_tokens", MAX_NEW_TOKENS))
                samples = [self._sample(requests[place]) for place in batch]
                with whole_images():
                    answers = list(
                        answer(
                            self.model,
                            self.processor,
                            samples,
                            num_visual_tokens=self.num_visual_tokens,
                            batch_size=len(batch),
                            max_new_tokens=new,
                            progress=False,
                        )
                    )
                for place, text in zip(batch, answers, strict=True):
                    said[place] = cut(text, options.get("until"))
                    self.cache_hook.add_partial("generate_until", (requests[place].args[0], options), said[place])
                bar.update(len(batch))
        return [said[place] for place in range(len(requests))]

    def _batches(self, requests: Sequence[Instance]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Places of requests with the same options, of like length (by their text), the longest first."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True), []).append(place)
        for key, places in groups.items():
            options = json.loads(key)
            refuse_sampling(options)
            ordered = sorted(places, key=lambda place: -_length(requests[place]))
            for start in range(0, len(ordered), self.batch_size):
                yield ordered[start : start + self.batch_size], options

    def _sample(self, request: Instance) -> Sample:
        _, doc_to_messages, _, number, task, split = request.args
        asked = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][number]))
        images, videos, sounds = asked.extract_media()
        if videos or sounds:
            raise UsageError(f"task {task}: this model sees images and reads text, no video and no sound")
        messages = tuple({"role": one.role, "content": [_part(part) for part in one.content]} for one in asked.messages)
        sources: Any = tuple(map(_as_file, images))
        return Sample(f"{task} {number}", messages, sources)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """`UsageError`: this model answers in words."""
        raise UsageError("acformer answers in words: take a task whose output_type is generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """`UsageError`: rounds are not supported."""
        raise UsageError("acformer answers one question at a time: take a task whose output_type is generate_until")


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """What stands before the first of the `until`."""
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.partition(stop)[0] if stop else text
    return text.strip()


@contextmanager
def whole_images() -> Iterator[None]:
    """Without PIL's setting that shows damage as grey, which lmms-eval turns on when it is imported."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def refuse_sampling(options: dict[str, Any]) -> None:
    """`UsageError` for a task that does not want greedy answers."""
    if (options.get("temperature") or 0) > 0 or (options.get("num_beams") or 1) > 1:
        raise UsageError(f"acformer answers greedily, and the task wants {options}: add --gen_kwargs temperature=0")


def _length(request: Instance) -> int:
    return estimated_length(Sample("", ({"role": "user", "content": request.args[0]},)), 0)


def _part(part: Any) -> dict[str, str]:
    return {"type": "image"} if part.type == "image" else {"type": "text", "text": part.text}


def _as_file(image: Any) -> bytes | Path:
    """Pixels as a PNG, so that they enter as any image does."""
    if not isinstance(image, Image.Image):
        return Path(image)
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
