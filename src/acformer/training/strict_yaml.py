"""YAML as a recipe wants it: no key twice, no aliases that multiply, one line for whatever is wrong.

An alias (`*name`) is a copy here: PyYAML gives the same object in both places, and an override must change one of them.
"""

from typing import Any

import yaml

from acformer.errors import UsageError, translated

LIMIT = 1_000_000
"""Characters of a document, with every alias written out: a dozen lines of aliases can stand for billions."""


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document; `UsageError` that names `where` it is from."""
    with translated(f"not valid YAML: {where}", UsageError):
        try:
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
            if root is None:
                return None
            if _num_characters(root, where, {}) > LIMIT:
                raise UsageError(f"too large for a recipe: {where} stands for more than {LIMIT:,} characters")
            return _copied(loader.construct_document(root))
        except RecursionError as error:
            raise UsageError(f"nested too deeply: {where}") from error


def _num_characters(node: yaml.Node, where: str, known: dict[int, int]) -> int:
    """Of a node with its aliases written out, each node looked at once; `UsageError` for a key that is there twice."""
    if id(node) not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, where)
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        known[id(node)] = 1 + own + sum(_num_characters(part, where, known) for part in inner)
    return known[id(node)]


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise UsageError(f"not valid YAML: {where}: key {key.value!r} is there twice (line {line})")
            seen.add((key.tag, key.value))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value
