"""Models and processors of a few thousand weights, random but the same in every process and every run.

16 x 16 pixels, 4 x 4 patches, an encoder and a language model of two blocks each. What can be shared is made once;
models are built anew for every caller, since tests write to them.
"""

import copy
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    BatchFeature,
    LlavaImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from acformer.connectors import connector_options, list_connectors
from acformer.data.templates import TEMPLATES
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.hf.build import train_tokenizer
from acformer.vision import families

IMAGE_SIZE = 16
SIZES = {
    "num_anchors": 4,
    "num_queries": 5,
    "num_tokens": 4,
    "kernel": [2, 4],
    "scale": 2,
    "hidden_layers": [1],
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "head_dim": 8,
    "num_points": 2,
}
DEEPER = {"q_former": {"depth": 2}}  # its second layer is the first without cross-attention


def small_options(connector: str) -> dict[str, Any]:
    """Options of a connector that make it small; of whatever is in the registry."""
    known = connector_options(connector)
    return {key: value for key, value in {**SIZES, **DEEPER.get(connector, {})}.items() if key in known}


CONNECTORS: dict[str, dict[str, Any]] = {name: small_options(name) for name in list_connectors()}
# An older transformers may lack some.
ENCODERS = [n for n in families.ENCODERS if n in CONFIG_MAPPING and CONFIG_MAPPING[n] in AutoModel._model_mapping]
WITH_ROW = [name for name in ENCODERS if families.ENCODERS[name].prefix or families.ENCODERS[name].probe]
OF_ANY_SIZE = [name for name in ENCODERS if families.ENCODERS[name].inputs is not families.own_size]


def mostly_slow(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases of a test whose every case takes long: all marked `slow` but those that the default run keeps."""
    cases = list(cases)
    assert all(case in cases for case in quick), f"not all of {quick} are among {cases}"
    return [
        case if case in quick else pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow)
        for case in cases
    ]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["A chat between a user and an assistant. USER: ASSISTANT: red green blue"], 300)


def processor(num_placeholders: int = 5, image_size: int = IMAGE_SIZE, **kwargs: Any) -> AcFormerProcessor:
    size = {"height": image_size, "width": image_size}
    image_processor = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": image_size}, crop_size=size)
    kwargs.setdefault("chat_template", TEMPLATES["vicuna_v1"])
    return AcFormerProcessor(image_processor, copy.deepcopy(tokenizer()), num_placeholders=num_placeholders, **kwargs)


def vision_config(family: str, **fields: Any) -> PreTrainedConfig:
    """A vision config of that `model_type`, with those of the fields that it has."""
    config_class = CONFIG_MAPPING[family]
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map}
    side = fields["image_size"]
    positions = {"num_patches": (side // fields["patch_size"]) ** 2, "max_img_size": 4 * side}  # SigLIP 2's and RADIO's
    fields = {**positions, **fields}
    return config_class(**{name: value for name, value in fields.items() if name in known})


def config(connector: str = "acformer", vision: str = "clip_vision_model", **kwargs: Any) -> AcFormerConfig:
    """CLIP, `acformer` with 4 anchors and [CLS] (T = 5) and Llama, unless told otherwise."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tower = vision_config(vision, **sizes, image_size=IMAGE_SIZE, patch_size=4)
    special = {f"{name}_token_id": getattr(tokenizer(), f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = CONFIG_MAPPING["llama"](
        **sizes, num_key_value_heads=2, vocab_size=len(tokenizer()), max_position_embeddings=1024, **special
    )
    kwargs.setdefault("connector_kwargs", small_options(connector))
    image_token_id = tokenizer().convert_tokens_to_ids("<image>")
    return AcFormerConfig(
        vision_config=tower, text_config=text, connector=connector, image_token_id=image_token_id, **kwargs
    )


def model(connector: str = "acformer", *, seed: int = 0, **kwargs: Any) -> AcFormerForConditionalGeneration:
    """In eval mode, with weights large enough that a picture changes what is said and greedy choices do not tie."""
    torch.manual_seed(seed)
    model = AcFormerForConditionalGeneration(config(connector, **kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


def inputs(texts: str | list[str], images: Any = None, *, num_visual_tokens: int = 5, **kwargs: Any) -> BatchFeature:
    """As from `processor`, tensors, padded."""
    return processor(num_visual_tokens)(images, texts, return_tensors="pt", padding=True, **kwargs)


def picture(seed: int = 0, size: tuple[int, int] = (20, 14)) -> Image.Image:
    """A picture of noise, wider than high."""
    pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


def pictures(seeds: Sequence[int]) -> list[Image.Image]:
    return [picture(seed) for seed in seeds]
