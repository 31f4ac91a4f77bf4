"""The update of `CompactAdamW` in one pass over memory, for GPUs; loaded only where it is used.

The arithmetic is compact.py's, which tells what it is for; where a device rounds a product and a sum at once, the last
bit of a moment may differ, and with it now and then which way it is rounded.
"""

import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # blocks of elements that one program takes


def update(
    weights: Tensor,
    gradient: Tensor,
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    *,
    start: int,
    block: int,
    hashes: Tensor,
    words: tuple[int, int],
    decay: float,
    size: float,
    root: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Change a stretch of flat fp32 weights and its moments in place, both in int8 or both in bf16.

    first, second: all that is kept of the moments, of which the stretch is from element `start` on, a multiple of
    `block`, the elements that share a scale. hashes: int32, of at least as many elements; words: what differs between
    moments and steps. decay: what is left of a weight; size: of the step; root: of the second moment's bias correction.
    """
    count = len(weights)
    in_bf16 = "values" in first
    codes1, codes2 = (kept["values" if in_bf16 else "codes"][start:] for kept in (first, second))
    scales1, scales2 = (codes1, codes2) if in_bf16 else (kept["scales"][start // block :] for kept in (first, second))
    _update[(triton.cdiv(count, ROWS * block),)](
        weights, gradient, codes1, scales1, codes2, scales2, hashes, count, words[0], words[1],
        decay, size, root, 1 - beta1, beta2, 1 - beta2, eps, IN_BF16=in_bf16, ROWS=ROWS, WIDTH=block,
    )  # fmt: skip


@triton.jit
def _words(hashes, word):
    """Random bits, as CompactAdamW._words makes them; unsigned, so that a shift brings zeros."""
    mixed = (hashes ^ word).to(tl.uint32, bitcast=True) * 0x21F0AAAD
    return mixed ^ ((mixed >> 15) & 0x1FFFF)


@triton.jit
def _bf16(values, words):
    """The bits of bf16, after a random number was added to those that go."""
    bits = values.to(tl.uint32, bitcast=True) + (words & 0xFFFF)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _codes(values, scales, words, LARGEST: tl.constexpr, SIGNED: tl.constexpr):
    """Of each value its share of the scale as a code of 8 bits that grows with the root, rounded at random."""
    shares = tl.abs(values) / tl.maximum(scales, 1.1754943508222875e-38)
    codes = tl.sqrt(shares)
    if not SIGNED:
        codes = tl.sqrt(codes)
    codes = tl.floor(codes * LARGEST)
    below, above = codes / LARGEST, (codes + 1) / LARGEST
    below, above = below * below, above * above
    if not SIGNED:
        below, above = below * below, above * above
    # The words as they are in compact.py, signed: from -1/2 to 1/2.
    chance = words.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10 + 0.5
    codes += (shares - below > chance * (above - below)).to(tl.float32)
    if SIGNED:
        codes = tl.minimum(codes, LARGEST)
        return tl.where(values < 0, -codes, codes)
    return tl.minimum(tl.maximum(codes, 1.0), LARGEST)


# Their values are of one use: there would be a kernel for those that divide by 16, and one for 1.
@triton.jit(do_not_specialize=["count", "word1", "word2"])
def _update(
    weights, gradient, codes1, scales1, codes2, scales2, hashes, count, word1, word2,
    decay, size, root, new1, beta2, new2, eps,
    IN_BF16: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    places = blocks[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside, held = places < count, blocks * WIDTH < count
    w = tl.load(weights + places, inside, 0.0)
    g = tl.load(gradient + places, inside, 0.0).to(tl.float32)
    hashed = tl.load(hashes + places, inside, 0)
    m = tl.load(codes1 + places, inside, 0).to(tl.float32)
    v = tl.load(codes2 + places, inside, 0).to(tl.float32)
    if not IN_BF16:
        share1, share2 = m / 127, v / 255
        share2 = share2 * share2
        m = tl.where(m < 0, -share1 * share1, share1 * share1) * tl.load(scales1 + blocks, held, 0.0)[:, None]
        v = share2 * share2 * tl.load(scales2 + blocks, held, 0.0)[:, None]
    m = m + new1 * (g - m)
    v = v * beta2 + new2 * g * g
    tl.store(weights + places, w * decay - size * m / (tl.sqrt(v) / root + eps), inside)
    words1, words2 = _words(hashed, word1), _words(hashed, word2)
    if IN_BF16:
        tl.store(codes1 + places, _bf16(m, words1), inside)
        tl.store(codes2 + places, _bf16(v, words2), inside)
    else:
        largest1, largest2 = tl.max(tl.abs(m), 1), tl.max(v, 1)
        tl.store(scales1 + blocks, largest1, held)
        tl.store(scales2 + blocks, largest2, held)
        tl.store(codes1 + places, _codes(m, largest1[:, None], words1, 127, True).to(tl.int8), inside)
        tl.store(codes2 + places, _codes(v, largest2[:, None], words2, 255, False).to(tl.uint8), inside)
