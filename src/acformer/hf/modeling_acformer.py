"""The whole model, the Hugging Face way: `AcFormerModel` with the language model's head, loss and `generate`.

LLaVA's names and forward signature.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from acformer.errors import UsageError
from acformer.hf.bare_acformer import AcFormerModel, check_counts
from acformer.hf.configuration_acformer import AcFormerConfig
from acformer.hf.outputs_acformer import AcFormerCausalLMOutput
from acformer.hf.pretrained_acformer import AcFormerPreTrainedModel
from acformer.vision import VisionFeatures


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

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        vision_features: Any = None,
        image_tokens: Sequence[Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers', and two more ways to give the images; image tokens without images are refused.

        Under `concat`, those that `past_key_values` hold need no images again.

        Args:
            vision_features: encoder output instead of `pixel_values` (see `AcFormerModel.get_image_features`).
            image_tokens: instead of either, the visual tokens (T, E) of each image, as `ImageTokens` keeps them.
        """
        every_step = self.model.fusion.reads_every_step
        if every_step:
            self._refuse_prompt_lookup(*args, **kwargs)
        if image_tokens is not None and len(image_tokens):
            output = BaseModelOutputWithPooling(pooler_output=list(image_tokens))
            kwargs["mm_encoder_outputs"] = {"image": output}
        elif vision_features is not None or (every_step and kwargs.get("pixel_values") is not None):
            pixels, budget = kwargs.pop("pixel_values", None), kwargs.pop("num_image_tokens", None)
            with torch.no_grad():
                output = self.get_image_features(pixels, vision_features=vision_features, num_image_tokens=budget)
            kwargs["mm_encoder_outputs"] = {"image": output}
        given = kwargs.get("mm_encoder_outputs")
        ids, cache = kwargs.get("input_ids", inputs), kwargs.get("past_key_values")
        embeds: Any = kwargs.get("inputs_embeds")
        if ids is None and embeds is None:
            return super().generate(inputs, *args, **kwargs)
        places = self.model.image_places(ids if embeds is None else None, embeds)
        if given is None and kwargs.get("pixel_values") is None:
            read = 0 if every_step or cache is None else cache.get_seq_length()  # the cache holds these images
            check_counts(places[:, read:].sum(), 0, 0)
        if every_step and given:
            del kwargs["mm_encoder_outputs"]
            kwargs |= self.model.images_by_row(given["image"], places)
        return super().generate(inputs, *args, **kwargs)

    def _refuse_prompt_lookup(self, generation_config: Any = None, *_: Any, **kwargs: Any) -> None:
        configs = [config for config in (generation_config, self.generation_config) if config is not None]
        if kwargs.get("prompt_lookup_num_tokens") or any(config.prompt_lookup_num_tokens for config in configs):
            raise UsageError(
                "prompt_lookup_num_tokens proposes what the prompt holds, <image> included, which "
                f"fusion {self.config.fusion} would read as the place of one more image: generate without it"
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict:
        """As transformers', which looks for `inputs_embeds` in this signature.

        Images belong to the first step, which older versions forget for `mm_encoder_outputs`.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
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
        cross_attention_states: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> AcFormerCausalLMOutput:
        """Logits and, with labels, the loss.

        Args:
            input_ids: (B, L) with T image tokens in a row for every image; one under `gated_cross_attention`.
            pixel_values: (images, 3, Y, X), in the order in which the images stand in the batch.
            labels: (B, L), -100 where nothing is learned; the loss is a mean over the others, or a sum divided by
                `num_items_in_batch` when the trainer passes it.
            vision_features: encoder output instead of `pixel_values` (see `get_image_features`).
            num_image_tokens: T for this call, where the connector is elastic; under `concat` the prompt holds as many.
            cross_attention_states, cross_attention_mask: see `AcFormerModel.forward`.
            supervised_only: with labels, make logits (1, S, V) for the S supervised positions alone: the same loss
                without the other rows of the vocabulary's product, and without a KV cache: for training.

        Raises:
            ValueError: image tokens in the prompt and visual tokens of the images differ in number.
        """
        if supervised_only:
            kwargs = {"use_cache": False, **kwargs}
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
            cross_attention_states=cross_attention_states,
            cross_attention_mask=cross_attention_mask,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        rest = dict(output)
        hidden = rest.pop("last_hidden_state")[:, kept, :]
        if labels is not None and supervised_only:
            hidden, kwargs["shift_labels"] = _supervised(hidden, labels)
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return AcFormerCausalLMOutput(loss=loss, logits=logits, **rest)


def _supervised(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (1, S, E) that predict a supervised token, and these tokens (1, S)."""
    targets = labels[:, 1:]
    chosen = targets != -100
    return hidden[:, :-1][chosen][None], targets[chosen][None]
