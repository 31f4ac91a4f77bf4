"""oneDNN's products against torch's own and float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.layers import products
from megalith.layers.products import (
    LEAST,
    Again,
    is_amds,
    lacks_avx512,
    leaves_half_to_onednn,
    linear,
    linear_without_gradients,
    suits_onednn,
    times_transposed,
)
from tests.calls import Calls


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("half", "narrow", "by_onednn"),
    [(True, False, (3, 3)), (False, False, (3, 2)), (False, True, (1, 2))],
    ids=["no product to MKL", "some to MKL", "without AVX-512"],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 70), (210,)], ids=["BT", "N"])
@pytest.mark.parametrize(("width", "outputs"), [(161, 129), (129, 161)], ids=["narrower", "wider"])
def test_output_and_gradients_are_those_of_float64(
    shape: tuple[int, ...],
    width: int,
    outputs: int,
    bias: bool,
    half: bool,
    narrow: bool,
    by_onednn: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """by_onednn: how many of the three products go there, where the layer narrows and where it widens."""
    monkeypatch.setattr(products, "leaves_half_to_onednn", lambda: half)
    monkeypatch.setattr(products, "lacks_avx512", lambda: narrow)
    x, weight, b = draw(*shape, width), draw(outputs, width, seed=2), draw(outputs, seed=3) if bias else None
    inputs = [t.requires_grad_() for t in (x, weight, b) if t is not None]
    assert suits_onednn(x, weight)
    with Calls() as calls:
        y = linear(x, weight, b)
        slopes = draw(*y.shape, seed=4)
        gradients = torch.autograd.grad(y, inputs, slopes)
    assert len(calls.of(torch.ops.mkldnn._linear_pointwise.default)) == by_onednn[width < outputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = F.linear(exact[0], exact[1], exact[2] if bias else None)
    # fp32 sums of 161 and 210 products of numbers about 1.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=3e-5)
    for found, right in zip(gradients, torch.autograd.grad(expected, exact, slopes.double()), strict=True):
        assert found.dtype == torch.float32 and found.is_contiguous()
        torch.testing.assert_close(found.double(), right, rtol=0, atol=5e-5)


@pytest.mark.parametrize("half", [True, False])
def test_without_gradients_the_output_is_the_same_by_either_library(
    half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "leaves_half_to_onednn", lambda: half)
    x, weight, b = draw(210, 161), draw(129, 161, seed=2), draw(129, seed=3)
    with Calls() as calls:
        y = linear_without_gradients(x, weight, b)
    assert bool(calls.of(torch.ops.mkldnn._linear_pointwise.default)) == half
    torch.testing.assert_close(y.double(), F.linear(x.double(), weight.double(), b.double()), rtol=0, atol=3e-5)


def test_a_transposed_gradient_and_input_give_the_same() -> None:
    x, weight = draw(161, 210).t().requires_grad_(), draw(129, 161, seed=2).requires_grad_()
    slopes = draw(129, 210, seed=4).t()
    found = torch.autograd.grad(linear(x, weight, None), (x, weight), slopes)
    expected = torch.autograd.grad(F.linear(x, weight), (x, weight), slopes)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_what_needs_no_gradient_gets_none() -> None:
    x, weight = draw(300, 161), draw(129, 161, seed=2)
    (grad,) = torch.autograd.grad(linear(x, weight.requires_grad_(), None).sum(), weight)
    torch.testing.assert_close(grad, x.sum(0).expand(129, -1), rtol=0, atol=1e-4)
    assert not linear(x, weight.detach(), None).requires_grad


def test_the_same_product_gives_the_same_bits() -> None:
    x, weight, b = draw(512, 161), draw(129, 161, seed=2), draw(129, seed=3)
    assert torch.equal(linear(x, weight, b), linear(x.clone(), weight.clone(), b.clone()))


def test_an_input_that_can_be_made_again_is_not_kept_and_gives_the_same_bits() -> None:
    inner, weight, b = draw(210, 161).requires_grad_(), draw(129, 161, seed=2), draw(129, seed=3)
    leaves, slopes = (inner, weight.requires_grad_(), b.requires_grad_()), draw(210, 129, seed=4)
    expected = torch.autograd.grad(linear(F.gelu(inner), weight, b), leaves, slopes)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x = F.gelu(inner)
        y = linear(x, weight, b, Again(F.gelu, (inner,)))
    assert inner.data_ptr() in kept and x.data_ptr() not in kept
    for found, right in zip(torch.autograd.grad(y, leaves, slopes), expected, strict=True):
        assert torch.equal(found, right)


def test_small_sixteen_bit_and_meta_products_stay_with_torch() -> None:
    weight = draw(64, 64)
    rows = LEAST // 64**2
    assert suits_onednn(draw(rows, 64), weight) and not suits_onednn(draw(rows - 1, 64), weight)
    assert not suits_onednn(draw(rows, 64).bfloat16(), weight.bfloat16())
    assert not suits_onednn(draw(rows, 64).to("meta"), weight.to("meta"))


@pytest.mark.parametrize(
    ("capabilities", "half", "narrow"),
    [
        ({"cpu_name": "AMD EPYC", "architecture": "x86_64", "avx512_f": True, "avx_vnni": True}, True, False),  # Zen 5
        ({"cpu_name": "AMD EPYC", "architecture": "x86_64", "avx512_f": True, "avx_vnni": False}, False, False),
        ({"cpu_name": "AMD Ryzen 7 5800X", "architecture": "x86_64", "avx512_f": False}, False, True),
        ({"cpu_name": "Intel Xeon 8480+", "architecture": "x86_64", "avx512_f": True, "avx_vnni": True}, False, False),
        ({"architecture": "aarch64", "neon": True}, False, False),
    ],
)
def test_what_is_known_of_the_processor(
    capabilities: dict[str, Any], half: bool, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    for known in (leaves_half_to_onednn, lacks_avx512, is_amds):
        known.cache_clear()
    try:
        assert leaves_half_to_onednn() is half
        assert lacks_avx512() is narrow
    finally:
        for known in (leaves_half_to_onednn, lacks_avx512, is_amds):
            known.cache_clear()


@pytest.mark.parametrize("weight", [draw(129, 400)[:, 100:261], draw(400, 129)[:161].t(), draw(322, 129)[::2].t()])
def test_onednn_is_given_no_weights_with_gaps(weight: Tensor) -> None:
    """It would take them by its reference code, which is thousands of times slower."""
    x = draw(300, 161)
    with Calls() as calls:
        y = times_transposed(x, weight)
    torch.testing.assert_close(y, F.linear(x, weight), rtol=0, atol=3e-5)
    ((_, given, *_),) = calls.of(torch.ops.mkldnn._linear_pointwise.default)
    assert given.is_contiguous() or given.t().is_contiguous()


def test_batches_of_products_by_onednn_keep_all_bits_and_leave_no_setting_behind() -> None:
    if not products.multiplies_batches_by_onednn():
        pytest.skip("batches of products in fp32 do not go to oneDNN on this processor")
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    left, right = (torch.randn(6, 70, 90, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    exact = left.double() @ right.double().mT
    with products.batches_by_onednn(left):
        assert matmul.fp32_precision != before
        by_onednn = torch.bmm(left, right.mT)
    assert matmul.fp32_precision == before
    # fp32 rounding of sums of 90 products of size 1; of bf16 it would be 1e-1.
    torch.testing.assert_close(by_onednn.double(), exact, rtol=0, atol=2e-5)
    with pytest.raises(RuntimeError, match="stop"), products.batches_by_onednn(left):
        raise RuntimeError("stop")
    assert matmul.fp32_precision == before


def test_a_library_that_rounds_to_bf16_gets_no_batches_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "leaves_half_to_onednn", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    multiply = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: multiply(a.bfloat16(), b.bfloat16()).float())
    products.multiplies_batches_by_onednn.cache_clear()
    try:
        assert not products.multiplies_batches_by_onednn()
    finally:
        products.multiplies_batches_by_onednn.cache_clear()
