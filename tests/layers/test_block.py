"""Blocks and their attentions: options, seams, and dropout that does not depend on how the model is cut."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.attention import AttentionShape, CrossAttention, SelfAttention, rows_of_heads
from megalith.layers.block import Block, BlockShape
from megalith.layers.initial import Initial, draw_weights
from megalith.layers.mask import Mask, make_mask
from megalith.layers.norm import Normalization
from megalith.layers.products import Again, linear
from megalith.layers.random import dropout_rows, key, rows_for
from megalith.layers.rotary import rotate, rotation_at
from tests.layers.entering import EntersBy

B, T, D, H, K = 2, 6, 16, 4, 4
NORMAL = Initial("normal", 0.3)
SHAPE = BlockShape(
    attention=AttentionShape(D, H, K, NORMAL, NORMAL),
    inner=4 * D,
    gelu="tanh",
    epsilon=1e-5,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    layer_scaling=True,
    residual_after_norm=False,
    dtype=torch.float32,
)

CAUSAL = make_mask(T, causal=True)


def stream(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(4)).to(dtype)


DROPPING = dataclasses.replace(SHAPE, attention_dropout=0.3, hidden_dropout=0.2)


def block_of(shape: BlockShape = SHAPE, *, number: int = 0, stack: str = "layers", cross: bool = False) -> Block:
    block = Block(shape, number=number, stack=stack, cross=cross)
    draw_weights(block, 1)
    return block


def test_a_block_is_norm_branch_and_residual_twice() -> None:
    block = block_of()
    x = stream()
    middle = x + block.attention(F.layer_norm(x, (D,)), CAUSAL)
    expected = middle + block.feedforward(F.layer_norm(middle, (D,)))
    torch.testing.assert_close(block(x, CAUSAL), expected)


def test_the_residual_may_be_the_norms_output() -> None:
    block = block_of(dataclasses.replace(SHAPE, residual_after_norm=True))
    x = stream()
    normed = F.layer_norm(x, (D,))
    middle = F.layer_norm(normed + block.attention(normed, CAUSAL), (D,))
    torch.testing.assert_close(block(x, CAUSAL), middle + block.feedforward(middle))


def test_self_attention_takes_query_key_and_value_of_each_head_in_turn() -> None:
    attention = SelfAttention(SHAPE.attention, number=0, divisor=1.0, dropout=0.0, where=0)
    draw_weights(attention, 1)
    x = stream()
    heads = []
    for head in range(H):
        start = 3 * K * head
        q, k, v = (x @ attention.qkv.weight[start + K * i : start + K * (i + 1)].T for i in range(3))
        scores = (q @ k.mT / K**0.5).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        heads.append(torch.softmax(scores, -1) @ v)
    torch.testing.assert_close(attention(x, CAUSAL), torch.cat(heads, -1) @ attention.out.weight.T)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("groups", [H, 2])
def test_queries_and_keys_of_each_head_are_normed_before_they_turn(kind: Normalization, groups: int) -> None:
    shape = dataclasses.replace(SHAPE.attention, num_groups=groups, norm=kind, epsilon=0.1)
    attention = SelfAttention(shape, number=0, divisor=1.0, dropout=0.0, where=0)
    draw_weights(attention, 1)
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    x, rotation = stream(), rotation_at(torch.arange(T).expand(B, T), width=K, base=100.0)
    seen: list[Tensor] = []

    def keep(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Mask, **options: Any) -> Tensor:
        seen.extend(part.transpose(1, 2) for part in (q_BHTK, k_BHSK, v_BHSK))
        return q_BHTK

    attention.attend = keep
    attention(x, CAUSAL, rotation=rotation)

    q, k, v = attention.qkv(x).unflatten(-1, (groups, -1, K)).split([H // groups, 1, 1], 3)
    for found, part, norm in ((seen[0], q, attention.q_norm), (seen[1], k, attention.k_norm)):
        assert norm is not None
        spread = (part - part.mean(-1, keepdim=True) * (kind == "LayerNorm")).flatten(2, 3)
        expected = spread / (spread.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.get_parameter("weight")
        if kind == "LayerNorm":
            expected = expected + norm.get_parameter("bias")
        torch.testing.assert_close(found, rotate(expected, rotation))
    assert torch.equal(seen[2], v.flatten(2, 3))


def test_queries_keys_and_values_may_have_the_only_bias() -> None:
    shape = dataclasses.replace(SHAPE.attention, bias=False, into_bias=True)
    attention = SelfAttention(shape, number=0, divisor=1.0, dropout=0.0, where=0)
    assert [name for name, _ in attention.named_parameters()] == ["qkv.weight", "qkv.bias", "out.weight"]


def test_cross_attention_takes_keys_and_values_from_the_encoder() -> None:
    attention = CrossAttention(SHAPE.attention, divisor=1.0, dropout=0.0, where=0)
    draw_weights(attention, 1)
    x, memory = stream(), torch.randn(B, 5, D, generator=torch.Generator().manual_seed(9))
    q = (x @ attention.query.weight.T).view(B, T, H, K).transpose(1, 2)
    k, v = (memory @ attention.key_value.weight.T).view(B, 5, H, 2, K).permute(3, 0, 2, 1, 4)
    attended = torch.softmax(q @ k.mT / K**0.5, -1) @ v
    expected = attended.transpose(1, 2).reshape(B, T, D) @ attention.out.weight.T
    torch.testing.assert_close(attention(x, memory, make_mask(T, causal=False)), expected)


def test_a_block_with_cross_attention_adds_it_between_attention_and_feed_forward() -> None:
    block = block_of(cross=True)
    x, memory = stream(), torch.randn(B, 5, D, generator=torch.Generator().manual_seed(9))
    both_ways = make_mask(T, causal=False)
    assert block.cross is not None
    expected = x + block.attention(F.layer_norm(x, (D,)), CAUSAL)
    expected = expected + block.cross(F.layer_norm(expected, (D,)), memory, both_ways)
    expected = expected + block.feedforward(F.layer_norm(expected, (D,)))
    torch.testing.assert_close(block(x, CAUSAL, memory_BSD=memory, memory_mask=both_ways), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_block_is_near_fp32_and_an_fp32_stream_stays_fp32(dtype: torch.dtype) -> None:
    expected = block_of()(stream(), CAUSAL)
    block = block_of(dataclasses.replace(SHAPE, dtype=dtype))
    narrow, wide = block(stream(dtype), CAUSAL), block(stream(), CAUSAL)
    assert (narrow.dtype, wide.dtype) == (dtype, torch.float32)
    # Branches of size 5 pass through a handful of roundings.
    for output in (narrow, wide):
        torch.testing.assert_close(output.float(), expected, rtol=0, atol=32 * torch.finfo(dtype).eps)
    assert (wide - expected).norm() < (narrow.float() - expected).norm()


def rows_of(samples: list[int]) -> Tensor:
    return dropout_rows(1234, torch.tensor(samples), T)


def test_dropout_differs_by_layer_and_stack_and_repeats_with_the_same_rows() -> None:
    rows = rows_of([0, 1])
    outputs = [
        block_of(DROPPING, number=number, stack=stack)(stream(), CAUSAL, rows)
        for number, stack in ((0, "encoder"), (1, "encoder"), (0, "decoder"))
    ]
    again = block_of(DROPPING, stack="encoder")(stream(), CAUSAL, rows)
    assert torch.equal(again, outputs[0])
    assert not torch.equal(outputs[1], outputs[0])
    assert not torch.equal(outputs[2], outputs[0])
    assert not torch.equal(block_of(DROPPING)(stream(), CAUSAL), outputs[0])


def test_dropout_of_a_sample_does_not_depend_on_its_batch() -> None:
    block = block_of(DROPPING)
    x = stream()
    whole = block(x, CAUSAL, rows_of([3, 8]))
    torch.testing.assert_close(block(x[1:], CAUSAL, rows_of([8])), whole[1:], rtol=0, atol=1e-6)


def test_dropout_is_the_same_when_heads_are_split_over_ranks() -> None:
    whole = SelfAttention(SHAPE.attention, number=0, divisor=1.0, dropout=0.5, where=77)
    draw_weights(whole, 1)
    expected = whole(stream(), CAUSAL, rows_of([0, 1]))
    total = torch.zeros_like(expected)
    for first in (0, 2):
        half = SelfAttention(
            dataclasses.replace(SHAPE.attention, num_heads=2), number=0, divisor=1.0, dropout=0.5, where=77
        )
        half.head_offset = first
        features = slice(K * first, K * (first + 2))
        with torch.no_grad():
            half.qkv.weight.copy_(whole.qkv.weight[3 * K * first : 3 * K * (first + 2)])
            nn.init.zeros_(half.qkv.bias)  # type: ignore[arg-type]
            nn.init.zeros_(half.out.bias)  # type: ignore[arg-type]
            half.out.weight.copy_(whole.out.weight[:, features])
        total += half(stream(), CAUSAL, rows_of([0, 1]))
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-6)


def test_a_part_of_the_stream_is_dropped_as_in_the_whole() -> None:
    # Sequence parallelism keeps some tokens of the stream but attends over all of them.
    block = block_of(dataclasses.replace(SHAPE, hidden_dropout=0.5))
    expected = block(stream(), CAUSAL, rows_of([0, 1]))
    block.cut = lambda rows: rows[:, 2:4]
    block.attention.qkv.enter = EntersBy(lambda x: F.layer_norm(stream(), (D,)))
    block.attention.out.leave = lambda product: product[:, 2:4]
    part = block(stream()[:, 2:4], CAUSAL, rows_of([0, 1]))
    torch.testing.assert_close(part, expected[:, 2:4], rtol=0, atol=1e-6)


def test_no_two_heads_or_tokens_share_their_masks() -> None:
    rows = rows_of_heads(rows_for(dropout_rows(1234, torch.arange(4), 256), key("layer", 0, "attention")), 0, 4)
    assert rows.shape == (4, 4, 256) and rows.unique().numel() == rows.numel()


@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
@pytest.mark.parametrize("norm", [None, "LayerNorm", "RMSNorm"])
def test_a_block_compiles_whole_without_dropout(norm: Normalization | None) -> None:
    block = block_of(dataclasses.replace(SHAPE, attention=dataclasses.replace(SHAPE.attention, norm=norm)))
    x = stream().requires_grad_()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    output = compiled(x, CAUSAL)
    torch.testing.assert_close(output, block(x, CAUSAL))
    (grad,) = torch.autograd.grad(output.square().sum(), x)
    (expected,) = torch.autograd.grad(block(x, CAUSAL).square().sum(), x)
    torch.testing.assert_close(grad, expected)


@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "differing", [{}, {"normalization": "RMSNorm"}, {"activation": "swiglu"}, {"activation": "relu"}], ids=str
)
def test_a_compiled_block_has_the_gradients_of_the_plain_one(differing: dict[str, Any], dtype: torch.dtype) -> None:
    torch._dynamo.reset()  # it compiles one function for so many blocks only
    shape = dataclasses.replace(SHAPE, hidden_dropout=0.1, dtype=dtype, **differing)
    block, x, rows = block_of(shape), stream().to(dtype).requires_grad_(), rows_of([0, 1])
    leaves = [x, *block.parameters()]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x, CAUSAL, rows).float().square().sum(), leaves)
    right = torch.autograd.grad(block(x, CAUSAL, rows).float().square().sum(), leaves)
    for one, other in zip(found, right, strict=True):
        assert (one - other).norm() <= (1e-5 if dtype == torch.float32 else 0.03) * right[0].norm()
        assert (one - other).norm() <= 0.05 * other.norm() + 1e-5


@pytest.mark.parametrize(
    "differing", [{}, {"residual_after_norm": True}, {"normalization": "RMSNorm"}], ids=["plain", "residual", "rms"]
)
def test_what_is_made_again_in_the_backward_pass_has_the_same_bits(
    differing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = AttentionShape(128, 4, 32, NORMAL, NORMAL)
    wide = dataclasses.replace(SHAPE, attention=attention, inner=512, **differing)
    block, causal = block_of(wide), make_mask(128, causal=True)
    nn.init.normal_(block.get_parameter("attention_norm.weight"))
    x = torch.randn(1, 128, 128, generator=torch.Generator().manual_seed(4), requires_grad=True)
    leaves = [x, *block.parameters()]

    def gradients(followed: list[bool]) -> tuple[Tensor, ...]:
        def product(x: Tensor, weight: Tensor, bias: Tensor | None, again: Again | None) -> Tensor:
            followed.append(again is not None)
            return linear(x, weight, bias, again if is_followed else None)

        monkeypatch.setattr("megalith.layers.linear.linear", product)
        return torch.autograd.grad(block(x, causal).square().sum(), leaves)

    is_followed, given = True, list[bool]()
    again = gradients(given)
    # Into queries, keys and values; out of them; up; down.
    assert given == [True, False, True, False]
    is_followed = False
    for found, right in zip(again, gradients([]), strict=True):
        assert torch.equal(found, right)
