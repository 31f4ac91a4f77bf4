"""How Hugging Face's files hold weights: what stands together in ours is apart in theirs, group of heads by group, and
the other way round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalith.config import Run
from megalith.models.shape import key_heads, shape_of


@dataclass(frozen=True)
class Names:
    """What a kind calls weights, by our names without .weight or .bias.

    in_block: of those of a block, to be put behind what stands in blocks for its stack; several are parts that ours
    joins. {last}: what last has for the stack. stacked: of these all parts lie one behind the other in one tensor.
    """

    whole: Mapping[str, str]
    blocks: Mapping[str, str]
    in_block: Mapping[str, tuple[str, ...]]
    last: Mapping[str, str] = field(default_factory=dict)
    stacked: tuple[str, ...] = ()
    turns: bool = False  # matrices of blocks are [inputs, outputs]
    prefix: str = ""  # what files of the model without its head leave out


@dataclass(frozen=True)
class Stored:
    """How their files hold one weight of ours: the names of its tensors, and how these become it."""

    names: tuple[str, ...]
    shares: tuple[int, ...]  # heads of a group in each part; empty: there are no parts
    groups: int
    is_stacked: bool
    is_turned: bool


def stored(names: Names, run: Run, name: str) -> Stored:
    """How the files hold a weight of ours, by its name."""
    module, _, what = name.rpartition(".")
    groups, heads = key_heads(run.model), shape_of(run.model).num_heads
    if module in names.whole:
        return Stored((f"{names.whole[module]}.{what}",), (), groups, False, False)
    stack, number, inside = module.split(".", 2)
    parts = [part.format(last=names.last.get(stack, "")) for part in names.in_block[inside]]
    is_stacked = inside in names.stacked
    shares = (heads // groups, 1, 1) if is_stacked or len(parts) == 3 else (1,) * len(parts) if len(parts) > 1 else ()
    base = names.blocks[stack].format(number)
    return Stored(tuple(f"{base}{part}.{what}" for part in parts), shares, groups, is_stacked, names.turns)


def made_ours(found: Sequence[Tensor], how: Stored) -> Tensor:
    """A weight of ours of the tensors that hold it. Raises ValueError if heads cannot share their rows."""
    tensors = [tensor.t() if how.is_turned and tensor.dim() == 2 else tensor for tensor in found]
    if not how.shares:
        return tensors[0]
    if how.is_stacked:
        unit, left = divmod(tensors[0].shape[0], sum(how.shares))
        tensors = [] if left else [*tensors[0].split([share * unit for share in how.shares])]
    if not tensors or any(tensor.shape[0] % how.groups for tensor in tensors):
        raise ValueError(f"{how.names[0]} has {found[0].shape[0]} rows, which its heads cannot share")
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        raise ValueError(f"{' and '.join(how.names)} have rows of different lengths")
    return torch.cat([tensor.unflatten(0, (how.groups, -1)) for tensor in tensors], 1).flatten(0, 1)


def made_theirs(weight: Tensor, how: Stored) -> dict[str, Tensor]:
    """The tensors of their files, by name, that hold a weight of ours."""
    parts = [weight]
    if how.shares:
        grouped = weight.unflatten(0, (how.groups, -1))
        unit = grouped.shape[1] // sum(how.shares)
        parts = [part.flatten(0, 1) for part in grouped.split([share * unit for share in how.shares], 1)]
    if how.is_stacked:
        parts = [torch.cat(parts)]
    turned = [part.t() if how.is_turned and part.dim() == 2 else part for part in parts]
    return dict(zip(how.names, turned, strict=True))
