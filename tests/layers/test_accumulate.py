"""Products of 16 bits add to the gradients of the microbatches before: autograd's sums, in the memory of the first."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalith.layers import accumulate
from megalith.layers.accumulate import accumulating
from megalith.layers.entering import Factor
from megalith.layers.sixteen import sixteen_linears
from tests.layers.kernels import DEVICE

DTYPE = torch.bfloat16
OUTPUTS, INPUTS = 40, 24
BUT_ON_A_GPU = () if DEVICE == "cuda" else pytest.mark.slow


def made() -> tuple[nn.Parameter, list[Tensor]]:
    """A weight, and what enters it in three microbatches: small whole numbers, so that every sum is exact."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float().to(DEVICE)

    weight = nn.Parameter(draw(OUTPUTS, INPUTS))
    return weight, [draw(2, 9, INPUTS).to(DTYPE).requires_grad_() for _ in range(3)]


def plainly(weight: Tensor, inputs: list[Tensor], *, times: int = 1) -> Tensor:
    """The sum of the gradients of the product's sum, each feature weighted by its number."""
    slopes = torch.arange(OUTPUTS, dtype=torch.float32, device=DEVICE)
    rows = torch.cat([x.detach().float().reshape(-1, INPUTS) for x in inputs])
    return times * slopes[:, None] * rows.sum(0)


def gradient_of(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def loss_of(y: Tensor) -> Tensor:
    return (y.float() * torch.arange(OUTPUTS, device=DEVICE)).sum()


@pytest.fixture(
    params=["as it is", "traced", "again", "again, traced", pytest.param("by inductor", marks=BUT_ON_A_GPU)]
)
def product(request: pytest.FixtureRequest) -> Callable[[Tensor, Tensor], Tensor]:
    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        return sixteen_linears(x, [Factor(weight, None)])[0]

    if request.param == "as it is":
        return multiply
    product: Callable[[Tensor, Tensor], Tensor] = multiply
    if request.param != "again":
        backend = "inductor" if request.param == "by inductor" else "aot_eager"
        product = torch.compile(multiply, backend=backend, fullgraph=True)
    if not request.param.startswith("again"):
        return product

    def recomputed(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = checkpoint(product, x, weight, use_reentrant=False)
        return y

    return recomputed


@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
def test_gradients_are_the_sums_in_the_memory_of_the_first(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight, inputs = made()
    places, seen = set(), []
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(gradient_of(parameter).clone()))
    with accumulating([weight]):
        for x in inputs:
            loss_of(product(x, weight)).backward()
            places.add(gradient_of(weight).data_ptr())
    assert len(places) == 1 and gradient_of(weight).dtype == torch.float32
    # What travels to other ranks is what a hook sees after a backward pass: the sum.
    assert len(seen) == 3
    for number, total in enumerate(seen, 1):
        assert torch.equal(total, plainly(weight, inputs[:number]))


def test_a_weight_that_is_used_twice_in_a_pass_has_both() -> None:
    weight, inputs = made()
    with accumulating([weight]):
        for x in inputs:
            (
                loss_of(sixteen_linears(x, [Factor(weight, None)])[0])
                + loss_of(sixteen_linears(x, [Factor(weight, None)])[0])
            ).backward()
    assert torch.equal(gradient_of(weight), plainly(weight, inputs, times=2))


def test_only_the_weights_that_are_named_are_touched_and_only_while_it_is_entered() -> None:
    weight, inputs = made()
    other = nn.Parameter(weight.detach().clone())
    with pytest.raises(ValueError, match="stopped"), accumulating([weight]):
        raise ValueError("stopped")
    for entered in ([other], []):
        for parameter in (weight, other):
            parameter.grad = torch.ones_like(parameter)
        with accumulating(entered):
            (given,) = torch.autograd.grad(loss_of(sixteen_linears(inputs[0], [Factor(weight, None)])[0]), [weight])
        assert torch.equal(given, plainly(weight, inputs[:1]))
        for parameter in (weight, other):
            assert torch.equal(gradient_of(parameter), torch.ones_like(parameter))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_products_are_added_in_fp32(dtype: torch.dtype, first: bool, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    left, right, total = (
        torch.randint(-3, 4, shape, generator=generator).to(DEVICE) for shape in ((300, 64), (64, 40), (300, 40))
    )
    # More than 16 bits hold, and what is overwritten is no number.
    total = (total * 10_001.0).fill_(torch.nan) if first else total * 10_001.0
    expected = (left.double() @ right.double()) + (0 if first else total)
    left = left.to(dtype).t().contiguous().t() if transposed else left.to(dtype)
    accumulate.add_product_in_fp32(total, left, right.to(dtype), first=first)
    assert torch.equal(total.double(), expected.double())
