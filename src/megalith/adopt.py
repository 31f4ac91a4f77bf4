"""A fine-tuning takes over the weights of another run, as far as its task says that they fit (Fit in task.py)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megalith.checkpoint.index import Index
from megalith.checkpoint.pieces import Piece
from megalith.parallel.apply import Held, local_part
from megalith.task import Fit


class Adoption:
    """The weights held here and what of a checkpoint goes into them.

    Weights that begin anew are left as they were drawn. Weights of another size are read whole and put into place by
    `finish`. prefix: of the names of weights in a checkpoint.
    """

    def __init__(self, held: Mapping[str, Held], fit: Fit, *, prefix: str) -> None:
        self.fit = fit
        self._held = {name: h for name, h in held.items() if not fit.begins_anew(name)}
        self._prefix = prefix
        self._other_size: dict[str, Tensor] = {}

    def pieces(self, index: Index) -> dict[str, Piece]:
        """What to read. Raises ValueError for a weight that differs in more than its rows, or by far in these."""
        self._other_size = {}
        pieces: dict[str, Piece] = {}
        for name, held in self._held.items():
            stored = index.tensors.get(self._prefix + name)
            if stored is None or tuple(stored.shape) == held.whole:
                pieces[self._prefix + name] = Piece(local_part(held.parameter.data), held.whole, held.offset)
                continue
            shape = tuple(stored.shape)
            if len(shape) != len(held.whole) or shape[1:] != held.whole[1:]:
                raise ValueError(f"{name} is {shape} in the checkpoint and {held.whole} in this run")
            whole = torch.empty(shape, dtype=held.parameter.dtype)
            self._other_size[name] = whole
            pieces[self._prefix + name] = Piece(whole, shape, (0,) * len(shape))
        return pieces

    @torch.no_grad()
    def finish(self) -> None:
        """Put the weights of another size into place, once they are read. Raises ValueError if they cannot fit."""
        for name, whole in self._other_size.items():
            held = self._held[name]
            local = local_part(held.parameter.data)
            resized = self.fit.resized(name, whole, held.whole)
            for dim, first in enumerate(held.offset):
                resized = resized.narrow(dim, first, local.shape[dim])
            local.copy_(resized)
        self._other_size = {}
