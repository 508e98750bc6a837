"""A model that answers about an image which is already encoded, and what each answer cost: one measurement each."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import BaseStreamer

from acformer.connectors.queries import SelectedQueries
from acformer.connectors.resampler import QueryConnector
from acformer.data.conversation import encode_prompt
from acformer.errors import UsageError
from acformer.evaluate.generate import decode, generation_options
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.lab.bench.roofline import kv_bytes
from acformer.lab.demo.encoded_image import EncodedImage, ImageEncoder, now
from acformer.lab.demo.pins import Pins, apply_pins


@dataclass(frozen=True)
class Answer:
    """What a model answered, from how many visual tokens, and at what cost.

    encoder, connector, prefill, language_model: seconds; prefill is the language model's up to its first token, a part
    of language_model. kv_bytes: keys and values that the language model holds at the end; image_kv_bytes: those of
    the image.
    """

    model: str
    question: str
    text: str
    num_tokens: int
    pins: Pins
    encoder: float
    connector: float
    prefill: float
    language_model: float
    kv_bytes: int
    image_kv_bytes: int

    @property
    def first_token(self) -> float:
        """Seconds from pixels to the first token of the answer."""
        return self.encoder + self.connector + self.prefill


class DemoModel:
    """A model and its processor on the page.

    name: what the page calls it. selector: of the patches that are its connector's queries, "" where they are none.
    num_others: visual tokens that it has beside the anchors, so T = anchors + num_others.
    """

    def __init__(self, name: str, model: AcFormerForConditionalGeneration, processor: AcFormerProcessor):
        self.name, self.model, self.processor = name, model, processor
        weight = next(model.parameters())
        self.image_encoder = ImageEncoder(model.get_vision_features, processor.image_processor, weight)
        self.connector = model.model.connector
        queries = self.connector.queries if isinstance(self.connector, QueryConnector) else None
        self.selector, self.num_others = "", min(1, model.config.geometry.num_prefix_tokens)
        if isinstance(queries, SelectedQueries):
            self.selector = queries.selector
            self.num_others = queries.num_cls + queries.num_fused

    def budget(self, num_tokens: int) -> int:
        """T for a wish: the wish, where the connector is elastic; else its own."""
        return num_tokens if self.connector.elastic else self.connector.num_tokens

    def answer(
        self, encoded: EncodedImage, question: str, num_tokens: int, pins: Pins, max_new_tokens: int = 64
    ) -> Answer:
        """Greedy, of `budget(num_tokens)` visual tokens. `UsageError`: the connector cannot give so many."""
        device, budget = self.model.device, self.budget(num_tokens)
        features = apply_pins(encoded.features, pins)
        ids = torch.tensor([self._prompt(question, budget)], device=device)
        clock = FirstToken(device)
        with torch.inference_mode():
            begun = now(device)
            image = self.model.get_image_features(vision_features=features, num_visual_tokens=budget)
            connected = now(device)
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                mm_encoder_outputs={"image": image},
                streamer=clock,
                **generation_options(self.processor, max_new_tokens),
            )
            ended = now(device)
        new = output[:, ids.shape[1] :]
        text, dtype = self.model.config.text_config, self.model.model.language_model.dtype
        return Answer(
            model=self.name,
            question=question,
            text=decode(self.processor, new)[0],
            num_tokens=budget,
            pins=pins,
            encoder=encoded.seconds,
            connector=connected - begun,
            prefill=clock.first - connected,
            language_model=ended - connected,
            kv_bytes=kv_bytes(text, output.shape[1] - 1, dtype),  # the last token is not fed back
            image_kv_bytes=kv_bytes(text, self.processor.count_placeholders(budget), dtype),
        )

    def _prompt(self, question: str, num_tokens: int) -> list[int]:
        if not question.strip():
            raise UsageError("there is no question: type one, or take an example")
        content = [{"type": "image"}, {"type": "text", "text": question.strip()}]
        placeholders = self.processor.count_placeholders(num_tokens)
        return encode_prompt(self.processor, [{"role": "user", "content": content}], num_placeholders=placeholders)


class FirstToken(BaseStreamer):
    """Remembers when `generate` had its first token; `put` is called with the prompt before that."""

    def __init__(self, device: torch.device):
        self.device = device
        self.first = 0.0
        self.is_prompt = True

    def put(self, value: Any) -> None:
        """The prompt, then token by token."""
        if not self.is_prompt and not self.first:
            self.first = now(self.device)
        self.is_prompt = False

    def end(self) -> None:
        """Nothing is left to do."""
