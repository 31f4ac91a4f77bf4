"""The most bytes that tensors held at once, counted as they come and go: exact on any device, also where none counts.

For measuring only: every operation passes through Python.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While entered, counts the memory of every tensor that an operation makes until it is given back.

    held: tensors that are there already. What an operation needs inside and gives back itself is not seen.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0  # bytes
        self._known: set[int] = set()
        for tensor in held:
            self._add(tensor.untyped_storage())

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                for part in (leaf._indices(), leaf._values()) if leaf.is_sparse else (leaf,):
                    self._add(part.untyped_storage())
        return made

    def _add(self, storage: UntypedStorage) -> None:
        address = storage._cdata
        if address in self._known:
            return
        self._known.add(address)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def tensors_in(state: Mapping[Any, Any]) -> list[Tensor]:
    """All tensors of an optimizer's state, nested ones too."""
    return [leaf for leaf in tree_leaves(list(state.values())) if isinstance(leaf, Tensor)]
