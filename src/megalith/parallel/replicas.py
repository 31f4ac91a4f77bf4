"""Whether ranks that hold the same still hold the same bits.

Replicas start alike and get the same sums, so they stay alike; a bit that flips in one rank's memory makes it another
model, of which no loss tells. A digest of every tensor, read once at the speed of memory, shows it, and where three or
more hold the same, the one that differs from most is named.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalith.optim.local import local_part
from megalith.parallel.apply import TIED, Laid
from megalith.parallel.digest import digest
from megalith.parallel.mesh import Layout
from megalith.parallel.settings import ParallelConfig


def digests_held(
    laid: Laid, optimizer: torch.optim.Optimizer, layout: Layout, config: ParallelConfig
) -> dict[str, dict[str, int]]:
    """The digests of this rank's weights and optimizer state, by who else holds the same, then by name.

    Ranks that give the same first key must give the same digests. Waits for the device once.
    """
    found: dict[tuple[str, str], Tensor] = {}
    for part in laid.parts.values():
        for name, parameter in part.named_parameters():
            found[_holders(name, laid, layout, config, of_weights=True), f"weight.{name}"] = digest(
                local_part(parameter)
            )
    for name, held in laid.trained.held.items():
        holders = _holders(name, laid, layout, config, of_weights=False)
        for kept, tensor in _tensors(optimizer.state.get(held.parameter, {})):
            found[holders, f"{kept}.{name}"] = digest(local_part(tensor))
    if not found:
        return {}
    device = next(iter(found.values())).device
    numbers = torch.stack([number.to(device, non_blocking=True) for number in found.values()]).tolist()
    sorted_out: dict[str, dict[str, int]] = {}
    for (holders, name), number in zip(found, numbers, strict=True):
        sorted_out.setdefault(holders, {})[name] = number
    return sorted_out


def _holders(name: str, laid: Laid, layout: Layout, config: ParallelConfig, *, of_weights: bool) -> str:
    """Which ranks hold the same of a parameter, or of what the optimizer keeps of it: a name that they all give it."""
    replica = layout.place("data") * layout.context + layout.place("context")
    shard = "0"
    if config.data_parallel_sharding in ("gradients", "parameters"):
        shard = str(replica % (config.data_parallel_shard_size or layout.data * layout.context))
    elif config.data_parallel_sharding == "optimizer" and not of_weights:
        shard = f"{replica} of the optimizer"
    stage = "ends" if name == TIED and laid.has_tied_copy else str(layout.place("pipeline"))
    tensor = "all" if laid.cuts[name].is_copy else str(layout.place("tensor"))
    return f"stage {stage}, tensor {tensor}, shard {shard}"


def _tensors(state: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    """The tensors of an optimizer's state of a parameter, moments in few bits too, by name."""
    found = []
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor):
            found.append((prefix + name, value))
        elif isinstance(value, Mapping):
            found += _tensors(value, f"{prefix}{name}.")
    return found


def folded(digests: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """One digest for all that the same ranks hold."""
    return {
        holders: hashlib.sha256(repr(sorted(named.items())).encode()).hexdigest() for holders, named in digests.items()
    }


def all_alike(tables: Sequence[Mapping[str, str]]) -> bool:
    """Whether no two ranks that hold the same differ, from what `folded` gives on all ranks."""
    pairs = {pair for table in tables for pair in table.items()}
    return len(pairs) == len({holders for holders, _ in pairs})


class Difference(NamedTuple):
    """Ranks whose bits are not those of the others that should hold the same."""

    ranks: tuple[int, ...]  # the few that differ from most; all that should be alike, where no number is the most
    is_minority: bool
    names: tuple[str, ...]  # of the tensors


def differences(tables: Sequence[Mapping[str, Mapping[str, int]]]) -> list[Difference]:
    """Who differs in what, from the digests of all ranks. A tie with a rank that a majority convicts is no news."""
    names_of: dict[tuple[tuple[int, ...], bool], list[str]] = {}
    for holders, name in sorted({(h, name) for table in tables for h, named in table.items() for name in named}):
        held = {rank: table[holders].get(name) for rank, table in enumerate(tables) if holders in table}
        (most, count), *others = Counter(held.values()).most_common()
        if others:
            is_minority = 2 * count > len(held)
            ranks = tuple(rank for rank, number in held.items() if not is_minority or number != most)
            names_of.setdefault((ranks, is_minority), []).append(name)
    convicted = {rank for ranks, is_minority in names_of if is_minority for rank in ranks}
    return [
        Difference(ranks, is_minority, tuple(dict.fromkeys(names)))
        for (ranks, is_minority), names in names_of.items()
        if is_minority or not convicted & set(ranks)
    ]
