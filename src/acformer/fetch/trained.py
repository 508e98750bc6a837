"""Models that this project has trained: which there are, of what parts, and where their weights lie.

A model of ours is an encoder and a language model that `embedded` brings, and a connector and an adapter that come with
this package: in `weights/NAME` of a clone, in `acformer/weights/NAME` of a wheel. `acformer.hf.trained` joins them.
"""

from dataclasses import dataclass
from pathlib import Path

from acformer.errors import CheckpointError

PACKAGE = Path(__file__).parents[1]
PLACES = (PACKAGE / "weights", PACKAGE.parents[1] / "weights")
"""Where the weights are in an installed package, and in a clone."""
MANIFEST = "manifest.json"
DEFAULT: str | None = "acformer-scenes"
"""The model of `TRAINED` that answers where none is named; None for none."""


@dataclass(frozen=True)
class Trained:
    """parts: names of `EMBEDDED`. needs: modules without which the parts cannot be joined."""

    name: str
    parts: tuple[str, ...]
    licence: str
    what: str
    needs: tuple[str, ...] = ("peft",)


TRAINED = {
    entry.name: entry
    for entry in (
        Trained(
            "acformer-scenes",
            ("dinov2-s14", "smollm2-135m"),
            "Apache-2.0; example images CC BY-SA 4.0, drawn with OpenMoji (openmoji.org)",
            "DINOv2-S/14, acformer_v2 and SmolLM2-135M, trained on openmoji-scenes",
        ),
    )
}


def has_weights(name: str) -> bool:
    """Whether the weights of that model come with this installation."""
    return any((place / name / MANIFEST).is_file() for place in PLACES)


def weights_folder(name: str) -> Path:
    """The folder of a model's connector and adapter, as it comes with this package.

    Raises:
        CheckpointError: this installation has none; what to do.
    """
    if has_weights(name):
        return next(place / name for place in PLACES if (place / name / MANIFEST).is_file())
    raise CheckpointError(
        f"the weights of {name} are not in this installation ({' or '.join(map(str, PLACES))}): install acformer from "
        "its wheel, or from a clone with its folder weights/"
    )
