"""A model whose code lies beside its weights: `trust_remote_code=True` runs it where this package is not installed.

transformers reads modules of one flat folder, which import one another as `from .name import ...`. So every module that
the three classes need is copied under a flat name, and its imports of this package are rewritten. What only a whole
installation has (downloads, the loading of encoders by name, cards, the Triton kernel) stays out: an `if` or a function
that imports it goes, too. All other lines are the package's own.
"""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import acformer
from acformer.errors import UsageError
from acformer.files import whole_folder, write_text
from acformer.hf.auto_map import CLASSES
from acformer.hf.card import CARD
from acformer.hf.checkpoints import MANIFEST, load_model, model_folder, write_manifest

PACKAGE = Path(acformer.__file__).parent
LEFT_OUT = ("acformer.fetch", "acformer.vision.load", "acformer.anchors.kernel", "acformer.hf.card")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
SHAPES = "acformer_shapes"
SHAPES_MODULE = '''"""Stands in for jaxtyping: the shapes in the signatures are for readers."""


class _Shaped:
    def __class_getitem__(cls, item):
        return item[0] if isinstance(item, tuple) else item


Bool = Float = Int = Shaped = _Shaped
'''
SENTENCE = "this model needs nothing but transformers and torch: its code is in this folder"


def export_self_contained(name: str, out: Path) -> Path:
    """Copy a model of ours to `out`, with all the code that it needs.

    Raises:
        CheckpointError: no model of ours there, or a damaged one.
        UsageError: `out` is there already, or the model has parts of another package (a connector, a timm encoder),
            which would not be there.
    """
    if out.exists():
        raise UsageError(f"{out} is there already: name another --out")
    model, processor = load_model(name)
    _refuse_plugins(model.config)
    out.parent.mkdir(parents=True, exist_ok=True)
    source = Path(model_folder(name))
    with whole_folder(out) as part:
        if any((source / weights).is_file() for weights in WEIGHTS):
            for path in source.iterdir():
                if path.is_file() and path.name != MANIFEST and path.suffix != ".py":
                    shutil.copy(path, part / path.name)
        else:  # of a hub, or of a folder that holds an adapter
            model.save_pretrained(part)
            processor.save_pretrained(part)
        for module, text in flat_modules().items():
            write_text(part / f"{module}.py", text)
        _amend_card(part / CARD)
        write_manifest(part)
    return out


def flat_modules() -> dict[str, str]:
    """By flat name, the text of every module that the model's classes need."""
    waiting, found = [f"acformer.hf.{name}" for name in CLASSES], {}
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = _without_left_out(_source(module).read_text(encoding="utf-8"))
            waiting += [node.module or "" for node in _own_imports(ast.parse(found[module]))]
    return {SHAPES: SHAPES_MODULE, **{flat_name(module): _rewritten(text) for module, text in found.items()}}


def flat_name(module: str) -> str:
    """`acformer.connectors.base` -> `acformer_connectors_base`; the three that the auto_map names keep their own."""
    last = module.rpartition(".")[2]
    return last if last in CLASSES else module.replace(".", "_")


def _source(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _own_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "acformer":
            yield node


def _without_left_out(text: str) -> str:
    """Without the innermost `if`s and functions that import what is left out."""
    lines = text.splitlines(keepends=True)
    for node in _around_left_out(ast.parse(text)):
        first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
        last = node.body[-1].end_lineno or first
        lines[first - 1 : last] = [""] * (last - first + 1)
    return "".join(lines)


def _around_left_out(tree: ast.Module) -> Iterator[ast.If | ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.FunctionDef):
            own = [one.module or "" for one in node.body if isinstance(one, ast.ImportFrom)]
            if any(module == out or module.startswith(f"{out}.") for module in own for out in LEFT_OUT):
                yield node


def _rewritten(text: str) -> str:
    """With imports of the package as flat ones; only statements, not what strings hold."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (module := node.module):
            flat = {"acformer": flat_name(module), "jaxtyping": SHAPES}.get(module.partition(".")[0])
            if flat is not None:
                old, new = f"from {module} import", f"from .{flat} import"
                lines[node.lineno - 1] = lines[node.lineno - 1].replace(old, new, 1)
    return "".join(lines)


def _refuse_plugins(config: object) -> None:
    from acformer.connectors import CONNECTORS
    from acformer.hf.fusion import FUSIONS

    for what, registry, name in (("connector", CONNECTORS, "connector"), ("fusion", FUSIONS, "fusion")):
        chosen = registry[getattr(config, name)]
        if chosen.__module__.partition(".")[0] != "acformer":
            raise UsageError(f"{what} {getattr(config, name)!r} is of another package, which is not exported along")


def _amend_card(path: Path) -> None:
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        write_text(path, text.replace("`pip install acformer`, then\n", f"{SENTENCE[0].upper()}{SENTENCE[1:]}.\n"))
