"""Attention a block of queries at a time, at sizes of several blocks, against one plain formula in float64."""

import pytest
import torch
from torch import Tensor

from megalith.layers import attend as attending
from megalith.layers import attend_blocks
from megalith.layers.attend import attend
from megalith.layers.attend_blocks import AttentionDropout, attend_in_blocks, suits_blocks
from megalith.layers.mask import Mask, make_mask, with_bias
from megalith.layers.random import dropout_rows, keep_mask, mix, number_words

B, H, T, K = 2, 4, 150, 8  # of 64 queries, 64 and 22; in 16 bits of 128 and 22
DOCUMENTS = (torch.arange(T)[None] // torch.tensor([[70], [41]])).int()
# Sums of 150 products of size 1; in 16 bits scores, probabilities and their gradients are rounded as well.
ALLOWED = {torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def plainly(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, kept: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    k, v = (part.double().repeat_interleave(shared, 1) for part in (k, v))
    scores = q.double() @ k.mT * 0.3 + (0 if bias is None else bias.double())
    p = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1).masked_fill(~visible, 0)
    return (p if kept is None else p * kept) @ v


def draw(dtype: torch.dtype, *, queries: int = T, key_heads: int = H) -> list[Tensor]:
    """Queries, keys and values, heads inside tokens in memory as a layer has them."""
    generator = torch.Generator().manual_seed(5)
    sizes = [(queries, H), (T, key_heads), (T, key_heads)]
    parts = [torch.randn(B, tokens, heads, K, generator=generator) for tokens, heads in sizes]
    return [part.to(dtype).transpose(1, 2).requires_grad_() for part in parts]


def compare(output: Tensor, expected: Tensor, inputs: list[Tensor], allowed: float) -> None:
    assert output.dtype == inputs[0].dtype
    torch.testing.assert_close(output.double(), expected.double(), rtol=0, atol=allowed)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(6))
    grads = torch.autograd.grad((output.double() * weights).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        most = float(expected_grad.abs().max())
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=allowed * max(1.0, most))


def rule(name: str) -> tuple[Mask, Tensor]:
    order, same = torch.ones(T, T, dtype=torch.bool).tril(), DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None, :]
    causal = name.startswith("causal")
    if name in ("causal", "both ways"):
        return make_mask(T, causal=causal), order if causal else torch.ones(T, T, dtype=torch.bool)
    return make_mask(T, causal=causal, query_documents_BT=DOCUMENTS), same & order if causal else same


@pytest.mark.parametrize("name", ["causal", "both ways", "causal documents", "documents"])
@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("key_heads", [H, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_the_formula(
    name: str, probability: float, key_heads: int, dtype: torch.dtype
) -> None:
    mask, visible = rule(name)
    dropout = kept = None
    if probability:
        rows = mix(dropout_rows(1234, torch.arange(B), T)[:, None] ^ number_words(H)[:, None])
        dropout = AttentionDropout(probability, rows)
        kept = keep_mask(rows, number_words(T), probability) / (1 - probability)
    inputs = draw(dtype, key_heads=key_heads)
    output = attend_in_blocks(inputs[0], inputs[1], inputs[2], mask, scale=0.3, dropout=dropout)
    compare(output, plainly(inputs[0], inputs[1], inputs[2], visible, kept), inputs, ALLOWED[dtype])


@pytest.mark.parametrize("scores_at_once", [T, 64 * T, 3 * 64 * T, 5 * 64 * T])
def test_heads_and_samples_that_are_computed_apart_are_the_same(
    monkeypatch: pytest.MonkeyPatch, scores_at_once: int
) -> None:
    monkeypatch.setattr(attend_blocks, "_SCORES_AT_ONCE", {"cpu": scores_at_once})
    mask, visible = rule("causal documents")
    inputs = draw(torch.float32, key_heads=2)
    output = attend_in_blocks(inputs[0], inputs[1], inputs[2], mask, scale=0.3)
    compare(output, plainly(inputs[0], inputs[1], inputs[2], visible), inputs, ALLOWED[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fewer_queries_are_the_last_of_the_keys(dtype: torch.dtype) -> None:
    inputs = draw(dtype, queries=100)
    output = attend_in_blocks(inputs[0], inputs[1], inputs[2], make_mask(100, causal=True), scale=0.3)
    visible = torch.ones(100, T, dtype=torch.bool).tril(T - 100)
    compare(output, plainly(inputs[0], inputs[1], inputs[2], visible), inputs, ALLOWED[dtype])


@pytest.mark.parametrize("samples", [1, B])
def test_a_bias_of_scores_is_added_and_has_its_gradient(samples: int) -> None:
    bias = torch.randn(samples, H, T, T, generator=torch.Generator().manual_seed(7)).requires_grad_()
    inputs = draw(torch.float32)
    mask, visible = rule("causal documents")
    output = attend_in_blocks(inputs[0], inputs[1], inputs[2], with_bias(mask, bias), scale=0.3)
    expected = plainly(inputs[0], inputs[1], inputs[2], visible, bias=bias)
    compare(output, expected, [*inputs, bias], ALLOWED[torch.float32])


def test_in_fp16_scores_beyond_its_range_fit_by_their_divisor() -> None:
    inputs = draw(torch.float16)
    large = [inputs[0].detach().mul(150).requires_grad_(), inputs[1].detach().mul(150).requires_grad_(), inputs[2]]
    order = torch.ones(T, T, dtype=torch.bool).tril()
    # Some scores are beyond 65,504, of hidden keys as well.
    assert ((large[0].float() @ large[1].float().mT).abs() * 0.3).max() > 65504
    output = attend_in_blocks(large[0], large[1], large[2], make_mask(T, causal=True), scale=0.3, divisor=8.0)
    assert output.isfinite().all()
    expected = plainly(large[0], large[1], large[2], order)
    # Of scores that are thousands apart one key has all of the weight; where two are as close as rounding, the other.
    differs = (output.double() - expected).abs().amax(-1) > 0.01
    assert differs.double().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_processor_for_blocks_attends_by_them_as_torch_does(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(attend_blocks, "is_amds", lambda: True)
    monkeypatch.setattr(attend_blocks, "multiplies_bf16_without_amx", lambda: True)
    monkeypatch.setattr(attend_blocks, "multiplies_batches_by_onednn", lambda: True)
    monkeypatch.setattr(attend_blocks, "_LEAST_PRODUCTS", 0)
    inputs = draw(dtype)
    assert suits_blocks(inputs[0], inputs[1])
    output = attend(inputs[0], inputs[1], inputs[2], make_mask(T, causal=True), scale=0.3)
    assert output.grad_fn is not None and "Blocks" in output.grad_fn.name()
    monkeypatch.setattr(attending, "suits_blocks", lambda q, k: False)
    by_torch = attend(inputs[0], inputs[1], inputs[2], make_mask(T, causal=True), scale=0.3)
    assert by_torch.grad_fn is not None and "Blocks" not in by_torch.grad_fn.name()
    compare(output, by_torch.double(), inputs, ALLOWED[dtype])


def of_size(
    samples: int, heads: int, tokens: int, width: int, *, dtype: torch.dtype = torch.float32, queries: int | None = None
) -> tuple[Tensor, Tensor]:
    nothing = torch.zeros((), dtype=dtype)
    return nothing.expand(samples, heads, queries or tokens, width), nothing.expand(samples, heads, tokens, width)


@pytest.mark.parametrize("by_onednn", [True, False])
def test_what_suits_blocks(monkeypatch: pytest.MonkeyPatch, by_onednn: bool) -> None:
    monkeypatch.setattr(attend_blocks, "is_amds", lambda: True)
    monkeypatch.setattr(attend_blocks, "multiplies_bf16_without_amx", lambda: True)
    monkeypatch.setattr(attend_blocks, "multiplies_batches_by_onednn", lambda: by_onednn)
    usual = of_size(2, 12, 512, 64)
    assert suits_blocks(*usual)
    assert suits_blocks(*of_size(1, 12, 2048, 64)) == by_onednn  # torch's kernel is faster than MKL's batches there
    assert suits_blocks(*of_size(8, 6, 128, 64)) == by_onednn
    assert suits_blocks(*of_size(4, 16, 512, 32)) == by_onednn
    assert not suits_blocks(*of_size(8, 4, 128, 32))  # a step of small operations
    assert not suits_blocks(*of_size(64, 12, 1024, 64, queries=5))  # as of a text that is continued
    assert not suits_blocks(*of_size(1, 3, 1024, 128))
    assert not suits_blocks(*(part.to("meta") for part in usual))
    for dtype, suits in ((torch.bfloat16, True), (torch.float16, False)):
        assert suits_blocks(*of_size(8, 4, 128, 32, dtype=dtype)) == suits
        assert suits_blocks(*of_size(1, 12, 2048, 64, dtype=dtype)) == suits
    monkeypatch.setattr(attend_blocks, "multiplies_bf16_without_amx", lambda: False)
    assert suits_blocks(*usual)
    assert not suits_blocks(*of_size(8, 4, 128, 32, dtype=torch.bfloat16))
    monkeypatch.setattr(attend_blocks, "is_amds", lambda: False)
    assert not suits_blocks(*usual)


SIZES_OF_KEYS = (40, 256, 1000, 1024, 1600, 2048, 8192)


@pytest.mark.parametrize("by_onednn", [True, False])
def test_a_block_has_more_queries_where_it_hides_a_small_part_of_many_keys(
    monkeypatch: pytest.MonkeyPatch, by_onednn: bool
) -> None:
    monkeypatch.setattr(attend_blocks, "multiplies_batches_by_onednn", lambda: by_onednn)
    of_keys = [attend_blocks.scores_of_a_block(torch.float32, heads=1, queries=n, keys=n) / n for n in SIZES_OF_KEYS]
    assert of_keys == ([40, 64, 64, 128, 192, 256, 256] if by_onednn else [40, *[64] * 6])
    of_16 = [attend_blocks.scores_of_a_block(torch.bfloat16, heads=1, queries=n, keys=n) / n for n in SIZES_OF_KEYS]
    assert of_16 == [40, *[128] * 6]
