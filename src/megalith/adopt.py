"""A run takes over the weights of another, as far as its task says that they fit (Fit and Origin in task.py)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megalith.checkpoint.contents import check_contents
from megalith.checkpoint.directory import CheckpointError
from megalith.checkpoint.index import Index
from megalith.checkpoint.pieces import Piece
from megalith.checkpoint.store import Loaded, load_latest
from megalith.optim.local import local_part
from megalith.parallel.apply import Held
from megalith.task import Fit, Origin

# What must be the same in two families for their encoders to be the same.
ENCODER = (
    *("num_layers", "hidden_size", "num_attention_heads", "kv_channels", "max_position_embeddings"),
    *("padded_vocab_size", "tokenizer", "norm_after_residual"),
)


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
            if stored is None and self.fit.may_be_missing(name):
                continue
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


def begin_with(held: Mapping[str, Held], origin: Origin, *, identity: Mapping[str, Any], prefix: str) -> Loaded:
    """Give the parameters the values that the newest checkpoint of another family's run has for them; in place.

    identity: what weights of this run depend on. Raises ValueError for a run of another task, a model of other sizes,
    or if no checkpoint verifies.
    """
    # A value that several parameters take is read for each of them.
    rounds: list[dict[str, Held]] = [{}]
    for name, parameter in held.items():
        source = origin.source_of(name)
        if source is not None:
            if all(source in taken for taken in rounds):
                rounds.append({})
            next(taken for taken in rounds if source not in taken)[source] = parameter

    def pieces(index: Index, taken: Mapping[str, Held]) -> dict[str, Piece]:
        check_contents(index)
        if faults := list(_faults(index, origin, identity, taken, prefix=prefix)):
            raise ValueError(f"{origin.flag} = {origin.directory}: {'; '.join(faults)}")
        return {prefix + name: Piece(local_part(h.parameter.data), h.whole, h.offset) for name, h in taken.items()}

    for taken in rounds:
        try:
            loaded = load_latest(
                origin.directory,
                lambda index, taken=taken: pieces(index, taken),  # type: ignore[misc]
                may_stay_unread=lambda name: True,
            )
        except CheckpointError as error:
            raise ValueError(f"{origin.flag} = {origin.directory}: {error}") from error
        if loaded is None:
            raise ValueError(f"{origin.flag} = {origin.directory}: holds no checkpoint. Correct the path.")
    assert loaded is not None, "a model has parameters"
    return loaded


def _faults(
    index: Index, origin: Origin, identity: Mapping[str, Any], names: Iterable[str], *, prefix: str
) -> Iterator[str]:
    stored = index.state["model"]
    if stored.get("task") != origin.task:
        yield f"its task is {stored.get('task')}, not {origin.task}"
        return
    for name in ENCODER:
        if stored.get(name) != identity.get(name):
            yield f"{name} is {stored.get(name)} there and {identity.get(name)} in this run"
    if missing := [name for name in names if prefix + name not in index.tensors]:
        why = "" if stored.get("bert_binary_head", True) else ": it was trained with --bert-no-binary-head"
        yield f"it has no {', '.join(missing)}{why}"
