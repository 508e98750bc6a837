"""A model as graphs that need none of its code: ONNX, or torch.export's; each is compared with the model at once.

    vision.*          pixel_values (B, 3, Y, X) -> visual_tokens (B, T, E): encoder, anchors and connector
    embed_tokens.*    input_ids (B, L) -> inputs_embeds (B, L, E)
    language_model.*  inputs_embeds (B, L, E), attention_mask (B, L) -> logits (B, L, V), without a KV cache

B and L are free, T is chosen here. The last two come with part `all`: whoever runs them puts the visual tokens in the
place of the image tokens between them. All in float32.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from acformer.errors import UsageError, translated
from acformer.files import whole_folder, write_text
from acformer.hf import AcFormerForConditionalGeneration
from acformer.hf.checkpoints import load_model, write_manifest

TOLERANCE = 1e-4
"""By which a graph's output may differ from the model's, of its largest value where that is above 1."""
TRACE = "stack_trace"
"""What exporters write beside every node: the lines of the source that made it, in the folders of this machine."""
NEEDS = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Graph:
    """One graph: what runs, what goes in and comes out, and inputs of any batch and length to try it with."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    output: str
    example: Callable[[int, int], tuple[Tensor, ...]]
    has_length: bool = True

    @property
    def dynamic_shapes(self) -> dict[str, dict[int, Dim]]:
        """Which dimensions are free."""
        # torch.export takes a length of 0 or 1 for a constant.
        batch, length = Dim("batch"), Dim("length", min=2, max=2**20)
        return {name: {0: batch, **({1: length} if self.has_length else {})} for name in self.inputs}


class Vision(nn.Module):
    """Pixels to visual tokens."""

    def __init__(self, model: AcFormerForConditionalGeneration, num_tokens: int):
        super().__init__()
        self.model, self.num_tokens = model.model, num_tokens

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, Y, X) -> (B, T, E)."""
        return self.model.connector(self.model.get_vision_features(pixel_values), self.num_tokens)


class Embedding(nn.Module):
    """Ids to embeddings."""

    def __init__(self, model: AcFormerForConditionalGeneration):
        super().__init__()
        self.embedding = model.get_input_embeddings()

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, E)."""
        return self.embedding(input_ids)


class LanguageModel(nn.Module):
    """Embeddings, visual tokens among them, to logits."""

    def __init__(self, model: AcFormerForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L, E), (B, L) -> (B, L, V)."""
        return self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False).logits


def export_graph(name: str, out: Path, form: str, part: str = "vision", num_tokens: int | None = None) -> Path:
    """Write the graphs of a model to the folder `out`, with `graphs.json`, which describes them.

    What prepares their inputs lies beside them: transformers' own image processor, for `all` the tokenizer, too.

    Args:
        form: `onnx` or `torch` (`torch.export.load` reads it).
        part: `vision`, or `all`.
        num_tokens: T, where the connector is elastic; by default its own.

    Raises:
        CheckpointError: no model of ours there.
        UsageError: `out` is there already, T that the connector cannot give, a package that is missing, `all` of a
            model that reads images beside its text, or a graph that cannot be made or is not equal to the model.
    """
    if out.exists():
        raise UsageError(f"{out} is there already: name another --out")
    if form == "onnx" and (missing := [package for package in NEEDS if find_spec(package) is None]):
        raise UsageError(f"--format onnx needs {', '.join(missing)}: pip install 'acformer[export]'")
    model, processor = load_model(name, dtype=torch.float32)
    if part == "all" and model.config.fusion != "concat":
        raise UsageError(f"fusion {model.config.fusion} reads images at every layer: export --part vision")
    num_tokens = num_tokens or model.model.connector.num_tokens
    graphs = list(_graphs(model, part, num_tokens))
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as folder, torch.no_grad():
        for graph in graphs:
            write, read = (_write_onnx, _read_onnx) if form == "onnx" else (_write_torch, _read_torch)
            with translated(f"cannot export {graph.name} as {form}", UsageError), _quiet():
                path = write(graph, folder)
                _compare(graph, read(graph, path))
        processor.image_processor.save_pretrained(folder)
        if part == "all":
            processor.tokenizer.save_pretrained(folder)
            write_text(folder / "chat_template.jinja", processor.chat_template)
        write_text(folder / "graphs.json", json.dumps(_description(model, graphs, num_tokens), indent=1) + "\n")
        write_manifest(folder)
    return out


def _graphs(model: AcFormerForConditionalGeneration, part: str, num_tokens: int) -> Iterator[Graph]:
    config, embedding = model.config, model.get_input_embeddings()
    side, width = config.image_size, config.text_config.hidden_size

    def pixels(batch: int, length: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 3, side, side, generator=_seeded()),)

    def ids(batch: int, length: int) -> tuple[Tensor, ...]:
        return (torch.randint(embedding.weight.shape[0], (batch, length), generator=_seeded()),)

    def embeds(batch: int, length: int) -> tuple[Tensor, ...]:
        tokens = embedding(ids(batch, length)[0])
        return tokens, torch.ones(batch, length, dtype=torch.int64)

    vision = Vision(model, num_tokens).eval()
    with torch.no_grad():
        given = tuple(vision(*pixels(2, 0)).shape)
    if given != (2, num_tokens, width):
        raise UsageError(f"the connector gives visual tokens of shape {given}, not {(2, num_tokens, width)}")
    yield Graph("vision", vision, ("pixel_values",), "visual_tokens", pixels, has_length=False)
    if part == "all":
        yield Graph("embed_tokens", Embedding(model).eval(), ("input_ids",), "inputs_embeds", ids)
        inputs = ("inputs_embeds", "attention_mask")
        yield Graph("language_model", LanguageModel(model).eval(), inputs, "logits", embeds)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _program(graph: Graph) -> Any:
    return torch.export.export(graph.module, graph.example(2, 12), dynamic_shapes=graph.dynamic_shapes)


def _write_torch(graph: Graph, folder: Path) -> Path:
    path, program = folder / f"{graph.name}.pt2", _program(graph)
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop(TRACE, None)
    torch.export.save(program, path)
    return path


def _read_torch(graph: Graph, path: Path) -> Callable[..., Tensor]:
    return torch.export.load(path).module()


def _write_onnx(graph: Graph, folder: Path) -> Path:
    path = folder / f"{graph.name}.onnx"
    made: Any = torch.onnx.export(
        graph.module,
        graph.example(2, 12),
        dynamo=True,
        dynamic_shapes=graph.dynamic_shapes,
        output_names=[graph.output],
        verbose=False,
    )
    for nodes in (made.model.graph.all_nodes(), *(one.all_nodes() for one in made.model.functions.values())):
        for node in nodes:
            node.metadata_props.pop(f"pkg.torch.onnx.{TRACE}", None)
    made.save(path)  # weights of more than 2 GB go into a file beside it
    return path


def _read_onnx(graph: Graph, path: Path) -> Callable[..., Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(
        session.run(None, dict(zip(names, (one.numpy() for one in inputs), strict=True)))[0]
    )


def _compare(graph: Graph, run: Callable[..., Tensor]) -> None:
    """`UsageError` unless the graph gives what the model gives, at a batch and a length that it was not made with."""
    for batch, length in ((1, 7), (3, 20)):
        inputs = graph.example(batch, length)
        wanted, found = graph.module(*inputs), run(*inputs)
        if wanted.shape != found.shape:
            raise UsageError(f"the graph of {graph.name} gives {tuple(found.shape)}, the model {tuple(wanted.shape)}")
        worst, largest = float((found - wanted).abs().max()), max(1.0, float(wanted.abs().max()))
        if not worst <= TOLERANCE * largest:
            raise UsageError(
                f"the graph of {graph.name} differs from the model by {worst} in values of up to {largest}"
            )


def _description(model: AcFormerForConditionalGeneration, graphs: list[Graph], num_tokens: int) -> dict[str, Any]:
    config = model.config
    return {
        "graphs": {graph.name: {"inputs": graph.inputs, "output": graph.output} for graph in graphs},
        "num_visual_tokens": num_tokens,
        "num_vision_tokens": config.num_vision_tokens,
        "image_size": config.image_size,
        "image_token_id": config.image_token_id,
        "connector": config.connector,
        "tolerance": TOLERANCE,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' notices, on what is missing beside what is used, are for their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
