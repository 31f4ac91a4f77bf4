import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.layers import loss as loss_module
from megalith.layers.loss import per_token_losses, vocabulary_cross_entropy
from tests.largest import Largest


def draw(dtype: torch.dtype = torch.float32, *, vocabulary: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 7, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    table = torch.randn(vocabulary, 8, generator=generator, dtype=torch.float64).float().requires_grad_()
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).float().requires_grad_()
    labels = torch.randint(vocabulary, (3, 7), generator=generator)
    weights = torch.rand(3, 7, generator=generator)
    weights[0, :3] = 0
    return hidden, table, bias, labels, weights


def plain_loss(hidden: Tensor, table: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor) -> Tensor:
    logits = F.linear(hidden, table, bias)
    return (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none") * weights.flatten()).sum()


@pytest.mark.parametrize("chunk", [1, 4, 21, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients_are_those_of_the_whole_logits_in_float64(chunk: int, with_bias: bool) -> None:
    hidden, table, bias, labels, weights = draw()
    inputs = [hidden, table, bias] if with_bias else [hidden, table]
    loss = vocabulary_cross_entropy(hidden, table, labels, weights, bias_V=bias if with_bias else None, chunk=chunk)
    grads = torch.autograd.grad(3 * loss, inputs)

    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = plain_loss(doubles[0], doubles[1], doubles[2] if with_bias else None, labels, weights.double())
    expected_grads = torch.autograd.grad(3 * expected, doubles)
    # fp32 rounding of sums over 40 entries.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=1e-6 * float(expected_grad.abs().max()))


def test_without_gradients_the_loss_is_the_same() -> None:
    hidden, table, bias, labels, weights = draw()
    loss = vocabulary_cross_entropy(hidden, table, labels, weights, bias_V=bias, chunk=4)
    with torch.no_grad():
        evaluated = vocabulary_cross_entropy(hidden, table, labels, weights, bias_V=bias, chunk=4)
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, loss.detach(), rtol=1e-6, atol=0)


def test_token_losses_are_those_of_torch_and_add_up_to_the_loss() -> None:
    hidden, table, bias, labels, weights = draw()
    losses = per_token_losses(hidden, table, labels, bias_V=bias)
    logits = F.linear(hidden, table, bias)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 7)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-6, atol=1e-6)
    loss = vocabulary_cross_entropy(hidden, table, labels, weights, bias_V=bias)
    torch.testing.assert_close((losses * weights).sum(), loss.detach(), rtol=1e-6, atol=0)


def test_a_label_whose_probability_underflows_has_the_exact_loss() -> None:
    table = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    hidden = torch.tensor([[[200.0], [1.0]]], requires_grad=True)
    labels = torch.tensor([[2, 0]])
    loss = vocabulary_cross_entropy(hidden, table, labels, torch.ones(1, 2))
    expected = plain_loss(hidden.double(), table.double(), None, labels, torch.ones(1, 2, dtype=torch.float64))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert float(loss.detach()) > 400


def test_labels_without_weight_may_be_negative_and_give_no_gradient() -> None:
    hidden, table, _, labels, weights = draw()
    masked = torch.where(weights == 0, -1, labels)
    loss = vocabulary_cross_entropy(hidden, table, masked, weights)
    assert torch.equal(loss, vocabulary_cross_entropy(hidden, table, labels, weights))
    (grad,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(grad[weights == 0], torch.zeros(3, 8))


def test_the_logits_never_exist_whole() -> None:
    hidden, table, _, labels, weights = draw(vocabulary=4000)
    whole = hidden.shape[0] * hidden.shape[1] * len(table)
    with Largest() as plain:
        plain_loss(hidden, table, None, labels, weights).backward()
    with Largest() as chunked:
        vocabulary_cross_entropy(hidden, table, labels, weights, chunk=4).backward()
    assert plain.elements == whole
    # What is left is the table and its gradient.
    assert chunked.elements == table.numel() < whole / 2


@pytest.mark.parametrize("vocabulary", [40, 4000])
@pytest.mark.parametrize("softmax_in_16_bit", [False, True])
def test_losses_are_rounded_to_16_bits_only_if_the_softmax_is_in_16_bits(
    vocabulary: int, softmax_in_16_bit: bool
) -> None:
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(3, 7, 200, generator=generator).bfloat16()
    table = torch.randn(vocabulary, 200, generator=generator)
    labels = torch.randint(vocabulary, (3, 7), generator=generator)
    losses = per_token_losses(hidden, table, labels, softmax_in_16_bit=softmax_in_16_bit)
    assert torch.equal(losses, losses.bfloat16().float()) == softmax_in_16_bit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softmax_in_16_bit", [False, True])
def test_16_bit_activations_give_fp32_losses_near_those_of_fp32(dtype: torch.dtype, softmax_in_16_bit: bool) -> None:
    hidden, table, bias, labels, weights = draw(dtype)
    loss = vocabulary_cross_entropy(
        hidden, table, labels, weights, bias_V=bias, softmax_in_16_bit=softmax_in_16_bit, chunk=4
    )
    grads = torch.autograd.grad(loss, [hidden, table, bias])
    assert loss.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [dtype, torch.float32, torch.float32]

    doubles = [x.detach().double().requires_grad_() for x in (hidden, table, bias)]
    expected = plain_loss(doubles[0], doubles[1], doubles[2], labels, weights.double())
    expected_grads = torch.autograd.grad(expected, doubles)
    # A logit near 8 is rounded by 2^-8 (bf16) or 2^-11 (fp16) of itself, a sum of such losses by less.
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), expected, rtol=2 * rounding, atol=0)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(
            grad.double(), expected_grad, rtol=0, atol=8 * rounding * float(expected_grad.abs().max())
        )


def test_fp16_gradients_survive_small_losses_by_the_scale_in_the_weights() -> None:
    hidden, table, _, labels, weights = draw(torch.float16)
    small = weights / 2**20
    lost = vocabulary_cross_entropy(hidden, table, labels, small)
    scaled = vocabulary_cross_entropy(hidden, table, labels, small * 2**16)
    (expected,) = torch.autograd.grad(vocabulary_cross_entropy(hidden, table, labels, weights), hidden)
    (without_scale,) = torch.autograd.grad(lost, hidden)
    (with_scale,) = torch.autograd.grad(scaled, hidden)
    relative = (with_scale.float() * 16 - expected.float()).norm() / expected.float().norm()
    assert relative < 1e-3
    assert (without_scale.float() * 2**20 - expected.float()).norm() / expected.float().norm() > 10 * relative


@pytest.mark.parametrize("factors", [(1.0, 1.0), (2.0, 2.0), (2.0, 1.0), (1.0, 2.0)])
def test_a_backward_pass_in_two_halves_finds_its_gradients_again(factors: tuple[float, float]) -> None:
    hidden, table, _, labels, weights = draw()
    (plain,) = torch.autograd.grad(vocabulary_cross_entropy(hidden, table, labels, weights), table)
    loss = vocabulary_cross_entropy(hidden, table, labels, weights)
    for wanted, factor in zip((hidden, table), factors, strict=True):
        (found,) = torch.autograd.grad(loss, wanted, torch.tensor(factor), retain_graph=True)
    torch.testing.assert_close(found, plain * factors[1])


@pytest.mark.parametrize("softmax_in_16_bit", [False, True])
def test_the_formula_for_gpus_is_what_the_steps_in_place_give(softmax_in_16_bit: bool) -> None:
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(6, 50, generator=generator).mul(4).bfloat16()
    labels = torch.randint(0, 50, (6, 1), generator=generator)
    hidden, table = torch.zeros(6, 8), torch.zeros(50, 8)
    expected = loss_module._slopes_and_losses(logits.clone(), labels, hidden, table, None, softmax_in_16_bit)
    losses = loss_module.become_slopes(logits, labels, softmax_in_16_bit)
    for found, wanted in zip((logits, losses), expected, strict=True):
        torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=0)


def test_the_gradient_of_an_fp32_table_is_not_rounded_to_16_bits() -> None:
    generator = torch.Generator().manual_seed(10)
    hidden = torch.randn(1, 6, 8, generator=generator).bfloat16().requires_grad_()
    table = torch.randn(50, 8, generator=generator).requires_grad_()
    labels = torch.randint(0, 50, (1, 6), generator=generator)
    # Two chunks: the sum of two products in 16 bits has more bits.
    vocabulary_cross_entropy(hidden, table, labels, torch.rand(1, 6, generator=generator), chunk=3).backward()
    assert table.grad is not None and table.grad.dtype == torch.float32
    assert not torch.equal(table.grad, table.grad.bfloat16().float())
