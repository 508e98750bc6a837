"""transformers' own server (`transformers serve`) around a model of ours, behind the gate.

Its application, its handler of chats and its thread of inference are used as they are. What is ours: the model is
loaded strictly and once, under the name that it is served by; inputs are what the gate has prepared; a client that
hung up ends its generation at the next token; an error of the model is one sentence.
"""

import inspect
import logging
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState, _GenerationCancelled

from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.serving.gate import FAILED, GONE, PLACE, Gate, Place, Service
from acformer.serving.prepare import Preparation
from acformer.serving.request import ChatRequest, Limits

logger = logging.getLogger("acformer")


class GoneError(Exception):
    """The client has hung up."""


class Handler(ChatCompletionHandler):
    """transformers' handler of chats, for requests that the gate has checked and prepared."""

    def __init__(self, model: AcFormerForConditionalGeneration, processor: AcFormerProcessor, name: str, state: Any):
        super().__init__(model_manager=None, generation_state=state)
        self.model, self.processor, self.name = model, processor, name

    async def handle_request(self, body: dict, request_id: str) -> Any:
        """Stream or answer the chat in whose context it is called."""
        request = PLACE.get().request
        inputs = {key: self._moved(value) for key, value in request.inputs.items()}
        request.inputs = None
        config = self._generation_config(request)
        manager = self.generation_state.get_manager(self.name)
        parts = request_id, self.model, self.processor, self.name, inputs, config
        if request.stream:
            return self._streaming(*parts, gen_manager=manager)
        return await self._non_streaming(*parts, gen_manager=manager)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)

    def _generation_config(self, request: ChatRequest) -> GenerationConfig:
        """Greedy, unless a temperature above 0 is asked for."""
        config = self._build_generation_config(request.options, self.model.generation_config)
        config.max_new_tokens = request.max_new_tokens
        config.do_sample = bool(request.options.get("temperature"))
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        return config


class WatchedModel:
    """The model, for one chat: its `generate` stops when the client is gone, and does not say what went wrong."""

    def __init__(self, model: AcFormerForConditionalGeneration, processor: AcFormerProcessor, place: Place):
        self._model, self._processor, self._place = model, processor, place

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> torch.Tensor:
        """As the model's; `GoneError` where nobody waits any more."""
        if self._place.gone.is_set():
            raise GoneError
        kwargs["tokenizer"] = self._processor.tokenizer  # the server gives the processor, which finds no stop strings
        try:
            said = self._model.generate(**kwargs, stopping_criteria=StoppingCriteriaList([WhenGone(self._place)]))
        except _GenerationCancelled:
            raise
        except Exception as error:
            logger.exception("the model failed")
            raise RuntimeError(FAILED) from error
        if self._place.gone.is_set():
            raise GoneError
        return said


class WhenGone(StoppingCriteria):
    """Ends a generation for which nobody waits."""

    def __init__(self, place: Place):
        self.place = place

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B,) bool."""
        return torch.full((len(input_ids),), self.place.gone.is_set(), device=input_ids.device)


class Manager(GenerateManager):
    """transformers' one thread of inference, first come, first served."""

    def generate_streaming(self, model: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers'."""
        return super().generate_streaming(WatchedModel(model, processor, PLACE.get()), processor, *args, **kwargs)

    async def generate_non_streaming(self, model: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers'."""
        watched = WatchedModel(model, processor, PLACE.get())
        return await super().generate_non_streaming(watched, processor, *args, **kwargs)


class State(GenerationState):
    """The one manager; continuous batching, which transformers has for text alone, is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = Manager()

    def get_manager(self, model_id: str, use_cb: bool = False) -> Manager:
        """The one there is."""
        return self.manager


class WithDone:
    """ASGI middleware: a stream ends with `data: [DONE]`, as OpenAI's do and transformers' does not."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """One request."""
        streams = False

        async def sent(message: dict) -> None:
            nonlocal streams
            if message["type"] == "http.response.start":
                streams = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            elif streams and not message.get("more_body"):
                message = {**message, "body": message.get("body", b"") + b"data: [DONE]\n\n"}
            await send(message)

        await self.app(scope, receive, sent)


def build_app(
    model: AcFormerForConditionalGeneration,
    processor: AcFormerProcessor,
    name: str,
    limits: Limits,
    key: str | None = None,
    host: str = "localhost",
) -> Gate:
    """The application to serve; `gate.waiting` says how many chats are inside."""
    from fastapi.responses import JSONResponse

    state = State()
    handler = Handler(model, processor, name, state)
    others = [name for name in inspect.signature(build_server).parameters if name.endswith("_handler")]
    handlers = {**dict.fromkeys(others), "chat_handler": handler}  # the gate lets no one through to the others
    app = build_server(ModelManager(), **handlers, generation_state=state)
    app.add_exception_handler(GoneError, lambda request, error: JSONResponse({}, status_code=GONE))
    rewrite = Preparation(model, processor, limits)
    return Gate(WithDone(app), Service(name, processor.sizes, rewrite, limits, processor.num_image_tokens, key, host))
