"""What stands in one file of a Megatron-LM checkpoint beside its name: reading it into ours, and making it of ours.

megatron.py says which parameters a file has; here are the trees around them: weights, the optimizer in Megatron-LM's
two layouts (fp32, and 16 bits with fp32 main weights), the schedule, the loss scale and the generators' states.
"""

import argparse
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megalith.checkpoint.foreign import TensorRef
from megalith.checkpoint.megatron import FORMER, VERSION, Grid, Keys, Part, Tree, chunk_names, in_optimizer, parts_of
from megalith.optim.groups import MOMENTS
from megalith.optim.schedule import Schedule, learning_rate
from megalith.optim.settings import OptimizerConfig

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Found(NamedTuple):
    """A tensor of a file and its place in ours."""

    name: str  # ours, with what it is before the parameter's name
    part: Part
    tensor: TensorRef
    where: str  # in the file, for messages

    @property
    def is_qkv(self) -> bool:
        return ".attention.qkv." in self.part.ours


def moments_of(config: OptimizerConfig) -> tuple[str, ...]:
    """The tensors that an optimizer keeps for each parameter."""
    return () if config.optimizer == "sgd" and not config.sgd_momentum else MOMENTS[config.optimizer]


def tensors_in(
    tree: Tree, grid: Grid, tensor_rank: int, stage: int, *, moments: tuple[str, ...] | None
) -> Iterator[Found]:
    """The tensors of a file that we keep: weights, in fp32 if the file has them so, and the optimizer's moments.

    moments None: take the weights of the model and nothing of the optimizer. Raises ValueError, saying what and where,
    if a tensor is missing, has another shape or number type than it must have, or is one that a GPT does not have.
    """
    chunks = parts_of(grid, tensor_rank, stage)
    weights: dict[Part, tuple[str, Any]] = {}
    main: dict[Part, tuple[str, Any]] = {}
    for key, parts in zip(chunk_names(grid.chunks), chunks, strict=True):
        if key not in tree:
            raise ValueError(f"{key} is missing: a pipeline of {grid.chunks} chunks a stage has it")
        weights.update(_weights(tree[key], key, parts))
    if moments is not None:
        if "optimizer" not in tree:
            raise ValueError("optimizer is missing (saved with --no-save-optim?): add --weights-only")
        groups = in_optimizer(chunks)
        main = _main_weights(tree["optimizer"], groups)
        for part, (where, tensor) in weights.items():
            _checked(f"weight.{part.ours}", part, tensor, where)
    for part, (where, tensor) in {**weights, **main}.items():
        yield _checked(f"weight.{part.ours}", part, tensor, where)
    if moments is not None:
        yield from _moments(tree["optimizer"], groups, moments)


def _checked(name: str, part: Part, tensor: Any, where: str) -> Found:
    if not isinstance(tensor, TensorRef):
        raise ValueError(f"{where} is not a tensor")
    if tensor.shape != part.extent:
        raise ValueError(f"{where} has the shape {list(tensor.shape)}, expected {list(part.extent)}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{where} is of {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}")
    return Found(name, part, tensor, where)


def _weights(model: Any, key: str, parts: list[Part]) -> dict[Part, tuple[str, Any]]:
    """The model's own weights in a chunk."""
    leaves = dict(_leaves(model, ()))
    found = {}
    for part in parts:
        keys = part.theirs if part.theirs in leaves else _former(part.theirs)
        where = "/".join((key, *part.theirs))
        if keys not in leaves:
            raise ValueError(f"{where} is missing")
        found[part] = (where, leaves.pop(keys))
    if leaves:
        unknown = ", ".join("/".join((key, *keys)) for keys in list(leaves)[:3])
        raise ValueError(f"{unknown} is not part of a GPT of these sizes ({len(leaves)} such tensors)")
    return found


def _leaves(tree: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*keys, str(key)))
    else:
        yield keys, tree


def _former(keys: Keys) -> Keys:
    """The keys as older versions called them."""
    return tuple(".".join(FORMER.get(word, word) for word in key.split(".")) for key in keys)


def inner_optimizer(optimizer: Any) -> Mapping[str, Any]:
    """The state of the optimizer proper, with its state and param_groups; 16-bit training wraps it."""
    inner = optimizer.get("optimizer", optimizer) if isinstance(optimizer, Mapping) else None
    if not isinstance(inner, Mapping) or not {"state", "param_groups"} <= inner.keys():
        raise ValueError("optimizer is of a layout that is not known (version 2 or above is): add --weights-only")
    return inner


def _main_weights(optimizer: Any, groups: list[list[Part]]) -> dict[Part, tuple[str, Any]]:
    """The fp32 weights of 16-bit training; none in fp32 training, where the model's own are."""
    inner_optimizer(optimizer)
    main = optimizer.get("fp32_from_fp16_params")
    if main is None:
        return {}
    if [len(group) for group in main] != [len(group) for group in groups]:
        raise ValueError(
            f"optimizer/fp32_from_fp16_params has groups of {[len(group) for group in main]} tensors, "
            f"expected {[len(group) for group in groups]}"
        )
    return {
        part: (f"optimizer/fp32_from_fp16_params[{number}][{place}]", main[number][place])
        for number, group in enumerate(groups)
        for place, part in enumerate(group)
    }


def _states(optimizer: Any, groups: list[list[Part]]) -> Iterator[tuple[str, Part, Mapping[str, Any]]]:
    """The optimizer's state of each parameter; none if it has not taken a step."""
    inner = inner_optimizer(optimizer)
    numbers = [group["params"] for group in inner["param_groups"]]
    if [len(group) for group in numbers] != [len(group) for group in groups]:
        raise ValueError(
            f"optimizer/param_groups have {[len(group) for group in numbers]} parameters, "
            f"expected {[len(group) for group in groups]}"
        )
    if not inner["state"]:
        return
    for group, parts in zip(numbers, groups, strict=True):
        for number, part in zip(group, parts, strict=True):
            where = f"optimizer/state/{number}"
            if number not in inner["state"]:
                raise ValueError(f"{where} ({'/'.join(part.theirs)}) is missing")
            yield where, part, inner["state"][number]


def _moments(optimizer: Any, groups: list[list[Part]], moments: tuple[str, ...]) -> Iterator[Found]:
    for where, part, state in _states(optimizer, groups):
        for moment in moments:
            if moment not in state:
                raise ValueError(f"{where}/{moment} ({'/'.join(part.theirs)}) is missing")
            yield _checked(f"{moment}.{part.ours}", part, state[moment], f"{where}/{moment}")


def update_counts(tree: Tree, grid: Grid, tensor_rank: int, stage: int) -> list[int | TensorRef]:
    """How many steps each parameter took part in, as numbers or tensors: torch counts by parameter, apex by group."""
    optimizer = tree["optimizer"]
    groups = in_optimizer(parts_of(grid, tensor_rank, stage))
    counts = [state["step"] for _, _, state in _states(optimizer, groups) if "step" in state]
    return counts or [group["step"] for group in inner_optimizer(optimizer)["param_groups"] if "step" in group]


def schedule_of(tree: Tree) -> tuple[dict[str, Any], int]:
    """Our five settings of the learning rate and the samples it has counted. Raises ValueError if one is missing."""
    saved = tree.get("lr_scheduler")
    names = {"max_lr": "max_lr", "min_lr": "min_lr", "warmup_steps": "warmup", "decay_steps": "decay"}
    names["decay_style"] = "style"
    missing = [name for name in (*names, "num_steps") if not isinstance(saved, Mapping) or name not in saved]
    if missing:
        raise ValueError(f"lr_scheduler/{missing[0]} is missing: add --weights-only")
    assert isinstance(saved, Mapping)
    return {ours: saved[theirs] for theirs, ours in names.items()}, int(saved["num_steps"])


def loss_scale_of(tree: Tree, scale: float | None) -> dict[str, Any] | None:
    """The loss scale as ours keeps it; scale: the value of the file's scale tensor, None if it has none."""
    scaler = tree["optimizer"].get("grad_scaler")
    if scaler is None:
        return None
    if scale is None:
        return {}
    return {"scale": scale, "clean_steps": scaler["growth_tracker"], "tolerance": scaler["hysteresis_tracker"]}


@dataclass(frozen=True)
class Kept:
    """What of a checkpoint of ours goes into Megatron-LM's files; tensors are whole and named as in ours."""

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    config: OptimizerConfig
    dtype: torch.dtype  # of the model's own weights
    seed: int

    @property
    def moments(self) -> tuple[str, ...] | None:
        """None if the optimizer was not saved."""
        moments = moments_of(self.config)
        return moments if all(f"{moment}.word_embedding.weight" in self.tensors for moment in moments) else None

    def cut(self, kind: str, part: Part) -> Tensor:
        # A copy: torch.save would write all of what a part is a view of.
        return self.tensors[f"{kind}.{part.ours}"][part.place.slices((0,) * len(part.shape))].clone()


def file_contents(kept: Kept, arguments: Mapping[str, Any], grid: Grid, tensor_rank: int, stage: int) -> dict[str, Any]:
    """What torch.save is to write as the file of a tensor rank and stage. arguments: Megatron-LM's, for that rank."""
    chunks = parts_of(grid, tensor_rank, stage)
    contents: dict[str, Any] = {
        "args": argparse.Namespace(**arguments),
        "checkpoint_version": VERSION,
        "iteration": kept.state["step"],
    }
    for key, parts in zip(chunk_names(grid.chunks), chunks, strict=True):
        contents[key] = {"language_model": {}}
        for part in parts:
            place = contents[key]
            for word in part.theirs[:-1]:
                place = place.setdefault(word, {})
            place[part.theirs[-1]] = kept.cut("weight", part).to(kept.dtype)
    if kept.moments is not None:
        contents["optimizer"] = _optimizer(kept, in_optimizer(chunks), kept.moments)
        contents["lr_scheduler"] = _scheduler(kept.state)
    return {**contents, **generator_states(kept.seed, tensor_rank, stage)}


def _optimizer(kept: Kept, groups: list[list[Part]], moments: tuple[str, ...]) -> dict[str, Any]:
    parts = [part for group in groups for part in group]
    updates = int(kept.state["num_updates"])
    states: dict[int, dict[str, Tensor]] = {}
    for number, part in enumerate(parts if updates or kept.config.optimizer == "sgd" else ()):
        states[number] = {"step": torch.tensor(float(updates))} if kept.config.optimizer == "adam" else {}
        states[number] |= {moment: kept.cut(moment, part) for moment in moments}
    first = len(groups[0])
    inner = {
        "state": states,
        "param_groups": [
            _group(kept, list(range(first)), decay=kept.config.weight_decay),
            _group(kept, list(range(first, len(parts))), decay=0.0),
        ],
    }
    if kept.dtype == torch.float32:
        return inner
    optimizer: dict[str, Any] = {"optimizer": inner}
    if (scale := kept.state["loss_scale"]) is not None:
        optimizer["grad_scaler"] = _scaler(scale)
    optimizer["fp32_from_fp16_params"] = [[kept.cut("weight", part) for part in group] for group in groups]
    return optimizer


def _group(kept: Kept, numbers: list[int], *, decay: float) -> dict[str, Any]:
    """A parameter group with the settings of torch's optimizers, and of apex's, which counts its steps there."""
    rate = learning_rate(int(kept.state["schedule_samples"]), Schedule(**kept.state["schedule"]))
    settings: dict[str, Any] = {"lr": rate, "weight_decay": decay, "maximize": False, "foreach": None}
    settings |= {"differentiable": False, "fused": None}
    if kept.config.optimizer == "adam":
        settings |= {"betas": (kept.config.adam_beta1, kept.config.adam_beta2), "eps": kept.config.adam_eps}
        settings |= {"amsgrad": False, "capturable": False, "decoupled_weight_decay": True, "bias_correction": True}
        settings["step"] = int(kept.state["num_updates"])
    else:
        settings |= {"momentum": kept.config.sgd_momentum, "dampening": 0.0, "nesterov": False}
    return {**settings, "params": numbers}


def _scaler(scale: Mapping[str, Any]) -> dict[str, Any]:
    """Empty for a constant loss scale, which has no state."""
    if not scale:
        return {}
    return {
        "scale": torch.tensor([float(scale["scale"])]),
        "growth_tracker": int(scale["clean_steps"]),
        "hysteresis_tracker": int(scale["tolerance"]),
    }


def _scheduler(state: Mapping[str, Any]) -> dict[str, Any]:
    schedule = state["schedule"]
    return {
        "max_lr": schedule["max_lr"],
        "warmup_steps": schedule["warmup"],
        "num_steps": state["schedule_samples"],
        "decay_style": schedule["style"],
        "decay_steps": schedule["decay"],
        "min_lr": schedule["min_lr"],
    }


def generator_states(seed: int, tensor_rank: int, stage: int) -> dict[str, Any]:
    """The generators as Megatron-LM seeds them at the start of a run: ours are derived anew in each step.

    A CUDA generator's state is its seed and its offset, 8 bytes each.
    """
    own = seed + 100 * stage
    return {
        "random_rng_state": random.Random(own).getstate(),
        "np_rng_state": np.random.RandomState(own).get_state(),
        "torch_rng_state": torch.Generator().manual_seed(own).get_state(),
        "cuda_rng_state": _cuda_state(own),
        "rng_tracker_states": {"model-parallel-rng": _cuda_state(own + 2718 + tensor_rank)},
    }


def _cuda_state(seed: int) -> Tensor:
    return torch.tensor([seed, 0], dtype=torch.int64).view(torch.uint8).clone()
