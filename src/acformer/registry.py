"""Names and what they stand for, and the options that each of them takes.

A package offers its own by an entry point, so that the command line, worker processes and a fresh process that loads a
checkpoint know it without a line of code; a checkpoint itself never names code.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Generic, NamedTuple, TypeVar, Union, get_args, get_origin

from acformer.errors import UsageError, unknown_name

T = TypeVar("T")


class Alias(NamedTuple):
    """Another name for `name`, under which these options have other defaults."""

    name: str
    options: Mapping[str, Any] = MappingProxyType({})


class Registry(dict[str, T], Generic[T]):
    """A dict of exact names; one that is not in it is looked for among the entry points of `group`.

    Args:
        kind: what a name stands for, as errors say it: `connector`.
        group: of the entry points, `acformer.connectors`.
        own: what is there from the start.
        aliases: further names; they can be asked for like any other, but are not among `names()`.
    """

    def __init__(self, kind: str, group: str, own: Mapping[str, T], aliases: Mapping[str, Alias] | None = None):
        super().__init__(own)
        self.kind, self.group, self.aliases = kind, group, dict(aliases or {})

    def __missing__(self, name: str) -> T:
        """What an alias stands for, or what an installed package offers, which is imported now.

        Raises:
            UsageError: nobody has it, or the package cannot be imported.
        """
        if name in self.aliases:
            return self[self.aliases[name].name]
        for entry in entry_points(group=self.group, name=name):
            try:
                self[name] = entry.load()
            except Exception as error:  # whatever the package does when it is imported
                reason = f"{type(error).__name__}: {error}"
                raise UsageError(f"{self.kind} {name!r}, {entry.value}, cannot be imported: {reason}") from error
            return self[name]
        unknown = unknown_name(self.kind, name, {*self.names(), *self.aliases})
        raise UsageError(f"{unknown} (your own: register it, or install its package, entry point {self.group!r})")

    def resolve(self, name: str) -> Alias:
        """The name that `name` is an alias of, with the options that it sets; of any other, itself and no options."""
        return Alias(name) if name in self else self.aliases.get(name, Alias(name))

    def names(self) -> list[str]:
        """All that can be asked for but the aliases, sorted."""
        return sorted({*self, *entry_points(group=self.group).names})

    def listing(self, describe: Callable[[str], tuple[str, str]]) -> str:
        """Two lines a name, as `describe` gives them, then the aliases; a package that cannot be imported says so."""
        width = max(map(len, [*self.names(), *self.aliases]))
        lines = []
        for name in self.names():
            try:
                first, second = describe(name)
            except UsageError as error:
                first, second = str(error), ""
            lines += [f"{name:<{width}} {first}", f"{'':<{width}} {second}".rstrip()]
        for other, (name, options) in sorted(self.aliases.items()):
            set_to = " and ".join(f"{key}={value}" for key, value in options.items())
            lines.append(f"{other:<{width}} another name for {name}{' with ' if set_to else ''}{set_to}")
        return "\n".join(line for line in lines if line)


def options_of(factory: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function or class; of a class that passes `**kwargs` on, its parent's too."""
    found: dict[str, inspect.Parameter] = {}
    classes = factory.__mro__ if isinstance(factory, type) else ()
    for function in [vars(cls)["__init__"] for cls in classes if "__init__" in vars(cls)] or [factory]:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        found |= {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def check_options(what: str, factory: Callable, options: Mapping[str, Any]) -> None:
    """Whether `factory` takes these options: each is known, of the annotated type, and in range.

    A number must be positive, or not below its default where that is 0 or less.

    Raises:
        UsageError: an option that does not exist (with the nearest one that does), or a value that does not fit.
    """
    known = options_of(factory)
    for key, value in options.items():
        if key not in known:
            raise unknown_name(f"option of {what}", key, known)
        default = known[key].default
        low = default if type(default) in (int, float) and default <= 0 else None
        check_value(f"option {key} of {what}", known[key].annotation, value, low=low, positive=low is None)


def check_value(what: str, hint: Any, value: Any, *, low: float | None = None, positive: bool = False) -> None:
    """`UsageError` unless the value is of the hinted type and, where it is a number, finite and in range.

    As in YAML and JSON an int may stand for a float and a list for any sequence; a bool is no number.

    Args:
        what: the first words of the message, `option depth of connector 'acformer'`.
        hint: a type, `list[int]` or a union of them; what else a hint may be is not checked.
        value: what was given.
        low: the least number that is allowed.
        positive: only numbers above 0 are allowed.
    """
    kinds = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    fits = any(_is_a(kind, value) for kind in kinds)
    if fits and type(value) in (int, float):
        fits = -math.inf < value < math.inf and not (positive and value <= 0) and (low is None or value >= low)
    if not fits:
        is_number = bool({int, float} & {*kinds})
        wanted = " or ".join(map(_type_name, kinds))
        wanted = f"positive {wanted}" if positive and is_number else wanted
        article = "an" if wanted[0] in "aeiou" else "a"
        limit = f" of at least {low}" if low is not None and is_number else ""
        raise UsageError(f"{what} must be {article} {wanted}{limit}, got {value!r}")


def _is_a(kind: Any, value: Any) -> bool:
    origin = get_origin(kind) or kind
    if origin is None or origin is NoneType:
        return value is None
    if origin in (bool, int, float):
        return type(value) is origin or (origin is float and type(value) is int)
    if origin in (Sequence, list, tuple):
        items = get_args(kind)[:1]
        return isinstance(value, list | tuple) and all(_is_a(item, part) for item in items for part in value)
    return origin is Any or not isinstance(origin, type) or isinstance(value, origin)


def _type_name(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin is None or origin is NoneType:
        return "nothing"
    if origin in (Sequence, list, tuple):
        return f"list of {_type_name(get_args(kind)[0])}s" if get_args(kind) else "list"
    return getattr(origin, "__name__", str(origin))
