"""LLaVA's checkpoints as models of ours, and another connector in a trained model.

Everything is strict: a weight that is missing, unexpected or of another shape is a `CheckpointError`.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedConfig

from acformer.connectors import Connector, build_connector
from acformer.connectors.base import Geometry
from acformer.connectors.blocks import Projector
from acformer.errors import CheckpointError, UsageError
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration
from acformer.hf.configuration_acformer import FIELD_TYPES
from acformer.untrusted import read_weights
from acformer.vision.encoder import num_blocks
from acformer.vision.families import ENCODERS, encoder_family, num_prefix_tokens
from acformer.vision.load import placement

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


def swap_connector(
    model: AcFormerForConditionalGeneration, connector: str, options: dict | None = None, seed: int = 0
) -> tuple[AcFormerForConditionalGeneration, bool]:
    """The model with another connector, new but for the projector at its end, where both end in LLaVA's.

    Args:
        connector, options: a name from `list_connectors()` and its options.
        seed: of what is new.

    Returns:
        The model, and whether the trained projector was kept.
    """
    kept = copy.deepcopy({name: getattr(model.config, name) for name in (*FIELD_TYPES, "image_token_id")})
    config = AcFormerConfig(**{**kept, "connector": connector, "connector_kwargs": options}, dtype=model.dtype)
    with torch.device("meta"):
        wanted = _projector(build_connector(connector, config.geometry, **config.connector_kwargs))
    old = _projector(model.model.connector)
    is_kept = bool(wanted) and {n: w.shape for n, w in wanted.items()} == {n: w.shape for n, w in old.items()}
    weights = {name: w for name, w in model.state_dict().items() if not name.startswith("model.connector.")}
    weights |= {f"model.connector.projector.{name}": weight for name, weight in old.items()} if is_kept else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = with_new_modules(config, weights, "model.connector.", "the model with another connector does not fit")
    new.generation_config = copy.deepcopy(model.generation_config)
    return new, is_kept


def with_new_modules(
    config: AcFormerConfig, weights: dict[str, Tensor], new: str | tuple[str, ...], problem: str
) -> AcFormerForConditionalGeneration:
    """The model with these weights; of those whose names begin with `new` any may be missing, and start anew.

    Raises:
        CheckpointError: any other that is missing, unexpected or of another shape; `problem` is what it says first.
    """
    model, report = AcFormerForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=config.dtype,
        strict=False,
        output_loading_info=True,
        **placement(),
    )
    wrong = {key for key in report["missing_keys"] if not key.startswith(new)}
    wrong |= set(report["unexpected_keys"]) | {str(key) for key in report["mismatched_keys"]}
    if wrong:
        raise CheckpointError(f"{problem}: {len(wrong)} weights, first {min(wrong)}")
    return model


def _projector(connector: Connector) -> dict[str, Tensor]:
    """Weights of the layers at a connector's end, in LLaVA's form; none where it ends otherwise."""
    module = getattr(connector, "projector", None)
    return dict(module.state_dict()) if isinstance(module, Projector) else {}


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


def mlp_from_llava(path: str | Path, geometry: Geometry, *, include_prefix: bool = False) -> Connector:
    """LLaVA's own `mm_projector.bin` as connector `mlp` (that of its first version, one matrix, as `linear`).

    `model.model.connector.load_state_dict(connector.state_dict())` puts it into a model.

    Args:
        path: `mm_projector.bin`, read as weights only, or safetensors.
        geometry: what the connector stands between; D and E must be those of the weights.
        include_prefix: whether [CLS] is a visual token, too.

    Raises:
        CheckpointError: a file that cannot be read, holds more than weights, or other ones: it says which.
    """
    found = read_weights(Path(path))
    weights = {name.rpartition("mm_projector.")[2]: tensor for name, tensor in found.items()}
    with torch.device("meta"):
        name = "linear" if "weight" in weights else "mlp"
        connector = build_connector(name, geometry, include_prefix=include_prefix)
    projector = connector.get_submodule("projector")
    wanted = {name: tuple(tensor.shape) for name, tensor in projector.named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wanted != given:
        some = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in [*found.items()][:4])
        wishes = ", ".join(f"{name} {shape}" for name, shape in wanted.items())
        raise CheckpointError(f"{path} holds {len(found)} weights ({some}, ...), where LLaVA's projector is {wishes}")
    if wrong := [name for name, tensor in weights.items() if not tensor.is_floating_point()]:
        raise CheckpointError(f"{path}: {wrong[0]} is {weights[wrong[0]].dtype}; quantised weights are unsupported")
    projector.load_state_dict(weights, assign=True)
    return connector
