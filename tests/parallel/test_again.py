"""What is computed again in the backward pass: the same gradients as of what was kept, and no more than is needed."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalith.parallel.again import compute_again


class Cube(torch.autograd.Function):
    """Keeps what it is given and what it gives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x**3
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        slope: Tensor = grad * 3 * y / x
        return slope


def layer(x: Tensor, weight: Tensor, *, scale: Tensor) -> Tensor:
    kept: Tensor = Cube.apply(torch.tanh(x @ weight) + 2)
    y: Tensor = (kept.exp() * scale).softmax(-1) @ weight.T + x
    return y


def gradients(run: Any, *, times: int = 1) -> list[Tensor]:
    torch.manual_seed(3)
    x, weight, scale = (torch.randn(*shape, requires_grad=True) for shape in ((5, 8), (8, 8), (8,)))
    y = run(run(x, weight, scale), weight, scale).square().sum()
    for number in range(times):
        y.backward(retain_graph=number + 1 < times)
    assert x.grad is not None and weight.grad is not None and scale.grad is not None
    return [y.detach(), x.grad, weight.grad, scale.grad]


@pytest.mark.parametrize("times", [1, 2])
def test_gradients_are_those_of_what_was_kept_and_of_torchs_own(times: int) -> None:
    plain = gradients(lambda x, weight, scale: layer(x, weight, scale=scale), times=times)
    again = gradients(lambda *xw_scale: compute_again(layer, xw_scale[:2], {"scale": xw_scale[2]}), times=times)
    theirs = gradients(
        lambda x, weight, scale: checkpoint(layer, x, weight, scale=scale, use_reentrant=False), times=times
    )
    assert all(map(torch.equal, again, plain)) and all(map(torch.equal, again, theirs))


def test_nothing_after_the_last_that_is_needed_is_computed_again() -> None:
    seen: list[str] = []

    def function(x: Tensor) -> Tensor:
        seen.append("begun")
        y = x.exp()
        z = y.sum()  # keeps nothing
        seen.append("ended")
        return z

    x = torch.ones(3, requires_grad=True)
    compute_again(function, [x], {}).backward()
    assert seen == ["begun", "ended", "begun"]
    with torch.no_grad():
        compute_again(function, [x], {})
    assert seen[3:] == ["begun", "ended"]


def test_only_what_is_given_is_kept_and_all_goes_with_the_graph() -> None:
    made: list[weakref.ref[Tensor]] = []

    def function(x: Tensor) -> Tensor:
        y = x.exp()
        made.append(weakref.ref(y))
        return y.sin()

    gc.disable()
    try:
        x = torch.ones(3, requires_grad=True)
        entering = x * 2
        left = weakref.ref(entering)
        z = compute_again(function, [entering], {}).sum()
        del entering
        assert made[0]() is None and left() is not None
        z.backward()
        assert made[1]() is None
        del z
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (lambda x: x.exp(), "keeps 1 tensors in place of 2"),
        (lambda x: x.half().exp().sin().float(), r"differs: \[3\] in torch.float16 in place of \[3\] in torch.float32"),
        (lambda x: x[:2].exp().sin(), r"differs: \[2\] in torch.float32 in place of \[3\]"),
    ],
)
def test_another_function_the_second_time_is_a_fault(second: Any, said: str) -> None:
    functions = [lambda x: x.exp().sin(), second]
    x = torch.ones(3, requires_grad=True)
    y = compute_again(lambda x: functions.pop(0)(x), [x], {})
    with pytest.raises(RuntimeError, match=said):
        y.sum().backward()


def test_what_was_changed_in_place_meanwhile_is_a_fault() -> None:
    x = torch.ones(3, requires_grad=True)
    entering = x * 2
    y = compute_again(lambda x: x.exp().sin(), [entering], {})
    with torch.no_grad():
        entering.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()
