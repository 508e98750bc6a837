"""Shapes checked as types: every function of a module as beartype and jaxtyping would have it.

As jaxtyping's import hook, except that what comes of it can be compiled with `fullgraph=True`. It lies in no
`conftest.py`: there are two of that name, and torch's guards look a function's module up by its name.
"""

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from types import FunctionType, ModuleType
from typing import Any

import torch
from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped


def check_types(*modules: ModuleType) -> None:
    """Check the shapes that the modules' functions and methods declare, wherever they have been imported to."""
    checked = {}
    for module in modules:
        classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        for owner in [module, *classes]:
            for name, value in list(vars(owner).items()):
                if isinstance(value, property):
                    setattr(owner, name, property(_checked(value.fget), doc=value.__doc__))
                elif _written_in(module, value):
                    checked[value] = _checked(value)
                    setattr(owner, name, checked[value])
    importers = [module for name, module in sys.modules.items() if name.startswith("acformer")]
    for importer in importers:
        for name, value in list(vars(importer).items()):
            if isinstance(value, FunctionType) and value in checked:
                setattr(importer, name, checked[value])


def _written_in(module: ModuleType, value: Any) -> bool:
    """A function of this very file, and not what @dataclass or @contextmanager made of it."""
    is_own = isinstance(value, FunctionType) and value.__code__.co_filename == module.__file__
    return is_own and not hasattr(value, "__wrapped__")


def _checked(function: Callable) -> Callable:
    """Checked in eager mode; the plain function where torch compiles or exports."""
    int_is_float = BeartypeConf(is_pep484_tower=True)
    with_checks = jaxtyped(function, typechecker=beartype(conf=int_is_float))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if torch.compiler.is_compiling() else with_checks)(*args, **kwargs)

    return call
