"""How parameters start: every layer records it per parameter, and `draw_weights` fills a model by name and counter.

A weight is a function of (seed, name, index in the whole weight) alone. So a model can be made on the meta device, laid
over ranks, given memory, and only then drawn, each rank its own shards: the weights are those of a single process.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from megalith.layers.random import fill_normal, fill_uniform, key


@dataclass(frozen=True)
class Initial:
    """The distribution of a parameter before training.

    scale: the standard deviation of a normal, the bound of a uniform in [-scale, scale], the value of a constant.
    """

    kind: Literal["normal", "uniform", "constant"]
    scale: float


ZEROS = Initial("constant", 0.0)
ONES = Initial("constant", 1.0)


def xavier(inputs: int, outputs: int) -> Initial:
    """Uniform with variance 2 / (inputs + outputs) (Glorot and Bengio 2010)."""
    return Initial("uniform", math.sqrt(6 / (inputs + outputs)))


class Shard(NamedTuple):
    """The part of a parameter that is held here: its values, the shape of the whole, where in it the part begins."""

    part: Tensor
    whole: Sequence[int]
    offset: Sequence[int]


class Layer(Protocol):
    """What every module with parameters of its own keeps for `draw_weights`: how each starts, by its name there."""

    initial: dict[str, Initial]


def whole_parameter(parameter: nn.Parameter) -> Shard:
    """The shard of a parameter that is not cut."""
    return Shard(parameter, parameter.shape, [0] * parameter.dim())


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int, *, shard_of: Callable[[nn.Parameter], Shard] = whole_parameter) -> None:
    """Fill all parameters of the model in place with their values before training.

    shard_of says what of each parameter lies on this rank. A parameter with several names is drawn under its first.
    """
    drawn: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in drawn:
                continue
            drawn.add(id(parameter))
            initial = cast(Layer, module).initial[name]
            shard = shard_of(parameter)
            where = key(seed, "weight", f"{module_name}.{name}".removeprefix("."))
            if initial.kind == "normal":
                fill_normal(shard.part, where, std=initial.scale, whole=shard.whole, offset=shard.offset)
            elif initial.kind == "uniform":
                fill_uniform(shard.part, where, bound=initial.scale, whole=shard.whole, offset=shard.offset)
            else:
                shard.part.fill_(initial.scale)
