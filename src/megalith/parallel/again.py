"""Keeping only what a function is given: what its operations would keep for the backward pass is computed again there.

torch.utils.checkpoint does the same, but imports the compiler: 140 MiB and a second of start-up that a run without it
does not need, and that is more than what recomputation saves of a small model.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _AllThereError(Exception):
    """Raised by the last tensor that is needed: nothing after it is computed."""


class _StandIn:
    """In place of a tensor that an operation would keep; tensor: what was computed again and not been taken yet."""

    __slots__ = ("__weakref__", "dtype", "shape", "tensor")

    def __init__(self, like: Tensor) -> None:
        self.shape, self.dtype = like.shape, like.dtype
        self.tensor: Tensor | None = None


def compute_again(function: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What the function gives, which is called a second time, as far as needed, at the first backward pass through it.

    It must be the same function of the same tensors then: RuntimeError if these were changed in place, or if it keeps
    something else than the first time.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    stand_ins: list[weakref.ref[_StandIn]] = []
    given = [tensor for tensor in args if isinstance(tensor, Tensor)]
    versions = [tensor._version for tensor in given]

    def leave(x: Tensor) -> _StandIn:
        stand_in = _StandIn(x)
        stand_ins.append(weakref.ref(stand_in))
        return stand_in

    def take(stand_in: _StandIn) -> Tensor:
        if stand_in.tensor is None:
            if versions != [tensor._version for tensor in given]:
                raise RuntimeError("what is needed to compute a block again was changed in place")
            _fill(stand_ins, lambda: function(*args, **kwargs))
        tensor, stand_in.tensor = stand_in.tensor, None
        assert tensor is not None
        return tensor

    with saved_tensors_hooks(leave, take):
        return function(*args, **kwargs)


def _fill(stand_ins: "Sequence[weakref.ref[_StandIn]]", run: Callable[[], object]) -> None:
    """Give each stand-in that is still needed its tensor."""
    waiting = iter(stand_ins)
    left = len(stand_ins)

    def put(x: Tensor) -> Tensor:
        nonlocal left
        x = x.detach()  # an operation that keeps what it gives would else hold itself
        stand_in = next(waiting)()
        left -= 1
        if stand_in is not None:
            if (stand_in.shape, stand_in.dtype) != (x.shape, x.dtype):
                kinds = [f"{list(kept.shape)} in {kept.dtype}" for kept in (stand_in, x)]
                raise RuntimeError(f"what is computed again differs: {kinds[1]} in place of {kinds[0]}")
            stand_in.tensor = x
        if left == 0:
            raise _AllThereError
        return x

    with suppress(_AllThereError), torch.enable_grad(), saved_tensors_hooks(put, lambda x: x):
        run()
    if left:
        raise RuntimeError(f"what is computed again keeps {len(stand_ins) - left} tensors in place of {len(stand_ins)}")
