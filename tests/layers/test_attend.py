"""All forms of attention against one plain formula in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megalith.layers import attend as attending
from megalith.layers.attend import attend
from megalith.layers.attend_blocks import AttentionDropout
from megalith.layers.mask import Mask, document_blocks, make_mask, with_bias
from megalith.layers.random import dropout_rows, keep_mask, mix, number_words
from tests.largest import Largest

B, H, T, K = 2, 3, 12, 8
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0, 1] + [2] * 10], dtype=torch.int32)


def draw(*, keys: int = T, dtype: torch.dtype = torch.float32, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    q = (size * torch.randn(B, H, T, K, generator=generator)).to(dtype)
    k = torch.randn(B, H, keys, K, generator=generator).to(dtype)
    v = torch.randn(B, H, keys, K, generator=generator).to(dtype)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def plainly(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, kept: Tensor | None = None) -> Tensor:
    scores = (q.double() @ k.double().mT * scale).masked_fill(~visible, -torch.inf)
    p = torch.softmax(scores, -1).masked_fill(~visible, 0)
    return (p if kept is None else p * kept) @ v.double()


def drop_some(probability: float, keys: int = T) -> tuple[AttentionDropout, Tensor]:
    """The dropout and what it multiplies probabilities by."""
    rows = dropout_rows(1234, torch.arange(B), T)[:, None] ^ number_words(H)[:, None]
    dropout = AttentionDropout(probability, mix(rows))
    return dropout, keep_mask(dropout.rows, number_words(keys), probability) / (1 - probability)


def draw_last(num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that are the last of the keys."""
    q, k, v = draw()
    return q.detach()[:, :, T - num_queries :].requires_grad_(), k, v


def rule(name: str) -> tuple[Mask, Tensor]:
    """A mask and what it makes visible."""
    order = torch.ones(T, T, dtype=torch.bool).tril()
    same = DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None, :]
    if name == "causal":
        return make_mask(T, causal=True), order.expand(B, 1, T, T)
    if name == "both ways":
        return make_mask(T, causal=False), torch.ones(B, 1, T, T, dtype=torch.bool)
    if name == "causal documents":
        return make_mask(T, causal=True, query_documents_BT=DOCUMENTS), same & order
    return make_mask(T, causal=False, query_documents_BT=DOCUMENTS), same


RULES = ["causal", "both ways", "causal documents", "documents"]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_attention_and_its_gradients_are_the_formula(name: str, probability: float) -> None:
    mask, visible = rule(name)
    dropout, kept = drop_some(probability) if probability else (None, None)
    inputs = draw()
    output = attend(*inputs, mask, scale=0.3, dropout=dropout)
    expected = plainly(*inputs, visible, 0.3, kept)
    # fp32 rounding: values are sums of a dozen products of size 1.
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-6)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(6))
    grads = torch.autograd.grad((output * weights).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=5e-6)


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("scores_at_once", [3 * T, 1 << 19])
def test_in_causal_order_fewer_queries_are_the_last_of_the_keys(
    monkeypatch: pytest.MonkeyPatch, probability: float, scores_at_once: int
) -> None:
    monkeypatch.setattr("megalith.layers.attend_blocks._SCORES_AT_ONCE", {"cpu": scores_at_once})
    dropout, kept = drop_some(probability) if probability else (None, None)
    if dropout is not None and kept is not None:
        dropout, kept = AttentionDropout(probability, dropout.rows[:, :, T - 5 :]), kept[:, :, T - 5 :]
    inputs = draw_last(5)
    output = attend(*inputs, make_mask(5, causal=True), scale=0.3, dropout=dropout)
    expected = plainly(*inputs, rule("causal")[1][:, :, T - 5 :], 0.3, kept)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-6)
    grads = torch.autograd.grad(output.square().sum(), inputs)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=5e-6)


@pytest.mark.filterwarnings("ignore")  # torch says which of its kernels are for GPUs only
def test_the_order_that_a_gpus_kernels_are_told_is_the_same_and_takes_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = draw_last(5)
    expected = attend(*inputs, make_mask(5, causal=True), scale=0.3)
    assert attending._lower_right(5, T).untyped_storage().nbytes() == 0
    monkeypatch.setattr(attending, "_as_the_last", lambda q, k, v: attending._lower_right(q.shape[2], k.shape[2]))
    for way in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        assert torch.equal(way(*inputs, make_mask(5, causal=True), scale=0.3), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_fewer_queries_are_the_last_of_the_keys(dtype: torch.dtype) -> None:
    inputs = [x.detach().to("cuda", dtype).requires_grad_() for x in draw_last(5)]
    output = attend(inputs[0], inputs[1], inputs[2], make_mask(5, causal=True), scale=0.3)
    expected = plainly(inputs[0], inputs[1], inputs[2], rule("causal")[1][:, :, T - 5 :].cuda(), 0.3)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=3e-2)
    grads = torch.autograd.grad(output.float().sum(), inputs)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(grad.float(), expected_grad.float(), rtol=0, atol=6e-2)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_heads_that_share_keys_are_as_if_each_had_its_own(name: str, probability: float) -> None:
    mask, visible = rule(name)
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(B, heads, T, K, generator=generator).requires_grad_() for heads in (6, 2, 2))
    rows = mix(dropout_rows(1234, torch.arange(B), T)[:, None] ^ number_words(6)[:, None])
    dropout = AttentionDropout(probability, rows) if probability else None
    kept = keep_mask(rows, number_words(T), probability) / (1 - probability) if probability else None
    output = attend(q, k, v, mask, scale=0.3, dropout=dropout)
    own_k, own_v = (part.repeat_interleave(3, 1) for part in (k, v))
    expected = plainly(q, own_k, own_v, visible, 0.3, kept)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-6)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(6))
    grads = torch.autograd.grad((output * weights).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("scores_at_once", [7 * T, 1 << 19])
def test_a_bias_of_the_scores_and_its_gradient_are_the_formula(
    monkeypatch: pytest.MonkeyPatch, name: str, probability: float, scores_at_once: int
) -> None:
    monkeypatch.setattr("megalith.layers.attend_blocks._SCORES_AT_ONCE", {"cpu": scores_at_once})
    mask, visible = rule(name)
    dropout, kept = drop_some(probability) if probability else (None, None)
    bias = torch.randn(1, H, T, T, generator=torch.Generator().manual_seed(7), requires_grad=True)
    inputs = (*draw(), bias)
    output = attend(*inputs[:3], with_bias(mask, bias), scale=0.3, divisor=2.0, dropout=dropout)
    q, k, v = (tensor.double() for tensor in inputs[:3])
    scores = (q @ k.mT * 0.3 + bias.double()).masked_fill(~visible, -torch.inf)
    p = torch.softmax(scores, -1)
    expected = (p if kept is None else p * kept) @ v
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-6)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(6))
    grads = torch.autograd.grad((output * weights).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=5e-6)


@pytest.mark.parametrize("scores_at_once", [1, 7 * T, 2 * T * T])
def test_attention_with_dropout_is_the_same_in_parts_of_any_size(
    monkeypatch: pytest.MonkeyPatch, scores_at_once: int
) -> None:
    mask, _ = rule("causal")
    dropout, _ = drop_some(0.3)
    inputs = draw()
    expected = attend(*inputs, mask, scale=0.3, dropout=dropout)
    expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
    monkeypatch.setattr("megalith.layers.attend_blocks._SCORES_AT_ONCE", {"cpu": scores_at_once})
    output = attend(*inputs, mask, scale=0.3, dropout=dropout)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    for grad, expected_grad in zip(torch.autograd.grad(output.square().sum(), inputs), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=5e-6)


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_cross_attention_sees_the_keys_of_its_document_only(probability: float) -> None:
    key_documents = torch.tensor([[0] * 4 + [-1] * 3, [0] * 7], dtype=torch.int32)
    query_documents = torch.zeros(B, T, dtype=torch.int32)
    mask = make_mask(T, causal=False, query_documents_BT=query_documents, key_documents_BS=key_documents)
    dropout, kept = drop_some(probability, keys=7) if probability else (None, None)
    inputs = draw(keys=7)
    output = attend(*inputs, mask, scale=0.3, dropout=dropout)
    visible = (key_documents == 0)[:, None, None, :].expand(B, 1, T, 7)
    torch.testing.assert_close(output.double(), plainly(*inputs, visible, 0.3, kept), rtol=0, atol=2e-6)


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_a_query_that_sees_nothing_gets_zero_and_no_gradient(probability: float) -> None:
    queries = torch.full((B, T), 7, dtype=torch.int32)
    mask = make_mask(T, causal=False, query_documents_BT=queries, key_documents_BS=torch.zeros(B, T, dtype=torch.int32))
    inputs = draw()
    output = attend(*inputs, mask, scale=0.3, dropout=drop_some(probability)[0] if probability else None)
    assert torch.equal(output, torch.zeros_like(output))
    for grad in torch.autograd.grad(output.sum(), inputs):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_blocked_keys_have_no_influence_at_all() -> None:
    mask, _ = rule("causal documents")
    q, k, v = draw()
    for dropout in (None, drop_some(0.3)[0]):
        output = attend(q, k, v, mask, scale=0.3, dropout=dropout)
        k2, v2 = k.detach().clone(), v.detach().clone()
        k2[0, :, 5:], v2[0, :, 5:] = 1e4, 1e4
        changed = attend(q, k2, v2, mask, scale=0.3, dropout=dropout)
        assert torch.equal(changed[0, :, :5], output[0, :, :5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_16_bit_attention_is_near_fp32(dtype: torch.dtype, probability: float) -> None:
    mask, visible = rule("causal")
    dropout, kept = drop_some(probability) if probability else (None, None)
    inputs = draw(dtype=dtype)
    output = attend(*inputs, mask, scale=0.3, divisor=3.0, dropout=dropout)
    assert output.dtype == dtype
    grads = torch.autograd.grad(output.float().sum(), inputs)
    expected = plainly(*inputs, visible, 0.3, kept)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.sum(), inputs), strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(
            grad.float(),
            expected_grad.float(),
            rtol=0,
            atol=8 * torch.finfo(dtype).eps * float(expected_grad.abs().max()),
        )


def test_the_divisor_keeps_stored_scores_inside_fp16() -> None:
    mask, visible = rule("causal")
    dropout, kept = drop_some(0.3)
    inputs = draw(dtype=torch.float16, size=2**13)  # scores of some 10^5, fp16 ends at 65504
    with_divisor = attend(*inputs, mask, scale=3.0, divisor=48.0, dropout=dropout)
    without = attend(*inputs, mask, scale=3.0, divisor=1.0, dropout=dropout)
    assert not torch.isfinite(without).all()
    # With scores this large the softmax picks one key, whatever the rounding.
    torch.testing.assert_close(with_divisor.double(), plainly(*inputs, visible, 3.0, kept), rtol=0, atol=5e-3)


def test_flex_attention_by_blocks_sees_what_the_dense_mask_shows() -> None:
    from torch.nn.attention.flex_attention import create_mask

    for causal in (True, False):
        blocks = document_blocks(DOCUMENTS, DOCUMENTS, causal=causal)
        dense = create_mask(blocks.mask_mod, B, 1, T, T, device="cpu")
        assert torch.equal(dense, rule("causal documents" if causal else "documents")[1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "ahead"), [(128, 0), (1000, 0), (1280, 0), (1000, 300)])
@pytest.mark.parametrize("numbering", ["one after the other", "at random"])
def test_blocks_are_those_of_the_dense_mask(numbering: str, length: int, ahead: int, causal: bool) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    generator = torch.Generator().manual_seed(length)
    numbers = (torch.rand(3, length, generator=generator) < torch.tensor([[0.0], [0.003], [0.03]])).cumsum(1)
    if numbering == "at random":
        numbers = torch.randint(-9, 9, (1000,), generator=generator)[numbers]
    found = document_blocks(numbers[:, ahead:], numbers, causal=causal)
    expected = create_block_mask(found.mask_mod, 3, None, length - ahead, length, device="cpu")
    assert found.shape == expected.shape and found.BLOCK_SIZE == expected.BLOCK_SIZE
    for blocks, dense in zip(pieces_of(found), pieces_of(expected), strict=True):
        if numbering == "one after the other":
            assert torch.equal(blocks["partial"], dense["partial"])
        assert torch.equal(blocks["full"], dense["full"])
        assert not (dense["partial"] & ~blocks["partial"]).any(), "all that is seen is looked at"


def pieces_of(blocks: Any) -> list[dict[str, Tensor]]:
    """bool B1XY, for keys by queries and for queries by keys: which blocks are looked into, which are seen whole."""

    def dense(of: str) -> Tensor:
        count, numbers = getattr(blocks, f"{of}_num_blocks"), getattr(blocks, f"{of}_indices")
        assert count.dtype == numbers.dtype == torch.int32
        chosen = torch.arange(numbers.shape[-1]) < count[..., None]
        return torch.zeros_like(numbers, dtype=torch.bool).scatter(-1, numbers.long(), chosen)

    return [{"partial": dense(of), "full": dense(f"full_{of}")} for of in ("kv", "q")]


def test_blocks_of_documents_take_no_number_for_every_query_and_key() -> None:
    documents = torch.zeros(2, 2048, dtype=torch.int32)
    with Largest() as noted:
        document_blocks(documents, documents, causal=True)
    assert noted.elements <= documents.numel()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
@pytest.mark.parametrize("name", ["causal documents", "documents"])
def test_flex_attention_and_its_gradients_are_the_formula(name: str) -> None:
    documents = DOCUMENTS.cuda().repeat_interleave(16, dim=1)
    mask = make_mask(16 * T, causal=name == "causal documents", query_documents_BT=documents, dense=False)
    assert mask.blocks is not None
    visible = make_mask(16 * T, causal=mask.causal, query_documents_BT=documents).visible
    assert visible is not None
    generator = torch.Generator("cuda").manual_seed(5)
    inputs = [torch.randn(B, H, 16 * T, 64, device="cuda", generator=generator).requires_grad_() for _ in range(3)]
    output = attend(inputs[0], inputs[1], inputs[2], mask, scale=0.125)
    expected = plainly(inputs[0], inputs[1], inputs[2], visible, 0.125)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=5e-3)
    grads = torch.autograd.grad(output.sum(), inputs)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=2e-2)
