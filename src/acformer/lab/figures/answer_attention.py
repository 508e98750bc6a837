"""Where the language model looks while it answers, patch by patch, and how much of that is anchors (Fig. 5)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from acformer.data.conversation import encode_prompt
from acformer.errors import UsageError
from acformer.evaluate.generate import decode, generation_options
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.images import ImageSource, load_image
from acformer.viz.find import Anchors, anchors_of
from acformer.viz.sources import token_sources


@dataclass(frozen=True, eq=False)
class AnswerAttention:
    """An answer, and where its words looked.

    layers: the M middle layers, from 1, of num_layers. maps: (M, N) share of each patch in what a layer reads of the
    image; a row and `prefix`, what the [CLS] and register tokens get, sum to 1. image_share: (M,) how much of the
    attention goes to the image at all. uniform: (N,) a row of `maps`, if all visual tokens were read alike.
    """

    question: str
    answer: str
    image: Image.Image
    anchors: Anchors
    num_tokens: int
    layers: tuple[int, ...]
    num_layers: int
    maps: Float[Tensor, "M N"]
    image_share: Float[Tensor, "M"]
    uniform: Float[Tensor, "N"]

    @property
    def mean_map(self) -> Float[Tensor, "N"]:
        """The mean of the layers' maps."""
        return self.maps.mean(dim=0)

    def overlap(self) -> dict[str, float]:
        """How much of what is read lies on the anchors.

        on_anchors: share of the anchors in the patches' part of `mean_map`. alike: the same of `uniform`, which is the
        connector's doing and no choice of the language model. chance: the anchors' share of the area. most_read: share
        of the most-read patches, as many as there are anchors, that are anchors; its chance level is the same.
        """
        indices = list(self.anchors.indices)
        most_read = set(self.mean_map.topk(len(indices)).indices.tolist())
        return {
            "on_anchors": float(self.mean_map[indices].sum() / self.mean_map.sum()),
            "alike": float(self.uniform[indices].sum() / self.uniform.sum()),
            "chance": len(indices) / len(self.mean_map),
            "most_read": len(most_read & set(indices)) / len(indices),
        }

    def record(self) -> dict[str, Any]:
        """All figures as JSON takes them."""
        return {
            "question": self.question,
            "answer": self.answer,
            "num_image_tokens": self.num_tokens,
            "grid": self.anchors.grid,
            "anchors": self.anchors.indices,
            "layers": self.layers,
            "num_layers": self.num_layers,
            "image_share_by_layer": self.image_share.tolist(),
            "prefix_share": float(1 - self.mean_map.sum()),
            "overlap": self.overlap(),
            "read": self.mean_map.tolist(),
        }


def attend_to_answer(
    model: AcFormerForConditionalGeneration,
    processor: AcFormerProcessor,
    image: ImageSource,
    question: str,
    *,
    num_visual_tokens: int | None = None,
    num_anchors: int | None = None,
    max_new_tokens: int = 32,
) -> AnswerAttention:
    """Let the model answer, then see where the answer's words looked.

    With a_mt the attention from the positions that an answer's words were predicted from to visual token t in layer m
    (mean over words and heads) and S the connector's `token_sources`, the map of layer m is (a_m / sum_t a_mt) S.

    Args:
        model, processor: as `load_model` gives them.
        image, question: as for `ask`.
        num_visual_tokens: another T than the model's own, where its connector is elastic.
        num_anchors: by default a patch in nine, the paper's 64 of 576.
        max_new_tokens: the longest answer.

    Raises:
        UsageError: no image tokens in the sequence (a fusion other than `concat`), a connector that cannot be mapped
            back, an encoder without anchors, an answer without a word.
        ImageError: an image that cannot be read.
    """
    if model.config.fusion != "concat":
        raise UsageError(f"what an answer reads can be shown for fusion concat alone, not for {model.config.fusion}")
    loaded = load_image(image)
    pixels = processor.image_processor(loaded, return_tensors="pt")["pixel_values"].to(model.device)
    with torch.inference_mode():
        features = model.get_vision_features(pixels)
    images = {"vision_features": features, "num_visual_tokens": num_visual_tokens}
    prompt, answer = _answer(model, processor, question, images, max_new_tokens)
    special = torch.tensor(processor.tokenizer.all_special_ids, device=answer.device)
    words = (~torch.isin(answer, special)).nonzero()[:, 0] + len(prompt)
    if not len(words):
        raise UsageError(f"the model answers {question!r} without a word, so there is nothing to show")
    attention = _attention(model, torch.cat([prompt, answer])[: int(words[-1])], images)  # (M, L, L)
    image_places = (prompt == model.config.image_token_id).nonzero()[:, 0]
    on_image = attention[:, words - 1][..., image_places].mean(dim=1)  # (M, T): a word is predicted one place before it
    share = on_image.sum(dim=1)
    sources = token_sources(model.model.connector, features, num_visual_tokens).to(on_image)
    sources = sources[:, features.num_prefix_tokens :]  # (T, N)
    num_layers = model.config.text_config.num_hidden_layers
    return AnswerAttention(
        question=question,
        answer=decode(processor, answer.unsqueeze(0))[0],
        image=loaded,
        anchors=anchors_of(features, num_anchors),
        num_tokens=len(image_places),
        layers=tuple(layer + 1 for layer in middle(num_layers)),
        num_layers=num_layers,
        maps=(on_image / share.unsqueeze(1) @ sources).cpu(),
        image_share=share.cpu(),
        uniform=sources.mean(dim=0).cpu(),
    )


def _answer(
    model: AcFormerForConditionalGeneration,
    processor: AcFormerProcessor,
    question: str,
    images: dict[str, Any],
    max_new_tokens: int,
) -> tuple[Int[Tensor, "L"], Int[Tensor, "W"]]:
    """The ids of the prompt and of the answer, which holds no image token."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    placeholders = processor.count_placeholders(images["num_visual_tokens"])
    prompt = torch.tensor(encode_prompt(processor, messages, num_placeholders=placeholders), device=model.device)
    options = generation_options(processor, max_new_tokens) | {"suppress_tokens": [model.config.image_token_id]}
    with torch.inference_mode():
        ids = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **images, **options)[0]
    return prompt, ids[len(prompt) :]


def middle(num_layers: int) -> range:
    """Places of the middle third of the layers, from 0: 10..21 of 32, 10..19 of 30."""
    return range(num_layers // 3, -(-2 * num_layers // 3))


def _attention(model: AcFormerForConditionalGeneration, ids: Tensor, images: dict[str, Any]) -> Float[Tensor, "M L L"]:
    """The middle layers' attention over these ids, mean over heads, in float32."""
    with torch.inference_mode(), _eager(model.model.language_model):
        output = model.model(input_ids=ids.unsqueeze(0), output_attentions=True, **images)
    maps: Sequence[Tensor] = output.attentions or ()
    if len(maps) != model.config.text_config.num_hidden_layers:
        raise UsageError(f"{type(model.model.language_model).__name__} does not give its layers' attention")
    return torch.stack([maps[layer][0].float().mean(dim=0) for layer in middle(len(maps))])


@contextmanager
def _eager(language_model: Any) -> Iterator[None]:
    """For this pass alone the attention that gives its weights; the fused kernels do not."""
    kernel = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(kernel)
