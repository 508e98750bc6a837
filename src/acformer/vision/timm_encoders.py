"""Encoders of timm and open_clip, with the surface that the rest knows from Hugging Face's.

`timm:NAME` and `open_clip:NAME@WEIGHTS` name them; EVA-CLIP-L of the paper's Fig. 2 is
`open_clip:EVA02-L-14-336@merged2b_s6b_b61k`. They are for looking and measuring, for feature caches and for connectors
in library use. A whole model is made of Hugging Face parts alone, so that it loads without these libraries.

Nothing here runs a block of its own: the library's model runs as it is, and the tap listens.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acformer.errors import CheckpointError, UsageError

PICKLES = (".bin", ".pth", ".pt", ".tar")
SOURCES = ("hf-hub:", "local-dir:")  # both libraries' own: what follows brings its weights along


@dataclass(frozen=True)
class LibraryConfig:
    """What is asked of an encoder's config, under Hugging Face's names.

    num_register_tokens: prefix tokens other than [CLS]. vision_use_head: whether a pooling head has a learned probe,
    which stands in where there is no [CLS]. fixed_size: images of `image_size` alone. image_mean, image_std: of the
    pixels it was trained on, None where the model does not say.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_register_tokens: int = 0
    vision_use_head: bool = False
    fixed_size: bool = False
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class LibraryTower(nn.Module):
    """An image tower of timm or open_clip, its config and the name under which it was loaded ('' for a model given)."""

    def __init__(self, model: nn.Module, config: LibraryConfig, name_or_path: str = ""):
        super().__init__()
        self.model = model
        self.config = config
        self.name_or_path = name_or_path

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, Y, X) pixels -> the model's own output; `UsageError` for a size that it does not take."""
        side, patch = self.config.image_size, self.config.patch_size
        height, width = pixel_values.shape[-2:]
        wrong = f"{self.name_or_path or type(self.model).__name__} does not take {height} x {width} pixels"
        if self.config.fixed_size and (height, width) != (side, side):
            raise UsageError(f"{wrong}: give it {side} x {side}")
        if height % patch or width % patch:
            raise UsageError(f"{wrong}: sides must be multiples of {patch}, its own size is {side} x {side}")
        return self.model(pixel_values)


def is_library_name(name: str) -> bool:
    """Whether it is `timm:...` or `open_clip:...`."""
    return name.partition(":")[0] in LOADERS


def load_library_tower(name: str, dtype: torch.dtype = torch.float32) -> LibraryTower:
    """The image tower that `LIBRARY:NAME[@WEIGHTS]` names, with its weights; the library downloads them if need be.

    NAME is the library's own, also `hf-hub:ORG/REPO` and `local-dir:FOLDER`, which bring their weights. WEIGHTS is a
    checkpoint file or, for open_clip, one of its tags; timm's tag is part of NAME (`vit_base_patch16_clip_224.openai`).

    Raises:
        UsageError: the library is not installed, the model is not of a kind that we read, open_clip without WEIGHTS.
        CheckpointError: no such model, or weights that are missing or of another shape.
    """
    library, _, rest = name.partition(":")
    model, weights = (rest, "") if rest.startswith(SOURCES) else rest.partition("@")[::2]
    return library_tower(LOADERS[library](model, weights, name).to(dtype), name)


def library_tower(model: nn.Module, name: str = "") -> LibraryTower:
    """A model of timm or open_clip as a tower; of open_clip's two-tower models the image half."""
    for base in type(model).__mro__:
        if reader := READERS.get(f"{base.__module__}.{base.__name__}"):
            return reader(model, name)
    known = ", ".join(sorted(READERS))
    raise UsageError(f"{name or 'the model'} is a {type(model).__name__}, which is no encoder that we read: {known}")


def _load_timm(model: str, weights: str, name: str) -> nn.Module:
    timm = _library("timm")
    if weights and not Path(weights).is_file():
        raise CheckpointError(f"cannot load {name!r}: there is no file {weights}")
    folder = Path(model.removeprefix("local-dir:"))
    if model.startswith("local-dir:") and (pickled := [p for p in folder.glob("*") if p.suffix in PICKLES]):
        raise CheckpointError(f"{pickled[0]} is a pickle, which timm would load and which may run code: remove it")
    # Read here, since timm would unpickle a file that it is given.
    file = {}
    if weights:
        read = timm.models.load_state_dict(weights, weights_only=True)
        file = {"pretrained_cfg_overlay": {"state_dict": read, "custom_load": False}}
    try:
        # With the classifier, which timm loads strictly; without, missing weights would stay random unnoticed.
        return timm.create_model(model, pretrained=True, dynamic_img_size=True, **file)
    except TypeError as error:
        raise UsageError(f"{name} is no plain vision transformer of timm: it takes no dynamic_img_size") from error


def _load_open_clip(model: str, weights: str, name: str) -> nn.Module:
    open_clip = _library("open_clip")
    if not weights and not model.startswith(SOURCES):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none for this name"
        raise UsageError(f"{name} does not say which weights: add @FILE or @TAG (tags: {tags})")
    return open_clip.create_model(model, pretrained=weights or None, require_pretrained=True)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        missing = error.name or name
        raise UsageError(f"encoders of {name} need {missing}: pip install 'acformer[timm]'") from error


def _timm_tower(model: Any, name: str) -> LibraryTower:
    """VisionTransformer and Eva, which share the names that we read."""
    attention = dict(model.blocks[0].named_children()).get("attn")
    size, patch = set(model.patch_embed.img_size), model.patch_embed.feat_ratio()
    if attention is None or len(size) > 1 or model.patch_embed.num_patches != (max(size) // patch) ** 2:
        raise UsageError(f"{name or 'the model'}: of timm we read square patches and blocks with one attention each")
    has_cls = model.cls_token is not None
    config = LibraryConfig(
        model_type="timm" if has_cls else "timm_without_cls",
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=attention.num_heads,
        image_size=max(size),
        patch_size=patch,
        num_register_tokens=model.num_prefix_tokens - has_cls,
        vision_use_head=type(model.attn_pool).__name__ == "AttentionPoolLatent",
        fixed_size=not model.dynamic_img_size,
        **_statistics(vars(model).get("pretrained_cfg", {})),
    )
    model.reset_classifier(0)
    return LibraryTower(model, config, name)


def _open_clip_tower(model: Any, name: str) -> LibraryTower:
    attention = model.transformer.resblocks[0].attn
    (side, width), (patch, _) = model.image_size, model.patch_size
    if not isinstance(attention, nn.MultiheadAttention) or side != width or len(set(model.grid_size)) > 1:
        raise UsageError(f"{name or 'the model'}: of open_clip we read square patches and nn.MultiheadAttention blocks")
    config = LibraryConfig(
        model_type="open_clip",
        hidden_size=attention.embed_dim,
        num_hidden_layers=len(model.transformer.resblocks),
        num_attention_heads=attention.num_heads,
        image_size=side,
        patch_size=patch,
        fixed_size=True,
        **_statistics(vars(model).get("preprocess_cfg", {})),
    )
    return LibraryTower(model, config, name)


def _open_clip_trunk(visual: Any, name: str) -> LibraryTower:
    """open_clip's image tower that is a timm model inside; any other trunk is refused there."""
    trunk = library_tower(visual.trunk, name)
    return LibraryTower(trunk.model, replace(trunk.config, **_statistics(vars(visual).get("preprocess_cfg", {}))), name)


def _open_clip_visual(model: Any, name: str) -> LibraryTower:
    return library_tower(model.visual, name)


def _statistics(image: dict[str, Any]) -> dict[str, Any]:
    return {f"image_{key}": tuple(image[key]) for key in ("mean", "std") if key in image}


LOADERS: dict[str, Callable[[str, str, str], nn.Module]] = {"timm": _load_timm, "open_clip": _load_open_clip}
READERS: dict[str, Callable[[Any, str], LibraryTower]] = {
    "timm.models.vision_transformer.VisionTransformer": _timm_tower,
    "timm.models.eva.Eva": _timm_tower,
    "open_clip.transformer.VisionTransformer": _open_clip_tower,
    "open_clip.timm_model.TimmModel": _open_clip_trunk,
    "open_clip.model.CLIP": _open_clip_visual,
    "open_clip.model.CustomTextCLIP": _open_clip_visual,
    "open_clip.coca_model.CoCa": _open_clip_visual,
}
