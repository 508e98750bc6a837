"""Encoders of timm and open_clip as models of transformers, so that they are saved, loaded and trained like the others.

`timm:NAME` and `open_clip:NAME@WEIGHTS` name them; EVA-CLIP-L of the paper's Fig. 2 is
`open_clip:EVA02-L-14-336@merged2b_s6b_b61k`. The config says what the library is asked to build, so a saved model is
built without the library's weights and filled from its own; the library must be installed.

Nothing here runs a block of its own: the library's model runs as it is, and hooks listen (see `cls_attention`).
"""

import copy
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from acformer.errors import CheckpointError, UsageError

PICKLES = (".bin", ".pth", ".pt", ".tar")
SOURCES = ("hf-hub:", "local-dir:")  # both libraries' own: what follows brings its weights along


class LibraryVisionConfig(PreTrainedConfig):
    """An image encoder of timm or open_clip: how it is built, and what the rest asks of an encoder's config.

    library: `timm` or `open_clip`. build: what the library builds it from, None for a model that was given as an
    object; for timm the architecture's name and its arguments, for open_clip the `model_cfg`.
    layout: its line in `LIBRARY_ENCODERS`.
    num_register_tokens: prefix tokens other than [CLS]. fixed_size: images of `image_size` alone.
    image_mean, image_std: of the pixels it was trained on, None where the model does not say.
    """

    model_type = "library_vision"

    library: str = "timm"
    build: Any = None
    layout: str = "timm"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    num_register_tokens: int = 0
    fixed_size: bool = False
    image_mean: Any = None
    image_std: Any = None


class LibraryVisionModel(PreTrainedModel):
    """An image tower of timm or open_clip; its module is `model`, under the library's own names.

    Args:
        config: from which it is built, with weights at random.
        model: instead of that, the module itself.

    Raises:
        UsageError: the library is not installed, or the config does not say how to build the model.
    """

    config: LibraryVisionConfig
    config_class = LibraryVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True

    def __init__(self, config: LibraryVisionConfig, model: nn.Module | None = None):
        super().__init__(config)
        self.model = _build(config) if model is None else model
        self.tables_missing = any(buffer.is_meta for buffer in self.model.buffers())
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """(B, 3, Y, X) pixels -> the model's own output; `UsageError` for a size that it does not take."""
        side, patch = self.config.image_size, self.config.patch_size
        height, width = pixel_values.shape[-2:]
        wrong = f"{self.name_or_path or type(self.model).__name__} does not take {height} x {width} pixels"
        if self.config.fixed_size and (height, width) != (side, side):
            raise UsageError(f"{wrong}: give it {side} x {side}")
        if height % patch or width % patch:
            raise UsageError(f"{wrong}: sides must be multiples of {patch}, its own size is {side} x {side}")
        return BaseModelOutputWithPooling(pooler_output=self.model(pixel_values))

    @classmethod
    def is_custom_code(cls) -> bool:
        """No, as our other models."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Only tables that no checkpoint holds, such as rotary positions, where the model was built without memory."""
        if module is self and self.tables_missing:
            with torch.device("cpu"):
                built = dict(_build(self.config).named_buffers())
            for name, _ in self.named_non_persistent_buffers():
                self.get_buffer(name).copy_(built[name.removeprefix("model.")])
            self.tables_missing = False


def is_library_name(name: str) -> bool:
    """Whether it is `timm:...` or `open_clip:...`."""
    return name.partition(":")[0] in LOADERS


def load_library_model(name: str, dtype: torch.dtype = torch.float32) -> LibraryVisionModel:
    """The image tower that `LIBRARY:NAME[@WEIGHTS]` names, with its weights; the library downloads them if need be.

    NAME is the library's own, also `hf-hub:ORG/REPO` and `local-dir:FOLDER`, which bring their weights. WEIGHTS is a
    checkpoint file or, for open_clip, one of its tags; timm's tag is part of NAME (`vit_base_patch16_clip_224.openai`).

    Raises:
        UsageError: the library is not installed, the model is not of a supported kind, open_clip without WEIGHTS.
        CheckpointError: no such model, or weights that are missing or of another shape.
    """
    library, _, rest = name.partition(":")
    model, weights = (rest, "") if rest.startswith(SOURCES) else rest.partition("@")[::2]
    module, build = LOADERS[library](model, weights, name)
    tower = library_model(module.to(dtype), name)
    tower.config.library, tower.config.build, tower.config.dtype = library, build, dtype
    return tower


def library_model(model: nn.Module, name: str = "") -> LibraryVisionModel:
    """A model of timm or open_clip as one of transformers; of open_clip's two-tower models the image half."""
    module, config = _described(model, name)
    tower = LibraryVisionModel(config, module)
    tower.name_or_path = config.name_or_path = name
    return tower


def _described(model: nn.Module, name: str = "") -> tuple[nn.Module, LibraryVisionConfig]:
    """The module with the blocks, without its classifier, and its config."""
    for base in type(model).__mro__:
        if reader := READERS.get(f"{base.__module__}.{base.__name__}"):
            return reader(model, name or "the model")
    known = ", ".join(sorted(READERS))
    raise UsageError(f"{name or 'the model'} is a {type(model).__name__}, which is no supported encoder: {known}")


def _build(config: LibraryVisionConfig) -> nn.Module:
    if config.library not in BUILDERS or not isinstance(config.build, dict):
        raise UsageError(
            f"this {config.library} encoder was given as an object, so it cannot be built again: "
            "name it (timm:NAME, open_clip:NAME@WEIGHTS) to train or save a model with it"
        )
    return _described(BUILDERS[config.library](**config.build))[0]


def _load_timm(model: str, weights: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    timm = _library("timm")
    if weights and not Path(weights).is_file():
        raise CheckpointError(f"cannot load {name!r}: there is no file {weights}")
    folder = Path(model.removeprefix("local-dir:"))
    if model.startswith("local-dir:") and (pickled := [p for p in folder.glob("*") if p.suffix in PICKLES]):
        raise CheckpointError(f"{pickled[0]} is a pickle, which timm would load and which may run code: remove it")
    file = {}
    if weights:  # read here, since timm would unpickle a file that it is given
        state = timm.models.load_state_dict(weights, weights_only=True)
        file = {"pretrained_cfg_overlay": {"state_dict": state, "custom_load": False}}
    try:
        # With the classifier, which timm loads strictly; without, missing weights would stay random unnoticed.
        loaded = timm.create_model(model, pretrained=True, dynamic_img_size=True, **file)
    except TypeError as error:
        raise UsageError(f"{name} is no plain vision transformer of timm: it takes no dynamic_img_size") from error
    architecture, arguments = _timm_architecture(model)
    # What timm takes from the description of the weights must be said where there are none.
    arguments |= {"img_size": loaded.patch_embed.img_size[0], "global_pool": loaded.global_pool}
    return loaded, {"architecture": architecture, "arguments": arguments}


def _timm_architecture(model: str) -> tuple[str, dict[str, Any]]:
    """timm's name for what a folder or a hub repository describes, and the arguments that it is built with."""
    source, _, place = model.partition(":")
    if source == "local-dir":
        config = json.loads((Path(place) / "config.json").read_text(encoding="utf-8"))
        return config["architecture"], dict(config.get("model_args") or {})
    if source == "hf-hub":
        _, architecture, arguments = _library("timm").models.load_model_config_from_hf(place)
        return architecture, dict(arguments or {})
    return model, {}


def _build_timm(architecture: str, arguments: dict[str, Any]) -> nn.Module:
    return _library("timm").create_model(architecture, pretrained=False, dynamic_img_size=True, **arguments)


def _load_open_clip(model: str, weights: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    open_clip = _library("open_clip")
    if not weights and not model.startswith(SOURCES):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none for this name"
        raise UsageError(f"{name} does not say which weights: add @FILE or @TAG (tags: {tags})")
    loaded = open_clip.create_model(model, pretrained=weights or None, require_pretrained=True)
    config = open_clip.get_model_config(model) or open_clip.get_model_config(model.replace("/", "-"))
    return loaded, {key: config[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in config}


def _build_open_clip(embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool = False) -> nn.Module:
    build = _library("open_clip").model._build_vision_tower
    return build(embed_dim, {**vision_cfg, "timm_model_pretrained": False}, quick_gelu)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        missing = error.name or name
        raise UsageError(f"encoders of {name} need {missing}: pip install 'acformer[timm]'") from error


def _timm_model(model: Any, name: str) -> tuple[nn.Module, LibraryVisionConfig]:
    """VisionTransformer and Eva, which have the names in common."""
    attention = dict(model.blocks[0].named_children()).get("attn")
    size, patch = set(model.patch_embed.img_size), model.patch_embed.feat_ratio()
    if attention is None or len(size) > 1 or model.patch_embed.num_patches != (max(size) // patch) ** 2:
        raise UsageError(f"{name}: models of timm need square patches and one attention a block")
    has_cls = model.cls_token is not None
    config = LibraryVisionConfig(
        layout="timm" if has_cls else "timm_without_cls",
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=attention.num_heads,
        image_size=max(size),
        patch_size=patch,
        num_register_tokens=model.num_prefix_tokens - has_cls,
        fixed_size=not model.dynamic_img_size,
        **_statistics(vars(model).get("pretrained_cfg", {})),
    )
    model.reset_classifier(0)
    return model, config


def _open_clip_model(model: Any, name: str) -> tuple[nn.Module, LibraryVisionConfig]:
    attention = model.transformer.resblocks[0].attn
    (side, width), (patch, _) = model.image_size, model.patch_size
    if not isinstance(attention, nn.MultiheadAttention) or side != width or len(set(model.grid_size)) > 1:
        raise UsageError(f"{name}: models of open_clip need square patches and blocks of nn.MultiheadAttention")
    config = LibraryVisionConfig(
        library="open_clip",
        layout="open_clip",
        hidden_size=attention.embed_dim,
        num_hidden_layers=len(model.transformer.resblocks),
        num_attention_heads=attention.num_heads,
        image_size=side,
        patch_size=patch,
        fixed_size=True,
        **_statistics(vars(model).get("preprocess_cfg", {})),
    )
    return model, config


def _open_clip_trunk(visual: Any, name: str) -> tuple[nn.Module, LibraryVisionConfig]:
    """open_clip's image tower that is a timm model inside; any other trunk is refused there."""
    module, config = _described(visual.trunk, name)
    config = copy.deepcopy(config)
    config.library = "open_clip"
    for key, value in _statistics(vars(visual).get("preprocess_cfg", {})).items():
        setattr(config, key, value)
    return module, config


def _open_clip_visual(model: Any, name: str) -> tuple[nn.Module, LibraryVisionConfig]:
    return _described(model.visual, name)


def _statistics(image: dict[str, Any]) -> dict[str, list[float]]:
    return {f"image_{key}": [*image[key]] for key in ("mean", "std") if key in image}


LOADERS: dict[str, Callable[[str, str, str], tuple[nn.Module, dict[str, Any]]]] = {
    "timm": _load_timm,
    "open_clip": _load_open_clip,
}
BUILDERS: dict[str, Callable[..., nn.Module]] = {"timm": _build_timm, "open_clip": _build_open_clip}
READERS: dict[str, Callable[[Any, str], tuple[nn.Module, LibraryVisionConfig]]] = {
    "timm.models.vision_transformer.VisionTransformer": _timm_model,
    "timm.models.eva.Eva": _timm_model,
    "open_clip.transformer.VisionTransformer": _open_clip_model,
    "open_clip.timm_model.TimmModel": _open_clip_trunk,
    "open_clip.model.CLIP": _open_clip_visual,
    "open_clip.model.CustomTextCLIP": _open_clip_visual,
    "open_clip.coca_model.CoCa": _open_clip_visual,
}

AutoConfig.register(LibraryVisionConfig.model_type, LibraryVisionConfig, exist_ok=True)
AutoModel.register(LibraryVisionConfig, LibraryVisionModel, exist_ok=True)
