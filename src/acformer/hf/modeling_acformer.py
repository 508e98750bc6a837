"""The model, the Hugging Face way: image encoder -> connector -> language model (eq. 3 and 6, Fusion B).

LLaVA's names and forward signature; not LLaVA's the connector, the encoder's end at the feature layer, strict loading.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import torch_compilable_check
from transformers.utils.generic import can_return_tuple

from acformer.cls_attention import ClsAttentionTap
from acformer.connectors import Connector, build_connector
from acformer.connectors.initialise import initialise
from acformer.errors import CheckpointError
from acformer.hf.configuration_acformer import AcFormerConfig
from acformer.hf.outputs_acformer import AcFormerCausalLMOutput, AcFormerModelOutput
from acformer.vision import VisionFeatures, features_from_tap, size_kwargs, truncate


class AcFormerPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about our modules: what they support, how they are initialised."""

    config: AcFormerConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: of custom code, transformers would leave every module uninitialised that has no weights of its own."""
        return False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | None, *args: Any, strict: bool = True, **kwargs: Any
    ) -> Any:
        """As transformers', but a missing, unexpected or wrong-shaped weight is a `CheckpointError`.

        `strict=False` restores transformers' behaviour: a report is printed and a model is returned.
        """
        name, want_report = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        shapes_may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"ignore_mismatched_sizes": shapes_may_differ or strict, "output_loading_info": True}
        model, report = super().from_pretrained(name, *args, **kwargs)
        if strict:
            _refuse_wrong_keys(cls, name, report, shapes_may_differ)
        return (model, report) if want_report else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Connector):
            initialise(module)


class AcFormerModel(AcFormerPreTrainedModel):
    """Image encoder, connector and language model without its head."""

    def __init__(self, config: AcFormerConfig):
        super().__init__(config)
        self.vision_tower = truncate(AutoModel.from_config(config.vision_config), config.feature_layer)
        self.connector = build_connector(config.connector, config.geometry, **config.connector_kwargs)
        self.language_model = AutoModel.from_config(config.text_config)
        self.cls_attention_tap = ClsAttentionTap(self.vision_tower)
        self.post_init()

    def get_vision_features(self, pixel_values: Tensor) -> VisionFeatures:
        """(images, 3, Y, X) pixels -> what the encoder knows: tokens, [CLS] attention, grid."""
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
                cls_attention (U, H, N) and, where prompts share pictures, image_index (images,) into the U.
            num_image_tokens: another T than the connector's own, where it is elastic.
        """
        if vision_features is not None:
            features = self._as_features(vision_features)
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
        kwargs = {**kwargs, **size_kwargs(self.vision_tower.config, pixel_values), "return_dict": True}
        output = self.vision_tower(pixel_values, **kwargs)
        return output, features_from_tap(self.cls_attention_tap, self.vision_tower.config, pixel_values)

    def _as_features(self, features: VisionFeatures | Mapping) -> VisionFeatures:
        """Cached features (a dict: tokens, cls_attention) in the model's dtype."""
        if isinstance(features, Mapping):
            geometry = self.config.geometry
            row = features.get("cls_attention")
            features = VisionFeatures(features["tokens"], row, geometry.grid, geometry.num_prefix_tokens)
        row = None if features.cls_attention is None else features.cls_attention.to(self.device)
        return features._replace(tokens=features.tokens.to(self.device, self.dtype), cls_attention=row)

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
        **kwargs: Any,
    ) -> AcFormerModelOutput:
        """Visual tokens take the places of the image tokens, then the language model runs (eq. 6)."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_output = (mm_encoder_outputs or {}).get("image")
        if image_output is None and (pixel_values is not None or vision_features is not None):
            image_output = self.get_image_features(pixel_values, vision_features, num_image_tokens)
        image_tokens = None
        if image_output is not None:
            per_image = image_output.pooler_output
            image_tokens = torch.cat(list(per_image)).to(inputs_embeds.device, inputs_embeds.dtype)
            places = self._image_places(input_ids, inputs_embeds)
            _check_counts(places.sum(), len(per_image), image_tokens.shape[0])
            inputs_embeds = inputs_embeds.masked_scatter(places.unsqueeze(-1), image_tokens)
        elif self.training:
            inputs_embeds = inputs_embeds + self.connector.at_rest().to(inputs_embeds)
        output = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return AcFormerModelOutput(**output, image_hidden_states=image_tokens)

    def _image_places(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """(B, L) bool: where the image tokens stand."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.full((), self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)


def _check_counts(placeholders: Tensor, num_images: int, num_features: int) -> None:
    torch_compilable_check(
        placeholders == num_features,
        lambda: (
            f"the prompts hold {int(placeholders)} image tokens but the images give {num_features} "
            f"({num_images} images): Image features and image tokens do not match. Make prompts and pixels with "
            "one processor call, and give the same num_image_tokens to the processor and the model"
        ),
    )


class AcFormerForConditionalGeneration(AcFormerPreTrainedModel, GenerationMixin):
    """The whole model with its language-model head: `generate`, loss, `from_pretrained`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: AcFormerConfig):
        super().__init__(config)
        self.model = AcFormerModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_vision_features(self, pixel_values: Tensor) -> VisionFeatures:
        """See `AcFormerModel`."""
        return self.model.get_vision_features(pixel_values)

    def get_image_features(self, pixel_values: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `AcFormerModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def generate(self, inputs: Tensor | None = None, *args: Any, vision_features: Any = None, **kwargs: Any) -> Any:
        """As transformers', and `vision_features` for `pixel_values`; image tokens without images are refused."""
        if vision_features is not None:
            budget = kwargs.pop("num_image_tokens", None)
            with torch.no_grad():
                output = self.get_image_features(vision_features=vision_features, num_image_tokens=budget)
            kwargs["mm_encoder_outputs"] = {"image": output}
        ids = kwargs.get("input_ids", inputs)
        if ids is not None and kwargs.get("pixel_values", kwargs.get("mm_encoder_outputs")) is None:
            _check_counts((ids == self.config.image_token_id).sum(), 0, 0)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> dict:
        """As transformers'; images belong to the first step, which older versions forget for `mm_encoder_outputs`."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("mm_encoder_outputs", None)
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        vision_features: VisionFeatures | Mapping | None = None,
        num_image_tokens: int | None = None,
        supervised_only: bool = False,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> AcFormerCausalLMOutput:
        """Logits and, with labels, the loss.

        Args:
            input_ids: (B, L) with T image tokens in a row for every image.
            pixel_values: (images, 3, Y, X), in the order in which the images stand in the batch.
            labels: (B, L), -100 where nothing is learned; the loss is a mean over the others, or a sum divided by
                `num_items_in_batch` when the trainer passes it.
            vision_features: encoder output instead of `pixel_values` (see `get_image_features`).
            num_image_tokens: T for this call, where the connector is elastic; the prompt must hold as many.
            supervised_only: with labels, make logits (1, S, V) for the S supervised positions alone: the same loss
                without the other rows of the vocabulary's product.

        Raises:
            ValueError: image tokens in the prompt and visual tokens of the images differ in number.
        """
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_features=vision_features,
            num_image_tokens=num_image_tokens,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = output.last_hidden_state[:, kept, :]
        if labels is not None and supervised_only:
            hidden, kwargs["shift_labels"] = _supervised(hidden, labels)
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return AcFormerCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            image_hidden_states=output.image_hidden_states,
        )


def _supervised(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (1, S, E) that predict a supervised token, and these tokens (1, S)."""
    targets = labels[:, 1:]
    chosen = targets != -100
    return hidden[:, :-1][chosen][None], targets[chosen][None]


def _refuse_wrong_keys(model_class: type, name: str | None, report: dict, shapes_may_differ: bool) -> None:
    head = {"lm_head.weight"} if model_class is AcFormerModel else set()  # the bare model leaves it out
    problems = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(set(report["unexpected_keys"]) - head),
        "of another shape": [] if shapes_may_differ else sorted(str(key) for key in report["mismatched_keys"]),
    }
    if told := [f"{len(keys)} weights {what} (first: {keys[0]})" for what, keys in problems.items() if keys]:
        raise CheckpointError(f"{name}: the weights do not fit the config: {'; '.join(told)}")
