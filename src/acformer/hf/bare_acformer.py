"""`AcFormerModel`: image encoder -> connector -> fusion -> language model without its head (eq. 2, 3 and 6).

Not LLaVA's: the connector, the encoder's end at the feature layer, visual tokens that may stand beside the text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import torch_compilable_check
from transformers.utils.generic import can_return_tuple

from acformer.cls_attention import ClsAttentionTap
from acformer.connectors import build_connector
from acformer.fusion import build_fusion
from acformer.hf.configuration_acformer import AcFormerConfig
from acformer.hf.outputs_acformer import AcFormerModelOutput
from acformer.hf.pretrained_acformer import AcFormerPreTrainedModel
from acformer.vision import VisionFeatures, features_from_tap, level_blocks, resized, size_kwargs, truncate


class AcFormerModel(AcFormerPreTrainedModel):
    """Image encoder, connector, fusion and language model without its head."""

    keys_left_out = {"lm_head.weight"}  # noqa: RUF012 (as transformers' own class attributes)

    def __init__(self, config: AcFormerConfig):
        super().__init__(config)
        self.vision_tower = truncate(AutoModel.from_config(config.vision_config), config.feature_layer)
        self.connector = build_connector(config.connector, config.geometry, **config.connector_kwargs)
        self.language_model = AutoModel.from_config(config.text_config)
        self.fusion = build_fusion(config.fusion, self.language_model, **config.fusion_kwargs)
        levels = level_blocks(config.vision_config, self.connector.levels, config.feature_layer)
        self.cls_attention_tap = ClsAttentionTap(self.vision_tower, levels)
        self.post_init()

    def get_vision_features(self, pixel_values: Tensor) -> VisionFeatures:
        """(images, 3, Y, X) pixels -> what the encoder knows: tokens, [CLS] attention, grid, the connector's levels.

        The images are resized first where the connector wants another grid of patches (`Connector.input_grid`).
        """
        return self._encode(pixel_values)[1]

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        vision_features: VisionFeatures | Mapping | None = None,
        num_image_tokens: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """The encoder's output, with the visual tokens in `pooler_output`: a list of one (T, E) per image.

        Args:
            pixel_values: (images, 3, Y, X).
            vision_features: instead of pixels, what `get_vision_features` gave, or a dict: tokens (U, P+N, D),
                cls_attention (U, H, N), levels (U, K, P+N, D) and, where prompts share pictures, image_index
                (images,) into the U.
            num_image_tokens: another T than the connector's own, where it is elastic.
        """
        if vision_features is not None:
            features = self.as_features(vision_features)
            output = BaseModelOutputWithPooling(last_hidden_state=features.tokens)
        elif pixel_values is not None:
            output, features = self._encode(pixel_values, **kwargs)
        else:
            raise ValueError("give pixel_values or vision_features")
        tokens = self.connector(features, num_image_tokens)
        if isinstance(vision_features, Mapping) and "image_index" in vision_features:
            tokens = tokens[vision_features["image_index"]]
        output.pooler_output = list(tokens)
        return output

    def _encode(self, pixel_values: Any, **kwargs: Any) -> tuple[BaseModelOutputWithPooling, VisionFeatures]:
        if self.connector.input_grid != self.connector.geometry.grid:
            pixel_values = resized(pixel_values, self.vision_tower.config, self.connector.input_grid)
        kwargs = {**kwargs, **size_kwargs(self.vision_tower.config, pixel_values), "return_dict": True}
        learns = pixel_values.requires_grad or any(p.requires_grad for p in self.vision_tower.parameters())
        # No graph of a frozen encoder, also where `enable_input_require_grads` would start one in its embeddings. Not
        # inference_mode, whose tensors the connector could not save for its backward pass without a copy.
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            output = self.vision_tower(pixel_values, **kwargs)
        return output, features_from_tap(self.cls_attention_tap, self.vision_tower.config, pixel_values)

    def as_features(self, features: VisionFeatures | Mapping) -> VisionFeatures:
        """Features, also cached ones (a dict: tokens, cls_attention, levels), on the model's device in its dtype."""
        if isinstance(features, Mapping):
            grid, prefix = self.connector.input_grid, self.connector.geometry.num_prefix_tokens
            row, levels = features.get("cls_attention"), features.get("levels")
            features = VisionFeatures(features["tokens"], row, grid, prefix, levels)
        row, levels = features.cls_attention, features.levels
        return features._replace(
            tokens=features.tokens.to(self.device, self.dtype),
            cls_attention=None if row is None else row.to(self.device),  # in its own dtype: rounded scores would tie
            levels=None if levels is None else levels.to(self.device, self.dtype),
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        vision_features: VisionFeatures | Mapping | None = None,
        num_image_tokens: int | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cross_attention_states: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> AcFormerModelOutput:
        """Images to visual tokens, then the language model with these in its sequence or beside it (see `fusion`).

        cross_attention_states, cross_attention_mask: what `images_by_row` gave, for a fusion that reads the images at
        every step, in place of the images.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_output = (mm_encoder_outputs or {}).get("image")
        if image_output is None and (pixel_values is not None or vision_features is not None):
            image_output = self.get_image_features(pixel_values, vision_features, num_image_tokens)
        places, images = None, {}
        if image_output is not None:
            places = self.image_places(input_ids, inputs_embeds)
            images = self._gather(places, image_output.pooler_output)
        elif cross_attention_states is not None and cross_attention_mask is not None:
            places = self.image_places(input_ids, inputs_embeds)
            images = {
                "cross_attention_states": cross_attention_states,
                "cross_attention_mask": cross_attention_mask,
            }
        elif self.training:
            inputs_embeds = inputs_embeds + (self.connector.at_rest() + self.fusion.at_rest()).to(inputs_embeds)
        inputs_embeds, told = self.fusion(inputs_embeds, places, **images)
        output = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **told,
            **kwargs,
        )
        image_tokens = None if image_output is None else torch.cat(list(image_output.pooler_output))
        return AcFormerModelOutput(**output, image_hidden_states=image_tokens)

    def images_by_row(self, image_output: BaseModelOutputWithPooling, places: Tensor) -> dict[str, Tensor]:
        """What `forward` takes in place of the images at each step of a generation from a prompt with these places."""
        return self._gather(places, image_output.pooler_output)

    def _gather(self, places: Tensor, per_image: Sequence[Tensor]) -> dict[str, Tensor]:
        wanted = sum(self.fusion.num_placeholders(len(tokens)) for tokens in per_image)
        check_counts(places.sum(), len(per_image), wanted)
        return self.fusion.gather(places, per_image)

    def image_places(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """(B, L) bool: where the image tokens stand; by the ids, or by the embeddings where there are no ids."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.full((), self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)


def check_counts(placeholders: Tensor, num_images: int, num_features: int) -> None:
    """`ValueError` with both numbers unless the prompts hold as many image tokens as the images need."""
    torch_compilable_check(
        placeholders == num_features,
        lambda: (
            f"the prompts hold {int(placeholders)} image tokens but the images give {num_features} "
            f"({num_images} images): Image features and image tokens do not match. Make prompts and pixels with "
            "one processor call, and give the same num_image_tokens to the processor and the model"
        ),
    )
