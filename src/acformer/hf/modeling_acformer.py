"""`AcFormerModel` and `AcFormerForConditionalGeneration`: encoder, connector, fusion, language model (eq. 2, 3, 6).

LLaVA's module names and forward signature, and a loading that refuses weights which do not fit (transformers itself
warns of them, and goes on with random ones). Not LLaVA's: the connector, the encoder's end at the feature layer,
visual tokens that may stand beside the text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import torch_compilable_check
from transformers.utils.generic import can_return_tuple

from acformer.connectors import Connector, build_connector
from acformer.errors import CheckpointError, UsageError
from acformer.files import write_text
from acformer.hf.auto_map import IS_INSTALLED, write_modules
from acformer.hf.budgets import visual_tokens
from acformer.hf.cache_name import CACHE, NEW, OLD, given_cache
from acformer.hf.configuration_acformer import AcFormerConfig
from acformer.hf.fusion import GatedCrossAttentionBlock, build_fusion
from acformer.hf.head import LanguageModelHead
from acformer.hf.publish import CARD, Published, card_of, weights_fingerprint
from acformer.hf.skipped_modules import with_full_names
from acformer.untrusted import refuse_files_outside
from acformer.vision.encoder import encode, hidden_layer_blocks, prepare
from acformer.vision.features import VisionFeatures

KEPT = ("last_hidden_state", CACHE, "hidden_states", "attentions")
"""What of a language model's output is passed on; some have more (BERT's `pooler_output`)."""
BODY = ("model.", "vision_tower.", "connector.", "language_model.", "fusion.")
"""How the weights begin that are not the head's, in the checkpoint of a whole model and in `AcFormerModel`'s own."""


@dataclass
class AcFormerModelOutput(BaseModelOutputWithPast):
    """As the language model's output; `image_hidden_states`: (images * T, E) visual tokens."""

    image_hidden_states: Tensor | None = None


@dataclass
class AcFormerCausalLMOutput(CausalLMOutputWithPast):
    """`loss` (scalar), `logits` (B, L, V), cache, and what was asked for; visual tokens as in the model's output."""

    image_hidden_states: Tensor | None = None


class AcFormerPreTrainedModel(Published, PreTrainedModel):
    """What transformers needs to know about our modules: what they support, how they are initialised."""

    config: AcFormerConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    has_head: ClassVar[bool] = True
    """Whether it has use for all weights of a whole model's checkpoint: those of the head, too."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: of custom code, transformers would leave every module uninitialised that has no weights of its own."""
        return False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | None, *args: Any, strict: bool = True, **kwargs: Any
    ) -> Any:
        """As transformers', but a missing, unexpected or wrong-shaped weight is a `CheckpointError`.

        Safetensors alone are read unless `use_safetensors=False` says otherwise: a pickle may be anything. An index
        that names files outside of the folder is refused, and no code that comes with the weights runs.
        `strict=False` restores transformers' behaviour: a report is printed and a model is returned.
        """
        name, want_report = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        shapes_may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs.setdefault("use_safetensors", True)
        kwargs.setdefault("trust_remote_code", False)
        if "quantization_config" in kwargs:
            kwargs["quantization_config"] = with_full_names(kwargs["quantization_config"])
        if name is not None:
            refuse_files_outside(name)
        kwargs |= {"ignore_mismatched_sizes": shapes_may_differ or strict, "output_loading_info": True}
        model, report = super().from_pretrained(name, *args, **kwargs)
        if strict:
            _refuse_wrong_keys(cls, name, report, shapes_may_differ)
        model.loaded_card = card_of(model, name)
        return (model, report) if want_report else model

    def _complete(self, folder: Path) -> None:
        """The card with which these very weights were loaded, or a new one; none beside an adapter alone."""
        write_modules(folder)
        card = getattr(self, "loaded_card", {})
        if card and card["weights"] == weights_fingerprint(self):
            write_text(folder / CARD, card["text"])
        elif IS_INSTALLED and not getattr(self, "_hf_peft_config_loaded", False):
            from acformer.hf.card import write_card

            write_card(folder, self.config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Connector):
            self._start_as_built(module)
        elif isinstance(module, GatedCrossAttentionBlock):
            module.init_gates()

    def _start_as_built(self, connector: Connector) -> None:
        """What was not loaded starts with the value that the connector's constructor gives it.

        transformers builds models without memory and would know only some kinds of weights; a connector may hold any.
        """
        waiting = {name: value for name, value in _tensors(connector).items() if not _is_loaded(value)}
        if not waiting:
            return
        with torch.device("cpu"):
            built = _tensors(build_connector(self.config.connector, connector.geometry, **self.config.connector_kwargs))
        for name, value in waiting.items():
            if name in built:  # a quantised layer has buffers of its own
                init.copy_(value, built[name])


def _tensors(connector: Connector) -> dict[str, Tensor]:
    """Weights and buffers, those among them that no checkpoint holds."""
    return {**dict(connector.named_parameters()), **dict(connector.named_buffers())}


def _is_loaded(value: Tensor) -> bool:
    return getattr(value, "_is_hf_initialized", False)


def _refuse_wrong_keys(
    model_class: type[AcFormerPreTrainedModel], name: str | None, report: dict, shapes_may_differ: bool
) -> None:
    unexpected = {key for key in report["unexpected_keys"] if model_class.has_head or key.startswith(BODY)}
    problems = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(unexpected),
        "of another shape": [] if shapes_may_differ else sorted(str(key) for key in report["mismatched_keys"]),
    }
    if found := [f"{len(keys)} weights {what} (first: {keys[0]})" for what, keys in problems.items() if keys]:
        raise CheckpointError(f"{name}: the weights do not fit the config: {'; '.join(found)}")


class AcFormerModel(AcFormerPreTrainedModel):
    """Image encoder, connector, fusion and language model without its head."""

    has_head = False

    def __init__(self, config: AcFormerConfig, new_language_model: Callable | None = None):
        super().__init__(config)
        tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.vision_tower = prepare(tower, config.feature_layer)
        self.connector = build_connector(config.connector, config.geometry, **config.connector_kwargs)
        new_language_model = new_language_model or partial(AutoModel.from_config, trust_remote_code=False)
        self.language_model = new_language_model(config.text_config)
        self.fusion = build_fusion(config.fusion, self.language_model, **config.fusion_kwargs)
        self.vision_layers = hidden_layer_blocks(
            config.vision_config, self.connector.hidden_layers, config.feature_layer
        )
        self.post_init()

    def get_vision_features(self, pixel_values: Tensor) -> VisionFeatures:
        """(images, 3, Y, X) pixels -> what the encoder knows: tokens, [CLS] attention, grid, further hidden layers.

        The images are resized first where the connector wants another grid of patches (`Connector.input_grid`).
        """
        return self._encode(pixel_values)[1]

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        vision_features: VisionFeatures | Mapping | None = None,
        num_visual_tokens: int | Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """The encoder's output, with the visual tokens in `pooler_output`: a list of one (T, E) per image.

        Args:
            pixel_values: (images, 3, Y, X).
            vision_features: instead of pixels, what `get_vision_features` gave, or a dict: tokens (U, P+N, D),
                cls_attention (U, H, N), hidden_layers (U, K, P+N, D) and, where prompts share images, image_index
                (images,) into the U.
            num_visual_tokens: another T than the connector's own, where it is elastic; or one for each image.
        """
        if vision_features is not None:
            features = self.as_features(vision_features)
            output = BaseModelOutputWithPooling(last_hidden_state=features.tokens)
        elif pixel_values is not None:
            output, features = self._encode(pixel_values, **kwargs)
        else:
            raise ValueError("give pixel_values or vision_features")
        index = vision_features.get("image_index") if isinstance(vision_features, Mapping) else None
        output.pooler_output = visual_tokens(self.connector, features, index, num_visual_tokens)
        return output

    def _encode(self, pixel_values: Any, **kwargs: Any) -> tuple[BaseModelOutputWithPooling, VisionFeatures]:
        wanted = self.connector.input_grid
        grid = None if wanted == self.connector.geometry.grid else wanted
        return encode(self.vision_tower, pixel_values, self.vision_layers, grid, **kwargs)

    def as_features(self, features: VisionFeatures | Mapping) -> VisionFeatures:
        """Features, also cached ones (tokens, cls_attention, hidden_layers), on the model's device, in its dtype."""
        if isinstance(features, Mapping):
            grid, prefix = self.connector.input_grid, self.connector.geometry.num_prefix_tokens
            row, hidden_layers = features.get("cls_attention"), features.get("hidden_layers")
            features = VisionFeatures(features["tokens"], row, grid, prefix, hidden_layers)
        row, hidden_layers = features.cls_attention, features.hidden_layers
        return features._replace(
            tokens=features.tokens.to(self.device, self.dtype),
            cls_attention=None if row is None else row.to(self.device),  # in its own dtype: rounded scores would tie
            hidden_layers=None if hidden_layers is None else hidden_layers.to(self.device, self.dtype),
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
        num_visual_tokens: int | Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cross_attention_states: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> AcFormerModelOutput:
        """Images to visual tokens, then the language model with these in its sequence or beside it (see `fusion`).

        past_key_values, cache: one thing under the names of older and newer versions of transformers.
        cross_attention_states, cross_attention_mask: what `images_by_row` gave, for a fusion that reads the images at
        every step, in place of the images.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_output = (mm_encoder_outputs or {}).get("image")
        if image_output is None and (pixel_values is not None or vision_features is not None):
            image_output = self.get_image_features(pixel_values, vision_features, num_visual_tokens)
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
        elif self.training:  # a batch of text alone: every weight has a gradient all the same
            inputs_embeds = inputs_embeds + (self.connector.zero_loss() + self.fusion.zero_loss()).to(inputs_embeds)
        inputs_embeds, arguments = self.fusion(inputs_embeds, places, **images)
        output = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE: past_key_values if cache is None else cache},
            **arguments,
            **kwargs,
        )
        # (T, E) of each image -> (images * T, E)
        image_states = None if image_output is None else torch.cat(list(image_output.pooler_output))
        known = {name: output[name] for name in KEPT if name in output}
        return AcFormerModelOutput(**known, image_hidden_states=image_states)

    def images_by_row(self, image_output: BaseModelOutputWithPooling, places: Tensor) -> dict[str, Tensor]:
        """What `forward` takes in place of the images at each step of a generation from a prompt with these places."""
        return self._gather(places, image_output.pooler_output)

    def _gather(self, places: Tensor, per_image: Sequence[Tensor]) -> dict[str, Tensor]:
        wanted = sum(self.fusion.count_placeholders(len(tokens)) for tokens in per_image)
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
            "one processor call, and give the same num_visual_tokens to the processor and the model"
        ),
    )


class AcFormerForConditionalGeneration(AcFormerPreTrainedModel, GenerationMixin):
    """The whole model with its language-model head: `generate`, loss, `from_pretrained`.

    The head's modules have the names that the language model has for them: `lm_head`, but for a few of the older ones.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012 (as transformers' own class attributes)

    def __init__(self, config: AcFormerConfig):
        super().__init__(config)
        self.register_module("model", None)  # weights are in the order of the parts: the head comes last
        self.model = AcFormerModel(config, self._new_language_model)
        self.post_init()

    def _new_language_model(self, config: PreTrainedConfig) -> nn.Module:
        """The body of a new causal language model, whose head becomes ours."""
        language_model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        self.head = LanguageModelHead(language_model)
        for name in self.head.names:
            self.add_module(name, getattr(language_model, name))
        tied = language_model._tied_weights_keys or {}
        self._tied_weights_keys = {self.head.renamed(one): self.head.renamed(other) for one, other in tied.items()}
        return getattr(language_model, self.head.body)

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
        visual_tokens: Sequence[Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers', and two more ways to give the images; image tokens without images are refused.

        Under `concat`, those that `past_key_values` (or `cache`, its newer name) hold need no images again.

        Args:
            vision_features: encoder output instead of `pixel_values` (see `AcFormerModel.get_image_features`).
            visual_tokens: instead of either, the visual tokens (T, E) of each image, as `VisualTokenCache` keeps them.
        """
        every_step = self.model.fusion.reads_every_step
        if every_step:
            self._refuse_prompt_lookup(*args, **kwargs)
        if visual_tokens is not None and len(visual_tokens):
            output = BaseModelOutputWithPooling(pooler_output=list(visual_tokens))
            kwargs["mm_encoder_outputs"] = {"image": output}
        elif vision_features is not None or (every_step and kwargs.get("pixel_values") is not None):
            pixels, budget = kwargs.pop("pixel_values", None), kwargs.pop("num_visual_tokens", None)
            with torch.no_grad():
                output = self.get_image_features(pixels, vision_features=vision_features, num_visual_tokens=budget)
            kwargs["mm_encoder_outputs"] = {"image": output}
        given = kwargs.get("mm_encoder_outputs")
        if (cache := given_cache(kwargs)) is not None:
            kwargs = {name: value for name, value in kwargs.items() if name not in (OLD, NEW)} | {CACHE: cache}
        ids = kwargs.get("input_ids", inputs)
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
        num_visual_tokens: int | Tensor | None = None,
        supervised_only: bool = False,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cross_attention_states: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> AcFormerCausalLMOutput:
        """Logits and, with labels, the loss.

        Args:
            input_ids: (B, L) with T image tokens in a row for every image; one under `gated_cross_attention`.
            pixel_values: (images, 3, Y, X), in the order in which the images stand in the batch.
            labels: (B, L), -100 where nothing is learned; the loss is a mean over the others, or a sum divided by
                `num_items_in_batch` when the trainer passes it.
            vision_features: encoder output instead of `pixel_values` (see `get_image_features`).
            num_visual_tokens: T of this call, or (images,), where the connector is elastic; the prompt must fit.
            cross_attention_states, cross_attention_mask, cache: see `AcFormerModel.forward`.
            supervised_only: with labels, make logits (1, S, V) for the S supervised positions alone: the same loss
                without the other rows of the vocabulary's product, and without a KV cache: for training.

        Raises:
            ValueError: image tokens in the prompt and visual tokens of the images differ in number.
        """
        kwargs = {"use_cache": False, **kwargs} if supervised_only else kwargs
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            vision_features=vision_features,
            num_visual_tokens=num_visual_tokens,
            mm_encoder_outputs=mm_encoder_outputs,
            cross_attention_states=cross_attention_states,
            cross_attention_mask=cross_attention_mask,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # (B, L, E) -> (B, kept, E), in one piece: or the head is copied once a row
        hidden = (rest := dict(output)).pop("last_hidden_state")[:, kept, :].contiguous()
        if labels is not None and supervised_only:
            hidden, kwargs["shift_labels"] = _supervised(hidden, labels)
        logits = self.head(self, hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return AcFormerCausalLMOutput(loss=loss, logits=logits, **rest)


def _supervised(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (1, S, E) that predict a supervised token, and these tokens (1, S)."""
    targets = labels[:, 1:]  # (B, L-1): what stands behind each position
    chosen = targets != -100
    return hidden[:, :-1][chosen][None], targets[chosen][None]  # (B, L-1, E) -> (S, E) -> (1, S, E)
