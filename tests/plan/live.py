"""The most bytes that tensors held at once, counted as they come and go: exact on any device, also where none counts.

For measuring only: every operation passes through Python.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalith.optim.local import local_part


class LiveBytes(TorchDispatchMode):
    """While entered, counts the memory of every tensor that an operation makes until it is given back.

    held: tensors that are there already. Of a tensor that lies on several ranks its part here counts. What an operation
    needs inside and gives back itself is not seen.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0  # bytes
        self._known: dict[int, int] = {}  # bytes of each storage, by its address
        self._resize: Callable[..., Any] = UntypedStorage.resize_
        for tensor in held:
            self._add(local_part(tensor).untyped_storage())

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                for part in (leaf._indices(), leaf._values()) if leaf.is_sparse else (local_part(leaf),):
                    self._add(part.untyped_storage())
        return made

    def __enter__(self) -> Self:
        # FSDP gives memory back, and takes it again, without an operation.
        def resize(storage: UntypedStorage, size: int) -> Any:
            resized = self._resize(storage, size)
            if storage._cdata in self._known:
                self._hold(storage._cdata, size)
            return resized

        vars(torch)["UntypedStorage"].resize_ = resize
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        vars(torch)["UntypedStorage"].resize_ = self._resize

    def _add(self, storage: UntypedStorage) -> None:
        address = storage._cdata
        if address in self._known:
            return
        self._hold(address, storage.nbytes())
        weakref.finalize(storage, self._drop, address)

    def _hold(self, address: int, size: int) -> None:
        self.live += size - self._known.get(address, 0)
        self._known[address] = size
        self.peak = max(self.peak, self.live)

    def _drop(self, address: int) -> None:
        self.live -= self._known.pop(address, 0)


def tensors_in(state: Mapping[Any, Any]) -> list[Tensor]:
    """All tensors of an optimizer's state, nested ones too."""
    return [leaf for leaf in tree_leaves(list(state.values())) if isinstance(leaf, Tensor)]
