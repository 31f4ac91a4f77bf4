"""The optimizer: which weights decay, how each step changes them, and its state under the names of the parameters."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalith.optim.adam import FusedAdamW
from megalith.optim.compact import CompactAdamW
from megalith.optim.settings import OptimizerConfig

# The tensors that an optimizer keeps for each parameter, each of the parameter's shape.
MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
FUSED_DEVICES = ("cpu", "cuda")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay pulls at a parameter: not at biases and norm weights, as in Megatron-LM.

    A norm's weight is known by its single dimension, a bias by its name too (experts keep theirs in one table).
    """
    return parameter.dim() > 1 and not name.rsplit(".", 1)[-1].endswith("bias")


def decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters with and without weight decay, each in the model's order, shared ones once."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decaying = [parameter for name, parameter in trained if decays(name, parameter)]
    return decaying, [parameter for name, parameter in trained if not decays(name, parameter)]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, same_on_every_cut: bool = False
) -> torch.optim.Optimizer:
    """AdamW or SGD over the model's parameters in two groups, the first with weight decay; its learning rate is 0.

    adam: bias correction and decoupled decay, p -= lr (m' / (sqrt(v') + eps) + decay p) (Loshchilov & Hutter 2019,
    arXiv:1711.05101). sgd: momentum, and decay added to the gradient. Build it after the model was laid over ranks, for
    it keeps the parameters it is given, and set the rate before each step.

    same_on_every_cut: the fused CPU kernel rounds the last elements of a tensor differently from the others (by 1e-7),
    so that weights depend on how a tensor is cut over ranks. True avoids it, at four times the time on the CPU.

    Raises ValueError if the optimizer is unknown.
    """
    decaying, constant = decay_groups(model)
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": constant, "weight_decay": 0.0},
    ]
    fused = _can_fuse([*decaying, *constant], same_on_every_cut=same_on_every_cut)
    if config.optimizer == "adam":
        betas = (config.adam_beta1, config.adam_beta2)
        if config.optimizer_state_dtype != "fp32":
            return CompactAdamW(groups, betas=betas, eps=config.adam_eps, kept_in=config.optimizer_state_dtype)
        if fused:
            return FusedAdamW(groups, lr=0.0, betas=betas, eps=config.adam_eps)
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.adam_eps, fused=False)
    if config.optimizer == "sgd":
        # torch's fused kernel knows nothing of weights that are shared out.
        fused = fused and not any(hasattr(parameter, "placements") for parameter in [*decaying, *constant])
        return torch.optim.SGD(groups, lr=0.0, momentum=config.sgd_momentum, fused=fused)
    raise ValueError(f"optimizer={config.optimizer!r} must be one of {', '.join(MOMENTS)}. Change --optimizer")


def _can_fuse(parameters: list[nn.Parameter], *, same_on_every_cut: bool) -> bool:
    """Whether one kernel can do the whole update; meta tensors, for one, have none."""
    devices = {parameter.device.type for parameter in parameters}
    return devices <= set(FUSED_DEVICES) and not (same_on_every_cut and "cpu" in devices)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step run at that rate, in both groups; in place."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Readable(NamedTuple):
    """A tensor of the optimizer. read: gives it where it is kept in fewer bits; tensor is then an outline (meta)."""

    tensor: Tensor
    read: Callable[[], Tensor] | None = None


def readable_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Readable]:
    """The optimizer's own tensors for a checkpoint, by the names `exp_avg.PARAMETER`, ...; moments in fewer bits as yet
    unread.

    Those of parameters that were never updated are made, as zeros, which is what the optimizer would start from. The
    others are the tensors themselves, so that a loader can fill them in place; `take_optimizer_tensors` must follow.
    The number of updates is not among them: see `num_updates`.
    """
    if isinstance(optimizer, CompactAdamW):
        return {
            f"{moment}.{name}": Readable(
                optimizer.outline(parameter), functools.partial(optimizer.unpacked, parameter, moment)
            )
            for name, parameter in _updated_parameters(model, optimizer)
            for moment in MOMENTS["adam"]
        }
    return {
        f"{moment}.{name}": Readable(optimizer.state[parameter][moment])
        for name, parameter in _updated_parameters(model, optimizer)
        for moment in _moments_of(optimizer)
    }


def take_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take over what a loader has filled in of `readable_tensors`; those that were filled in place are left alone.

    tensors: what lies here of each, by the same names.
    """
    if isinstance(optimizer, CompactAdamW):
        for name, parameter in _updated_parameters(model, optimizer):
            for moment in MOMENTS["adam"]:
                optimizer.pack(parameter, moment, tensors[f"{moment}.{name}"])


def num_updates(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """How many steps the optimizer has taken; skipped ones do not count. 0 for SGD, which keeps no count.

    Raises ValueError if some parameter took part in fewer steps than others.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return 0
    kept = {name: optimizer.state[p]["step"] for name, p in _updated_parameters(model, optimizer)}
    # Together, for each read from a device waits for it.
    counts = dict(zip(kept, torch.stack(list(kept.values())).tolist() if kept else (), strict=True))
    most = int(max(counts.values(), default=0))
    missed = [name for name, count in counts.items() if count != most]
    if missed:
        raise ValueError(
            f"{', '.join(missed[:3])} got no gradient in some steps ({len(missed)} of {len(counts)} parameters): every "
            "trained parameter must get one in each step, or have requires_grad off"
        )
    return most


def set_num_updates(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    """Go on as after that many steps; in place. With `readable_tensors` filled this restores the optimizer."""
    if not isinstance(optimizer, torch.optim.SGD):
        for _, parameter in _updated_parameters(model, optimizer):
            optimizer.state[parameter]["step"].fill_(count)


def _moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    if isinstance(optimizer, torch.optim.SGD):
        return MOMENTS["sgd"] if optimizer.defaults["momentum"] else ()
    return MOMENTS["adam"]


def _updated_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """The optimizer's parameters with their names, each with its state made if it has none yet."""
    kept = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) not in kept:
            continue
        if isinstance(optimizer, CompactAdamW):
            optimizer.kept(parameter)
            yield name, parameter
            continue
        state = optimizer.state[parameter]
        for moment in _moments_of(optimizer):
            if state.get(moment) is None:
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)
        if "step" not in state and not isinstance(optimizer, torch.optim.SGD):
            # A fused kernel counts on the parameter's device, the others on the host.
            device = parameter.device if optimizer.defaults["fused"] else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        yield name, parameter
