"""`AcFormerConfig`: the architecture, saved with the weights. How it was trained is a `Recipe`'s business."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from acformer.connectors import Connector, Geometry, build_connector
from acformer.errors import UsageError
from acformer.hf.fusion import fusion_class
from acformer.vision.encoder import patch_grid
from acformer.vision.families import num_prefix_tokens

KINDS: dict[str, tuple[type, ...]] = {
    "vision_config": (dict, PreTrainedConfig),
    "text_config": (dict, PreTrainedConfig),
    "connector_kwargs": (dict,),
    "fusion_kwargs": (dict,),
    "feature_layer": (int,),
    "image_size": (int,),
}
"""What the fields of a config may be; those without a default of their own may be None, too."""


class AcFormerConfig(PreTrainedConfig):
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
        for name, kinds in KINDS.items():
            if not isinstance(value := getattr(self, name), (*kinds, type(None))):
                raise UsageError(f"config field {name} must be {kinds[0].__name__}, got {value!r}")
        self.vision_config = _sub_config(self.vision_config, "clip_vision_model")
        self.text_config = _sub_config(self.text_config, "llama")
        self.connector_kwargs = dict(self.connector_kwargs or {})
        self.fusion_kwargs = dict(self.fusion_kwargs or {})
        self.image_size = self.image_size or self.vision_config.image_size
        super().__post_init__(**kwargs)
        # The head belongs to the language model: its config alone says whether it shares the embeddings.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

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
        return fusion_class(self.fusion).count_placeholders(self._connector().num_tokens)

    @property
    def num_vision_tokens(self) -> int:
        """P + N: what the encoder gives, of which T remain."""
        h, w = self._connector().input_grid
        return self.geometry.num_prefix_tokens + h * w

    def _connector(self) -> Connector:
        """The connector without its memory."""
        with torch.device("meta"):
            return build_connector(self.connector, self.geometry, **self.connector_kwargs)


def _sub_config(config: dict | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(config or {})
    return CONFIG_MAPPING[config.pop("model_type", default)](**config)
