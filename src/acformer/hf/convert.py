"""LLaVA's Hugging Face checkpoints as models of ours.

Everything is strict: a weight that is missing, unexpected or of another shape is a `CheckpointError`.
"""

import copy

from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedConfig

from acformer.errors import CheckpointError, UsageError
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration
from acformer.vision.encoder import num_blocks
from acformer.vision.families import ENCODERS, encoder_family, num_prefix_tokens

LLAVA_NAMES = {
    "model.multi_modal_projector.linear_1.": "model.connector.projector.0.",
    "model.multi_modal_projector.linear_2.": "model.connector.projector.2.",
}


def from_llava(model: LlavaForConditionalGeneration) -> AcFormerForConditionalGeneration:
    """LLaVA as one of our models with connector `mlp`: the same logits, without the blocks nobody reads.

    The new model has its own configs, stands on the same device and has the same dtype. With
    `vision_feature_select_strategy="full"`, [CLS] is a visual token too (`include_prefix`).

    Raises:
        CheckpointError: a setting that our model does not have (it is named), or weights that do not fit.
    """
    _refuse_unsupported(model.config)
    config = AcFormerConfig(
        vision_config=copy.deepcopy(model.config.vision_config),
        text_config=copy.deepcopy(model.config.text_config),
        connector="mlp",
        connector_kwargs={"include_prefix": model.config.vision_feature_select_strategy == "full"},
        feature_layer=model.config.vision_feature_layer,
        image_token_id=model.config.image_token_id,
    )
    weights = _llava_weights(model)
    converted = AcFormerForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=model.dtype
    )
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted.to(model.device).train(model.training)


def _refuse_unsupported(config: PreTrainedConfig) -> None:
    vision = config.vision_config
    if vision.model_type not in ENCODERS.names():
        known = ", ".join(ENCODERS.names())
        raise CheckpointError(f"vision encoder {vision.model_type!r} is unsupported; known: {known}")
    if not isinstance(config.vision_feature_layer, int):
        raise CheckpointError(
            f"vision_feature_layer={config.vision_feature_layer} is unsupported: it must be one layer"
        )
    try:
        num_blocks(vision, config.vision_feature_layer)
    except UsageError as error:
        raise CheckpointError(f"vision_feature_layer is unsupported: {error}") from error
    if config.projector_hidden_act != "gelu":
        raise CheckpointError(f"projector_hidden_act={config.projector_hidden_act!r} is unsupported: it must be 'gelu'")
    if not config.multimodal_projector_bias:
        raise CheckpointError("multimodal_projector_bias=False is unsupported: our projector has biases")
    prefix = num_prefix_tokens(vision)
    if config.vision_feature_select_strategy == "default" and prefix != 1:
        raise CheckpointError(
            f"vision_feature_select_strategy='default' is unsupported for {vision.model_type!r}: LLaVA drops "
            f"the first token, but this encoder has {prefix} before the patches"
        )


def _llava_weights(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """Copies of LLaVA's weights under our names, without the blocks after the feature layer."""
    vision = model.config.vision_config
    blocks = f"model.vision_tower.{encoder_family(vision).blocks}."
    keep = num_blocks(vision, model.config.vision_feature_layer)
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(blocks) and int(name.removeprefix(blocks).split(".")[0]) >= keep:
            continue
        for theirs, ours in LLAVA_NAMES.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        weights[name] = tensor.clone()
    return weights
