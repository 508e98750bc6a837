"""Weights of others in our modules: the authors' release, and LLaVA's Hugging Face checkpoints.

Everything is strict: a weight that is missing, unexpected or of another shape is a `CheckpointError` with
the weight's name in the file. Depth and widths are read off the weights; the width of a head is not in them.
"""

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedConfig

from acformer.connectors import Connector, build_connector
from acformer.connectors.acformer import AcFormerConnector
from acformer.connectors.base import Geometry
from acformer.connectors.blocks import CrossAttentionStack
from acformer.connectors.perceiver import PerceiverConnector
from acformer.errors import CheckpointError, UsageError
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration
from acformer.untrusted import read_weights
from acformer.vision.encoder import num_blocks
from acformer.vision.families import ENCODERS, encoder_family, num_prefix_tokens

Weights = Mapping[str, Tensor]
M = TypeVar("M", bound=nn.Module)

RELEASE_NAMES = {  # ours -> the release's, in `layers.i.`
    "attention.norm_queries": "0.norm_latents",
    "attention.norm_features": "0.norm_media",
    "attention.q_proj": "0.to_q",
    "attention.kv_proj": "0.to_kv",
    "attention.o_proj": "0.to_out",
    "feed_forward": "1",
}
PROJECTOR_NAMES = {"stack.": "0.", "projector.0.": "1.", "projector.2.": "3.", "queries.": "0."}
LLAVA_NAMES = {
    "model.multi_modal_projector.linear_1.": "model.connector.projector.0.",
    "model.multi_modal_projector.linear_2.": "model.connector.projector.2.",
}


def stack_from_release(state_dict: Weights, *, head_dim: int = 64) -> CrossAttentionStack:
    """The cross-attention stack from the release's resampler weights (`layers.0.0.to_q.weight` and so on).

    `latents` is dropped: the release's forward pass takes its queries from outside and never reads them.

    Args:
        state_dict: weights under the release's names; they are copied and keep their dtype.
        head_dim: width of a head, 64 in the release; the number of heads follows from it.

    Raises:
        CheckpointError: a weight missing, unexpected or of another shape, or not divisible by `head_dim`.
    """
    weights = {name: tensor for name, tensor in state_dict.items() if name != "latents"}
    with torch.device("meta"):
        stack = CrossAttentionStack(**_stack_sizes(weights, "", head_dim))
    return _fill(stack, weights, _release_name)


def connector_from_release(
    state_dict_or_path: Weights | str | Path,
    geometry: Geometry,
    *,
    head_dim: int = 64,
    num_anchors: int = 144,
) -> AcFormerConnector:
    """The release's whole connector, as LLaVA's training saves it in `mm_projector.bin`.

    Args:
        state_dict_or_path: the weights or their file, read as weights only (or safetensors): `0.*` the stack,
            `1.*` and `3.*` the projector, all after one prefix (LLaVA's is `model.mm_projector.`) or none.
        geometry: what the connector stands between; D and E must be those of the weights.
        head_dim: width of a head.
        num_anchors: T - 1; no weight depends on it.

    Raises:
        CheckpointError: a file that cannot be read or holds more than weights, and as `stack_from_release`.
    """
    weights = _without_prefix(_read(state_dict_or_path))
    weights.pop("0.latents", None)
    sizes = _connector_sizes(weights, head_dim)
    with torch.device("meta"):
        connector = AcFormerConnector(geometry, num_anchors=num_anchors, **sizes)
    return _fill(connector, weights, _projector_name)


def perceiver_from_release(
    state_dict_or_path: Weights | str | Path, geometry: Geometry, *, head_dim: int = 64
) -> PerceiverConnector:
    """As `connector_from_release`, for a perceiver in that layout: its `latents` are the queries."""
    weights = _without_prefix(_read(state_dict_or_path))
    sizes = _connector_sizes(weights, head_dim)
    num_queries = _rows(weights, "0.latents")
    with torch.device("meta"):
        connector = PerceiverConnector(geometry, num_queries=num_queries, **sizes)
    return _fill(connector, weights, _projector_name)


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


def _release_name(ours: str) -> str:
    """`layers.0.attention.q_proj.weight` -> `layers.0.0.to_q.weight`."""
    for name, theirs in RELEASE_NAMES.items():
        ours = re.sub(rf"^(layers\.\d+)\.{re.escape(name)}\.", rf"\1.{theirs}.", ours)
    return ours


def _projector_name(ours: str) -> str:
    for name, theirs in PROJECTOR_NAMES.items():
        if ours.startswith(name):
            return theirs + _release_name(ours.removeprefix(name))
    return ours


def _fill(module: M, weights: Weights, source_name: Callable[[str], str]) -> M:
    """Give a module on the meta device copies of the weights, after looking at all of them."""
    wanted = {source_name(name): (name, parameter.shape) for name, parameter in module.named_parameters()}
    problems = {"missing": wanted.keys() - weights.keys(), "unexpected": weights.keys() - wanted.keys()}
    told = [f"{len(names)} {what} ({', '.join(sorted(names)[:5])})" for what, names in problems.items() if names]
    if told:
        raise CheckpointError(f"the weights are not the release's: {' and '.join(told)}")
    for source, (_, shape) in sorted(wanted.items()):
        if not weights[source].is_floating_point():
            raise CheckpointError(f"{source} is {weights[source].dtype}; quantised weights are unsupported")
        if weights[source].shape != shape:
            raise CheckpointError(f"{source} has shape {tuple(weights[source].shape)}, not {tuple(shape)}")
    state = {name: weights[source].detach().clone() for source, (name, _) in wanted.items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module


def _stack_sizes(weights: Weights, prefix: str, head_dim: int) -> dict[str, Any]:
    """Arguments of `CrossAttentionStack`, read off its weights."""
    dim = _rows(weights, f"{prefix}norm.weight")
    inner = _rows(weights, f"{prefix}layers.0.0.to_q.weight")
    hidden = _rows(weights, f"{prefix}layers.0.1.1.weight")
    if inner % head_dim:
        name = f"{prefix}layers.0.0.to_q.weight"
        raise CheckpointError(f"{name} has {inner} rows, which is not a number of heads of head_dim={head_dim}")
    layers = {match[1] for name in weights if (match := re.match(rf"{re.escape(prefix)}layers\.(\d+)\.", name))}
    return {
        "dim": dim,
        "depth": len(layers),
        "num_heads": inner // head_dim,
        "head_dim": head_dim,
        "ff_mult": hidden / dim,
    }


def _connector_sizes(weights: Weights, head_dim: int) -> dict[str, Any]:
    """As `_stack_sizes`, without the width, which the geometry gives."""
    sizes = _stack_sizes(weights, "0.", head_dim)
    del sizes["dim"]
    return sizes


def _rows(weights: Weights, name: str) -> int:
    if name not in weights:
        raise CheckpointError(f"the weight {name} is missing")
    if weights[name].ndim == 0:
        raise CheckpointError(f"{name} has shape (), a single number")
    return weights[name].shape[0]


def _without_prefix(weights: Weights) -> dict[str, Tensor]:
    """Names as the projector's `nn.Sequential` has them: `*.0.norm.weight` -> `0.norm.weight`."""
    mark = "0.norm.weight"
    prefixes = [name.removesuffix(mark) for name in weights if re.search(rf"(^|\.){re.escape(mark)}$", name)]
    prefix = prefixes[0] if prefixes else ""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def _read(state_dict_or_path: Weights | str | Path) -> Weights:
    if isinstance(state_dict_or_path, Mapping):
        return state_dict_or_path
    path = Path(state_dict_or_path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} is no plain dict of weights; loading it could run code, so it is refused"
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise CheckpointError(f"{path} is no dict of weights")
    return weights


def _refuse_unsupported(config: PreTrainedConfig) -> None:
    vision = config.vision_config
    if vision.model_type not in ENCODERS:
        raise CheckpointError(f"vision encoder {vision.model_type!r} is unsupported; known: {', '.join(ENCODERS)}")
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
