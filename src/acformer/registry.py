"""Names and what they stand for: the library's own, and those of installed packages.

A package offers its own by an entry point, so that the command line, worker processes and a fresh process that loads a
checkpoint know it without a line of code; a checkpoint itself never names code.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from acformer.errors import UsageError, unknown_name

T = TypeVar("T")


class Registry(dict[str, T], Generic[T]):
    """A dict of exact names; one that is not in it is looked for among the entry points of `group`.

    Args:
        what: what a name stands for, as errors say it: `connector`.
        group: of the entry points, `acformer.connectors`.
        own: what is there from the start.
    """

    def __init__(self, what: str, group: str, own: Mapping[str, T]):
        super().__init__(own)
        self.what, self.group = what, group

    def __missing__(self, name: str) -> T:
        """From an installed package, which is imported now.

        Raises:
            UsageError: nobody has it, or the package cannot be imported.
        """
        for entry in entry_points(group=self.group, name=name):
            try:
                self[name] = entry.load()
            except Exception as error:  # whatever the package does when it is imported
                told = f"{type(error).__name__}: {error}"
                raise UsageError(f"{self.what} {name!r}, {entry.value}, cannot be imported: {told}") from error
            return self[name]
        unknown = unknown_name(self.what, name, self.names())
        raise UsageError(f"{unknown} (your own: register it, or install its package, entry point {self.group!r})")

    def names(self) -> list[str]:
        """All that can be asked for, sorted."""
        return sorted({*self, *entry_points(group=self.group).names})
