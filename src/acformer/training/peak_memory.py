"""What torch runs and what it holds: ATen calls and peak bytes of a piece of code, the same on every machine.

Unlike the resident set size this counts tensors, byte for byte, as they come and go. Operations that only give
another view of a tensor count as calls. What an operation uses inside itself and frees again is not seen.
"""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """`with PeakMemory() as memory:` counts what runs inside.

    calls: ATen operations, those of a backward pass too.
    peak_bytes: the most bytes that tensors made inside held at one time; inputs and weights are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.peak_bytes = 0
        self._bytes = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        given = [leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._hold(leaf, given)
        return output

    def _hold(self, tensor: Tensor, given: list[Any]) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known or any(storage is other for other in given):
            return  # a view, or a result written into an argument
        self._known.add(storage)
        self._bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, nbytes: int) -> None:
        self._bytes -= nbytes
