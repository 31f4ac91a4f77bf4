"""The operations that PyTorch is asked for, as they come."""

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """While entered, notes each operation and what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[Any, Sequence[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self._made.append((func, args))
        return func(*args, **(kwargs or {}))

    def of(self, function: Any) -> list[Sequence[Any]]:
        """What an operation was given each time."""
        return [args for called, args in self._made if called is function]
