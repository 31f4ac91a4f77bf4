"""AdamW whose moments take 2 bytes or 1 byte an element instead of 4.

bf16: rounded at random, up or down, so that the mean is exact: an update of v by (1 - beta2) = 0.1 % is below half a
step of bf16 and would be lost otherwise. int8: blocks of 256 elements share a scale, their largest magnitude (Dettmers
et al. 2022, arXiv:2110.02861); the code grows with a root of the value instead of their table, so that it is computed
where it is needed, and it is rounded at random too. The random numbers are hashes of step, parameter and element.

Checkpoints hold the moments in fp32 whatever they are here, so a run may go on under another setting; what is read
back is bit for bit what was saved.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megalith.kernels import HAS_TRITON
from megalith.optim.adam import LightOptimizer
from megalith.optim.local import local_part

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 256
# Elements that are in fp32 at once: they fit the cache of a processor, and fill a GPU.
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
_GOLDEN, _ODD = 0x9E3779B97F4A7C15, 0x21F0AAAD


class Codec(Protocol):
    """How a moment of so many elements is kept; spans begin at multiples of BLOCK."""

    def empty(self, count: int, device: torch.device) -> dict[str, Tensor]: ...
    def read(self, kept: dict[str, Tensor], span: slice) -> Tensor: ...
    def write(self, kept: dict[str, Tensor], span: slice, values: Tensor, words: Tensor | None) -> None: ...


class InBf16:
    """Two bytes an element."""

    def empty(self, count: int, device: torch.device) -> dict[str, Tensor]:
        return {"values": torch.zeros(count, dtype=torch.bfloat16, device=device)}

    def read(self, kept: dict[str, Tensor], span: slice) -> Tensor:
        return kept["values"][span].float()

    def write(self, kept: dict[str, Tensor], span: slice, values: Tensor, words: Tensor | None) -> None:
        if words is not None:
            # Add a random number to the 16 bits that go, and cut them off.
            bits = values.contiguous().view(torch.int32)
            values = ((bits + (words & 0xFFFF)) & -0x10000).view(torch.float32)
        kept["values"][span] = values


@dataclass(frozen=True)
class InInt8:
    """One byte an element and four a block: value = scale (code / largest)^power, with the code's sign."""

    is_signed: bool
    power: int  # a power of 2, so that a root is one of square roots

    @property
    def largest(self) -> int:
        return 127 if self.is_signed else 255

    def empty(self, count: int, device: torch.device) -> dict[str, Tensor]:
        blocks = -(-count // BLOCK)
        kind = torch.int8 if self.is_signed else torch.uint8
        return {
            "codes": torch.zeros(blocks * BLOCK, dtype=kind, device=device),
            "scales": torch.zeros(blocks, dtype=torch.float32, device=device),
        }

    def read(self, kept: dict[str, Tensor], span: slice) -> Tensor:
        blocks = slice(span.start // BLOCK, -(-span.stop // BLOCK))
        codes = kept["codes"][blocks.start * BLOCK : blocks.stop * BLOCK].view(-1, BLOCK).float()
        values = self._decode(codes).mul_(kept["scales"][blocks, None])
        return values.view(-1)[: span.stop - span.start]

    def _decode(self, codes: Tensor) -> Tensor:
        shares = codes / self.largest
        for _ in range(int(math.log2(self.power))):
            shares = shares.square_()
        return shares.copysign_(codes) if self.is_signed else shares

    def write(self, kept: dict[str, Tensor], span: slice, values: Tensor, words: Tensor | None) -> None:
        blocks = slice(span.start // BLOCK, -(-span.stop // BLOCK))
        room = kept["codes"][blocks.start * BLOCK : blocks.stop * BLOCK]
        missing = len(room) - len(values)
        values = torch.nn.functional.pad(values, (0, missing)).view(-1, BLOCK)
        scales = values.abs().amax(1, keepdim=True)
        shares = values.abs() / scales.clamp(min=torch.finfo(torch.float32).tiny)
        codes = shares
        for _ in range(int(math.log2(self.power))):
            codes = codes.sqrt()
        codes = codes * self.largest
        if words is None:
            codes = codes.round_()
        else:
            codes = codes.floor_()
            below = self._decode(codes)
            step = self._decode(codes + 1).sub_(below)
            chance = torch.nn.functional.pad(words, (0, missing)).view(-1, BLOCK).float().mul_(2.0**-32).add_(0.5)
            codes += shares.sub_(below) > chance.mul_(step)
        # A second moment that is not 0 must not become 0: the weight's step is divided by its root.
        codes = codes.clamp_(0 if self.is_signed else 1, self.largest)
        kept["scales"][blocks] = scales[:, 0]
        room.copy_((codes.copysign_(values) if self.is_signed else codes).view(-1))


CODECS: dict[str, dict[str, Codec]] = {
    "bf16": {"exp_avg": InBf16(), "exp_avg_sq": InBf16()},
    "int8": {"exp_avg": InInt8(is_signed=True, power=2), "exp_avg_sq": InInt8(is_signed=False, power=4)},
}


class CompactAdamW(LightOptimizer):
    """AdamW as `build_optimizer` describes it, with moments kept in 16 or 8 bits; weights and arithmetic are fp32.

    kept_in: a key of CODECS. A sharded parameter is updated by the part that lies here.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, kept_in: str, lr: float = 0.0
    ) -> None:
        self.codecs = CODECS[kept_in]
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._hashes: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; closure is not supported."""
        assert closure is None
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, number)

    def _update(self, parameter: nn.Parameter, found: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.kept(parameter)
        state["step"] += 1
        step = int(state["step"])
        weights, gradient = local_part(parameter).view(-1), local_part(found).reshape(-1)
        (beta1, beta2), eps, rate = group["betas"], group["eps"], group["lr"]
        size1 = rate / (1 - beta1**step)
        root2 = math.sqrt(1 - beta2**step)
        fused = takes_one_pass(weights, gradient)
        for span in _spans(len(weights), weights.device):
            part, seeds = weights[span], [(2 * step + place, number, span.start) for place in (0, 1)]
            if fused:
                from megalith.optim.compact_fused import update

                update(
                    part,
                    gradient[span],
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    start=span.start,
                    block=BLOCK,
                    hashes=self._hashes_on(weights.device),
                    words=(_word(seeds[0]), _word(seeds[1])),
                    decay=1 - rate * group["weight_decay"],
                    size=size1,
                    root=root2,
                    beta1=beta1,
                    beta2=beta2,
                    eps=eps,
                )
                continue
            g = gradient[span].float()
            m = self.codecs["exp_avg"].read(state["exp_avg"], span).lerp_(g, 1 - beta1)
            v = self.codecs["exp_avg_sq"].read(state["exp_avg_sq"], span).mul_(beta2).addcmul_(g, g, value=1 - beta2)
            part.mul_(1 - rate * group["weight_decay"])
            part.addcdiv_(m, v.sqrt().div_(root2).add_(eps), value=-size1)
            for seed, (moment, values) in zip(seeds, (("exp_avg", m), ("exp_avg_sq", v)), strict=True):
                words = self._words(weights.device, seed, len(values))
                self.codecs[moment].write(state[moment], span, values, words)

    def _words(self, device: torch.device, where: tuple[int, ...], count: int) -> Tensor:
        """int32: random bits, good enough to round by; other ones wherever where differs."""
        mixed = (self._hashes_on(device)[:count] ^ _word(where)) * _ODD
        # A shift of signed words repeats the sign, which would make all of them positive.
        return mixed ^ ((mixed >> 15) & 0x1FFFF)

    def _hashes_on(self, device: torch.device) -> Tensor:
        """int32: a number for each element of a span."""
        if device not in self._hashes:
            numbers = torch.arange(_chunk(device), dtype=torch.int64, device=device)
            numbers = (numbers + 1) * (_GOLDEN - (1 << 64))
            self._hashes[device] = (numbers ^ (numbers >> 31)).to(torch.int32)
        return self._hashes[device]

    def kept(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The parameter's state: `step`, and the tensors of each moment; made as zeros if there is none."""
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            local = local_part(parameter)
            state["step"] = torch.zeros((), dtype=torch.float32)
            for moment in MOMENTS:
                state[moment] = self.codecs[moment].empty(local.numel(), local.device)
        return state

    def outline(self, parameter: nn.Parameter) -> Tensor:
        """The type and shape of what `unpacked` gives, without elements (meta)."""
        return torch.empty(local_part(parameter).shape, dtype=torch.float32, device="meta")

    @torch.no_grad()
    def unpacked(self, parameter: nn.Parameter, moment: str) -> Tensor:
        """fp32 on the host, of the shape of what lies here of the parameter: a copy of the moment."""
        local, kept = local_part(parameter), self.kept(parameter)[moment]
        flat = torch.empty(local.numel(), dtype=torch.float32)
        for span in _spans(local.numel(), local.device):
            flat[span] = self.codecs[moment].read(kept, span).cpu()
        return flat.view(local.shape)

    @torch.no_grad()
    def pack(self, parameter: nn.Parameter, moment: str, values: Tensor) -> None:
        """Take over a moment: what `unpacked` gave is kept as it was then, anything else is rounded."""
        local, kept = local_part(parameter), self.kept(parameter)[moment]
        flat = values.reshape(-1)
        for span in _spans(local.numel(), local.device):
            self.codecs[moment].write(kept, span, flat[span].to(local.device), None)


def takes_one_pass(weights: Tensor, gradient: Tensor) -> bool:
    """Whether a kernel does it all: on GPUs, by Triton, which comes with PyTorch's CUDA builds."""
    return HAS_TRITON and weights.is_cuda and weights.dtype == gradient.dtype == torch.float32


def _word(where: tuple[int, ...]) -> int:
    """32 bits, signed, of numbers that tell a place and a step."""
    seed = 0
    for part in where:
        seed = ((seed ^ part) * _GOLDEN + 1) & (1 << 64) - 1
        seed ^= seed >> 29
    return (seed & 0xFFFFFFFF) - (1 << 31)


def _chunk(device: torch.device) -> int:
    return CHUNK["cuda" if device.type == "cuda" else "cpu"]


def _spans(count: int, device: torch.device) -> Iterator[slice]:
    size = _chunk(device)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
