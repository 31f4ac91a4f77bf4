"""The kernels of attention with dropout: their numbers by Triton's interpreter, and that they compile for GPUs."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalith.layers.attend import attend
from megalith.layers.attend_blocks import AttentionDropout
from megalith.layers.attention import AttentionShape
from megalith.layers.block import Block, BlockShape
from megalith.layers.initial import Initial, draw_weights
from megalith.layers.mask import Mask, make_mask
from megalith.layers.random import dropout_rows, mix, number_words

pytest.importorskip("triton", reason="needs triton")

from megalith.layers import attend_fused, norm_fused
from tests.layers.kernels import BACKEND, DEVICE, SIXTEEN, runs_kernels

PROBABILITY = 0.3
KERNELS = Path(__file__).parent / "compile_kernels.py"


def draw(batch: int, heads: int, queries: int, keys: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values as a projection leaves them: heads inside tokens, with gaps in memory."""
    generator = torch.Generator().manual_seed(5)
    tensors = []
    for tokens in (queries, keys, keys):
        joined = torch.randn(batch, tokens, heads, 3, width, generator=generator).to(DEVICE, dtype)
        tensors.append(joined[:, :, :, 1].transpose(1, 2).detach().requires_grad_())
    return tensors


def dropout_of(batch: int, heads: int, queries: int) -> AttentionDropout:
    rows = dropout_rows(1234, torch.arange(batch), queries)[:, None] ^ number_words(heads)[:, None]
    return AttentionDropout(PROBABILITY, mix(rows).to(DEVICE))


def both(
    inputs: list[Tensor], mask: Mask, dropout: AttentionDropout, monkeypatch: pytest.MonkeyPatch
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Output and gradients by the kernels, and by the plain form of attend.py."""
    q, k, v = inputs
    words = number_words(k.shape[2]).to(DEVICE)
    fused = attend_fused.attend_fused(
        q, k, v, mask, scale=0.3, rows_BHT=dropout.rows, words_S=words, probability=PROBABILITY
    )
    monkeypatch.setattr("megalith.layers.attend.is_fused", lambda *args, **kwargs: False)
    plain = attend(q, k, v, mask, scale=0.3, dropout=dropout)
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(6)).to(plain)
    return tuple((output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)) for output in (fused, plain))  # type: ignore[return-value]


def rule(name: str, batch: int, queries: int, keys: int) -> Mask:
    if "documents" not in name:
        return make_mask(queries, causal=name == "causal")
    generator = torch.Generator().manual_seed(3)
    numbers_BS = torch.randint(0, 2, (batch, keys), generator=generator).to(DEVICE).cumsum(1) // 5
    return make_mask(
        queries, causal="causal" in name, query_documents_BT=numbers_BS[:, -queries:], key_documents_BS=numbers_BS
    )


@runs_kernels
@pytest.mark.parametrize("name", ["causal", "both ways", "causal documents", "documents"])
@pytest.mark.parametrize(("queries", "keys", "width"), [(37, 37, 16), (20, 37, 24), (33, 100, 16)])
def test_the_kernels_give_what_the_plain_form_gives(
    name: str, queries: int, keys: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks each way, of sizes that divide nothing.
    for sizes in ("forward_blocks", "backward_blocks", "queries_blocks"):
        monkeypatch.setattr(attend_fused, sizes, lambda width: attend_fused.Blocks(16, 32, 4, 1))
    inputs = draw(2, 2, queries, keys, width, torch.float32)
    fused, plain = both(inputs, rule(name, 2, queries, keys), dropout_of(2, 2, queries), monkeypatch)
    for found, expected in zip(fused, plain, strict=True):
        # fp32 rounding of sums of a few dozen products of size 1.
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


@runs_kernels
def test_what_lies_far_apart_in_memory_is_found() -> None:
    # Beyond what 32 bits count from the first token on. Memory that nothing touches takes no room on a CPU.
    apart, tokens, width = 1 << 26, 34, 16

    def far(near: Tensor) -> Tensor:
        room = torch.empty((tokens - 1) * apart + near.shape[-1], dtype=near.dtype, device=DEVICE)
        spread = room.as_strided(near.shape, (0, 0, apart, 1))
        return spread.copy_(near)

    near = [x.detach() for x in draw(1, 1, tokens, tokens, width, torch.float16)]
    visible = rule("documents", 1, tokens, tokens).visible
    assert visible is not None
    rows, words = dropout_of(1, 1, tokens).rows, number_words(tokens).to(DEVICE)

    def run(given: list[Tensor]) -> list[Tensor]:
        mask = Mask(False, visible=given[3])
        numbers: dict[str, Any] = {"scale": 0.3, "rows_BHT": rows, "words_S": words, "probability": PROBABILITY}
        inputs = [x.detach().requires_grad_() for x in given[:3]]
        output = attend_fused.attend_fused(inputs[0], inputs[1], inputs[2], mask, **numbers)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]

    expected = run([*near, visible])
    for of_them in range(4):
        chosen = [far(x) if number == of_them else x for number, x in enumerate([*near, visible])]
        for found, want in zip(run(chosen), expected, strict=True):
            assert torch.equal(found, want)


def test_many_samples_of_many_heads_are_a_grid_that_cuda_takes() -> None:
    q = torch.empty(8192, 16, 40, 64, device="meta")
    grid = attend_fused._grid(q, 40, 16)
    assert math.prod(grid) == 3 * 16 * 8192
    assert max(grid[1:]) <= 65_535  # CUDA C++ Programming Guide, compute capabilities


@runs_kernels
def test_the_very_same_probabilities_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    # With values that are unit vectors the output shows each probability.
    q, k, _ = draw(1, 2, 16, 16, 16, torch.float32)
    v = torch.eye(16, device=DEVICE).expand(1, 2, 16, 16).clone().requires_grad_()
    fused, plain = both([q, k, v], make_mask(16, causal=False), dropout_of(1, 2, 16), monkeypatch)
    assert torch.equal(fused[0] == 0, plain[0] == 0)
    assert 0.1 < float((plain[0] == 0).float().mean()) < 0.5


@runs_kernels
def test_16_bit_is_near_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(1, 2, 40, 40, 16, SIXTEEN)
    mask = make_mask(40, causal=True)
    fused, _ = both(inputs, mask, dropout_of(1, 2, 40), monkeypatch)
    _, exact = both([x.detach().float().requires_grad_() for x in inputs], mask, dropout_of(1, 2, 40), monkeypatch)
    for found, expected in zip(fused, exact, strict=True):
        assert found.dtype == SIXTEEN
        size = float(expected.abs().max())
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=4 * torch.finfo(SIXTEEN).eps * size)


@runs_kernels
def test_a_query_that_sees_nothing_gets_zero_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(1, 1, 20, 20, 16, torch.float32)
    numbers = torch.zeros(1, 20, dtype=torch.int64, device=DEVICE)
    numbers_of_queries = numbers.clone()
    numbers_of_queries[:, 7] = 9
    mask = make_mask(20, causal=False, query_documents_BT=numbers_of_queries, key_documents_BS=numbers)
    fused, _ = both(inputs, mask, dropout_of(1, 1, 20), monkeypatch)
    for of_queries in fused[:2]:
        assert torch.equal(of_queries[:, :, 7], torch.zeros_like(of_queries[:, :, 7]))
        assert float(of_queries[:, :, 6].abs().max()) > 0
    assert all(bool(tensor.isfinite().all()) for tensor in fused)


@runs_kernels
@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
def test_a_block_with_dropout_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalith.layers.attend.is_fused", lambda *args, **kwargs: True)
    block = a_block()
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(8)).to(DEVICE).requires_grad_()
    rows = dropout_rows(1234, torch.arange(2), 20).to(DEVICE)
    trained = [x, *block.parameters()]

    def run(forward: Any) -> list[Tensor]:
        y = forward(x, make_mask(20, causal=True), rows)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), trained)]

    plain = run(block)
    for found, expected in zip(run(torch.compile(block, backend=BACKEND, fullgraph=True)), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def a_block() -> Block:
    std = Initial("normal", 0.2)
    shape = BlockShape(
        AttentionShape(32, 2, 16, std, std), 64, "tanh", 1e-5, PROBABILITY, PROBABILITY, True, False, torch.float32
    )  # fmt: skip
    block = Block(shape, number=3, stack="decoder", device=DEVICE)
    draw_weights(block, 7)
    return block


@pytest.mark.parametrize(
    ("capability", "dtypes"),
    [(90, ["bf16"]), pytest.param(80, ["bf16", "fp32"], marks=pytest.mark.slow)],
)
def test_the_kernels_compile_for_gpus(capability: int, dtypes: list[str]) -> None:
    """Without a GPU: Triton brings the assembler along. In a process in which nothing is interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(KERNELS), str(capability), *dtypes]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = ended.stdout.splitlines()
    assert len(lines) == (4 * 2 + 3 + 2) * len(dtypes) + 2
    # What a block may have of a multiprocessor's shared memory: 163 KiB on the A100, 227 on the H100.
    assert all(int(line.split()[-2]) <= 163 * 1024 for line in lines), ended.stdout
    # As many programs of a norm's backward pass as are started find room on an H100, whose multiprocessors have 65,536.
    (registers,) = (int(line.split()[4]) for line in lines if line.startswith("_norm_backward bf16 1600 "))
    assert capability != 90 or registers <= 65_536 // (32 * norm_fused.WARPS), ended.stdout
