"""`AcFormerConfig`: the architecture, saved with the weights. How it was trained is a `Recipe`'s business."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from acformer.connectors import CONNECTORS, Connector, Geometry, build_connector, complete_options
from acformer.errors import UsageError
from acformer.hf.auto_map import AUTO_MAP
from acformer.hf.budgets import runs
from acformer.hf.fusion import FUSIONS
from acformer.hf.public_names import public_name
from acformer.hf.publish import Published
from acformer.registry import check_value
from acformer.untrusted import check_config
from acformer.vision.families import image_size, num_prefix_tokens, patch_grid

FIELD_TYPES = {
    "vision_config": dict | PreTrainedConfig | None,
    "text_config": dict | PreTrainedConfig | None,
    "connector": str,
    "connector_kwargs": dict | None,
    "fusion": str,
    "fusion_kwargs": dict | None,
    "feature_layer": int,
    "image_size": int | None,
}
"""What the fields of a config may be when they are given."""
PLAIN = (bool, int, float, str, list, dict)
"""Defaults that JSON can hold; others, of a connector of somebody else's, are left to it."""


class AcFormerConfig(Published, PreTrainedConfig):
    """Image encoder + connector + language model.

    vision_config, text_config: configs (or their dicts) of the two Hugging Face models; default CLIP and Llama.
    connector, connector_kwargs: a name from `list_connectors()` and its options.
    fusion, fusion_kwargs: how its tokens reach the language model (`concat`, `gated_cross_attention`), and options.
    feature_layer: index into the encoder's `hidden_states`; blocks after it are not built (paper: -2).
    image_size: pixels a side that the encoder is fed; default the encoder's own.
    image_token_id: the placeholder that the language model's vocabulary holds for an image token.
    """

    model_type = "acformer"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 (transformers' own form)

    vision_config: Any = None
    text_config: Any = None
    connector: str = "acformer"
    connector_kwargs: Any = None
    fusion: str = "concat"
    fusion_kwargs: Any = None
    feature_layer: int = -2
    image_size: Any = None
    image_token_id: int = 32000
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        parts = {"vision_config": self.vision_config, "text_config": self.text_config}
        check_config({**parts, "connector_kwargs": self.connector_kwargs, **kwargs})
        for name, hint in FIELD_TYPES.items():
            check_value(f"config field {name}", hint, getattr(self, name))
        self.vision_config = _sub_config(self.vision_config, "clip_vision_model")
        self.text_config = _sub_config(self.text_config, "llama")
        self.connector_kwargs = dict(self.connector_kwargs or {})
        self.fusion_kwargs = dict(self.fusion_kwargs or {})
        self.image_size = self.image_size or image_size(self.vision_config)
        super().__post_init__(**kwargs)
        # The head belongs to the language model: its config alone says whether it shares the embeddings.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.auto_map = dict(AUTO_MAP)  # whatever code a folder names as its own

    def to_dict(self) -> dict[str, Any]:
        """As transformers', without the folders from which encoder and language model were read.

        With every option of the connector, so that a saved model stays what it is when a default changes.
        """
        values = super().to_dict()
        with suppress(UsageError):  # an unknown connector is refused where it is built
            options = complete_options(self.connector, self.connector_kwargs)
            given = self.connector_kwargs.keys()
            kept = {k: v for k, v in options.items() if k in given or v is None or isinstance(v, PLAIN)}
            values["connector_kwargs"] = kept
        for part in filter(lambda part: isinstance(part, dict), map(values.get, self.sub_configs)):
            part["_name_or_path"] = public_name(part.get("_name_or_path"))
        return values

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'. An option that the dict does not name is what it was by default when such were saved."""
        with suppress(UsageError):
            former = CONNECTORS[config_dict.get("connector", cls.connector)].former_defaults
            options = config_dict.get("connector_kwargs")
            if former and isinstance(options, Mapping):
                config_dict = {**config_dict, "connector_kwargs": {**former, **options}}
        return super().from_dict(config_dict, **kwargs)

    @property
    def geometry(self) -> Geometry:
        """The sizes between which the connector stands."""
        return Geometry(
            vision_hidden_size=self.vision_config.hidden_size,
            text_hidden_size=self.text_config.hidden_size,
            grid=patch_grid(self.vision_config, self.image_size, self.image_size),
            num_prefix_tokens=num_prefix_tokens(self.vision_config),
        )

    @property
    def num_placeholders(self) -> int:
        """What one image costs in the prompt: the connector's T under `concat`, 1 under `gated_cross_attention`."""
        return FUSIONS[self.fusion].count_placeholders(self.build_connector().num_tokens)

    @property
    def budgets(self) -> list[tuple[int, int]]:
        """The numbers of visual tokens that its connector can give, as runs (first, last)."""
        return runs(self.build_connector().budgets)

    @property
    def num_vision_tokens(self) -> int:
        """P + N: what the encoder gives, of which T remain."""
        h, w = self.build_connector().input_grid
        return self.geometry.num_prefix_tokens + h * w

    def build_connector(self) -> Connector:
        """The connector without its memory: to ask it what it is and gives."""
        with torch.device("meta"):
            return build_connector(self.connector, self.geometry, **self.connector_kwargs)


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens that a prompt and its answer may have, image tokens included; None where there is no such limit.

    config: of a whole model or of a language model. Rotary positions that are scaled count as far as they reach.
    """
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    reach = [longest]
    for one in (scaling, *scaling.values()):
        if isinstance(one, Mapping) and isinstance(one.get("factor"), int | float):
            reach.append(int((one.get("original_max_position_embeddings") or longest) * one["factor"]))
    return max(reach)


def _sub_config(config: dict | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(config or {})
    return CONFIG_MAPPING[config.pop("model_type", default)](**config)
