"""Norms and clipping against double precision; overflow; cut tensors."""

import pytest
import torch
from torch import Tensor

from megalith.optim.clip import clip_gradients, count_zeros, global_norm, is_clipped, unscale_gradients

CPU = torch.device("cpu")


def tensors(scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1000, 700), (257,), (256,), (3, 5, 7), (), (0, 4)]
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


def norm_in_double(values: list[Tensor]) -> float:
    return float(sum(value.double().square().sum() for value in values) ** 0.5)


def test_the_norm_is_that_of_double_precision() -> None:
    assert float(global_norm(tensors(), device=CPU)) == pytest.approx(norm_in_double(tensors()), rel=1e-7)
    positive = [torch.rand(3_000_000, generator=torch.Generator().manual_seed(1))]
    assert float(global_norm(positive, device=CPU)) == pytest.approx(norm_in_double(positive), rel=1e-8)
    nothing = global_norm([], device=CPU)
    assert nothing == 0 and nothing.dtype == torch.float64, "ranks add numbers of one type"


def test_the_norm_does_not_depend_on_strides() -> None:
    value = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    assert float(global_norm([value.t()], device=CPU)) == pytest.approx(norm_in_double([value]), rel=1e-7)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_gives_the_norm_before_and_at_most_the_limit(max_norm: float) -> None:
    gradients = tensors()
    norm = global_norm(gradients, device=CPU)
    clip_gradients(gradients, norm, max_norm)
    before = norm_in_double(tensors())
    assert float(norm) == pytest.approx(before, rel=1e-7)
    factor = min(1.0, max_norm / (before + 1e-6))
    for clipped, original in zip(gradients, tensors(), strict=True):
        torch.testing.assert_close(clipped, original * factor, rtol=1e-6, atol=0)
        if factor == 1.0:
            assert torch.equal(clipped, original)


def test_small_norms_are_clipped_as_torch_does() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.tensor([3e-6, 4e-6])
    gradient = parameter.grad.clone()
    clip_gradients([gradient], global_norm([gradient], device=CPU), 2e-6)
    torch.nn.utils.clip_grad_norm_(parameter, 2e-6)
    torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=0)
    assert [is_clipped(norm, 2e-6) for norm in (0.9e-6, 1.1e-6)] == [False, True]


def test_a_zero_gradient_is_left_alone() -> None:
    gradients = [torch.zeros(5)]
    clip_gradients(gradients, global_norm(gradients, device=CPU), 1.0)
    assert torch.equal(gradients[0], torch.zeros(5))


def test_ranks_with_different_parts_find_the_norm_of_the_whole() -> None:
    parts = [tensors()[:1], tensors()[1:]]
    others = [global_norm(part, device=CPU).square() for part in reversed(parts)]
    for part, other in zip(parts, others, strict=True):
        norm = global_norm(part, device=CPU, reduce=lambda found, other=other: found + other)  # type: ignore[misc]
        clip_gradients(part, norm, 1.0)
        assert float(norm) == pytest.approx(norm_in_double(tensors()), rel=1e-7)
    assert norm_in_double([*parts[0], *parts[1]]) == pytest.approx(1.0, rel=1e-5)


def test_a_copy_that_is_not_counted_is_scaled_all_the_same() -> None:
    counted, copy = [torch.full((4,), 2.0)], [torch.full((4,), 2.0)]
    norm = global_norm(counted, device=CPU)
    assert float(norm) == 4.0
    clip_gradients([*counted, *copy], norm, 1.0)
    torch.testing.assert_close(copy[0], torch.full((4,), 0.5))


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("max_norm", [1.0, 1e9])
def test_the_loss_scale_is_taken_out_on_the_way(max_norm: float, scale: float) -> None:
    gradients, expected = tensors(scale), tensors()
    norm = global_norm(gradients, device=CPU) / scale
    assert is_clipped(float(norm), max_norm) == (max_norm == 1.0)
    clip_gradients(expected, norm, max_norm)
    clip_gradients(gradients, norm, max_norm, scale=scale)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), None])
def test_unscaling_finds_any_overflow(bad: float | None) -> None:
    gradients = tensors(scale=65536.0)
    if bad is not None:
        gradients[3][1, 2, 3] = bad
    found = unscale_gradients(gradients, 65536.0)
    assert float(found) == (0.0 if bad is None else 1.0)
    torch.testing.assert_close(gradients[0], tensors()[0], rtol=0, atol=0)


def test_zeros_are_counted_over_ranks() -> None:
    gradients = [torch.tensor([0.0, 1.0, -0.0]), torch.zeros(2, 2), torch.empty(0)]
    assert int(count_zeros(gradients, device=CPU)) == 6
    assert int(count_zeros(gradients, device=CPU, reduce=lambda found: found * 2)) == 12


def test_a_cut_tensor_counts_by_its_part_and_is_scaled_in_place() -> None:
    class Cut:
        """What a DTensor offers of itself."""

        def __init__(self, local: Tensor) -> None:
            self.local = local

        def to_local(self) -> Tensor:
            return self.local

    cut = Cut(torch.full((4,), 2.0))
    gradients: list[Tensor] = [cut]  # type: ignore[list-item]
    norm = global_norm(gradients, device=CPU)
    assert float(norm) == 4.0
    clip_gradients(gradients, norm, 2.0)
    torch.testing.assert_close(cut.local, torch.full((4,), 1.0))
    assert float(unscale_gradients(gradients, 2.0)) == 0.0
    torch.testing.assert_close(cut.local, torch.full((4,), 0.5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_finds_the_same_norm() -> None:
    gradients = [value.to("cuda") for value in tensors(4.0)]
    assert float(unscale_gradients(gradients, 4.0)) == 0.0
    norm = global_norm(gradients, device=gradients[0].device)
    assert float(norm) == pytest.approx(norm_in_double(tensors()), rel=1e-6)
    clip_gradients(gradients, norm, 1.0)
    assert float(global_norm(gradients, device=gradients[0].device)) == pytest.approx(1.0, rel=1e-5)
    assert int(count_zeros(gradients, device=gradients[0].device)) == 0
