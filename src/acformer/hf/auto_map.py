"""What lets `trust_remote_code=True` load a folder of ours: the map of its classes, and a short module for each.

The modules only import this package, or say that it is missing. `load_model` reads none of them: to run what comes with
a folder is for those who ask for it. `acformer export --format self-contained` puts the whole code in their place.
"""

from pathlib import Path

from acformer.files import write_text

AUTO_MAP = {
    "AutoConfig": "configuration_acformer.AcFormerConfig",
    "AutoModel": "modeling_acformer.AcFormerModel",
    "AutoModelForImageTextToText": "modeling_acformer.AcFormerForConditionalGeneration",
    "AutoProcessor": "processing_acformer.AcFormerProcessor",
}
CLASSES = {
    "configuration_acformer": "AcFormerConfig",
    "modeling_acformer": "AcFormerForConditionalGeneration, AcFormerModel",
    "processing_acformer": "AcFormerProcessor",
}
"""Modules beside the weights, and what each of them has to offer."""

MODULE = '''"""For `trust_remote_code=True`: the classes of the package acformer, which must be installed."""

try:
    from acformer.hf import {classes}  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "acformer":
        raise
    raise ImportError("this model needs the package acformer: pip install acformer") from None
'''

IS_INSTALLED = __name__.partition(".")[0] == "acformer"
"""Whether this is the package, and not the copy of it that lies beside a self-contained model."""


def write_modules(folder: Path) -> None:
    """The short modules; beside a self-contained model transformers copies the whole ones itself."""
    for name, classes in CLASSES.items() if IS_INSTALLED else ():
        write_text(folder / f"{name}.py", MODULE.format(classes=classes))
