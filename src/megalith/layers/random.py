"""Randomness by counter: every number is a hash of what it is for, never a place in a stream.

So dropout masks and initial weights do not depend on batch size, rank, layout or restarts, and recomputation needs no
generator state. Two hashes: 32 bits in int32 for dropout, where millions of elements are drawn per step, and 64 bits in
int64 for weights, where each of more than 2^32 elements needs a number of its own. Integer arithmetic wraps in the same
way on every device, so both give the same bits on CPU and CUDA.

Shape letters: B batch, T token, W the last dimension of what is dropped.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Shifts and multipliers with the least bias found by search: lowbias32 of C. Wellons' hash-prospector (32 bits) and
# variant 13 of D. Stafford, the finaliser of SplitMix64 (64 bits). The added constants are the golden ratio's fraction.
_GOLDEN_32 = -0x61C88647
_MULTIPLIERS_32 = (0x21F0AAAD, -0x2CA5D269)
_GOLDEN_64 = -0x61C8864680B583EB
_MULTIPLIERS_64 = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)

# Elements drawn at once: bounds the temporaries to 2 MB each, whatever the size of the weight. Threads meet after each
# of some 25 passes over a piece, so that smaller ones cost much where the machine has other work.
_CHUNK = 1 << 18


def key(*parts: int | str) -> int:
    """A number in [-2^63, 2^63) that stands for these parts, the same in every process (BLAKE2b, not Python's hash)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode()
        # The length goes in front, so that ("ab", "c") and ("a", "bc") differ.
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little", signed=True)


def mix(words: Tensor) -> Tensor:
    """A random-looking one-to-one image of int32 words; every input bit changes every output bit half of the time."""
    words = _scramble(words)
    return words ^ _shift(words, 15)


def number_words(count: int, *, first: int = 0, device: torch.device | None = None) -> Tensor:
    """One int32 word for each of the numbers first to first + count - 1 (feature, place or head numbers)."""
    return mix(torch.arange(first, first + count, dtype=torch.int32, device=device) + _GOLDEN_32)


def dropout_rows(seed: int, samples_B: Tensor, num_places: int, *, first_place: int = 0) -> Tensor:
    """int32 BT: one word per token, from the run's seed, the sample's number in the run's order and the place in it.

    samples_B: int64. first_place: the place of the first token wanted, for a rank that holds a part of the sequence.
    """
    low_B, high_B = samples_B.to(torch.int32), (samples_B >> 32).to(torch.int32)
    sample_words_B = mix(mix(low_B ^ _word(key(seed, "dropout"))) ^ mix(high_B + _GOLDEN_32))
    return mix(sample_words_B[:, None] ^ number_words(num_places, first=first_place, device=samples_B.device))


def rows_for(rows_BT: Tensor, where: int | Tensor) -> Tensor:
    """The token words of one use: where is `key(...)` of a layer number and a role, or that as `on_device` gives it."""
    return mix(rows_BT ^ (where if isinstance(where, Tensor) else _word(where)))


def on_device(where: int | Tensor, device: torch.device) -> Tensor:
    """What `rows_for` takes of a key, as an int32 scalar: to the compiler a number that may be another next time."""
    return where if isinstance(where, Tensor) else torch.tensor(_word(where), dtype=torch.int32, device=device)


def keep_mask(rows: Tensor, words_W: Tensor, probability: float) -> Tensor:
    """bool [*rows.shape, W]: False with the given probability, by a hash of the row's word and the column's.

    rows: int32 from `rows_for`; words_W: int32 from `number_words`. The probability is exact to 2^-33.
    """
    if not 0 <= probability < 1:
        raise ValueError(f"dropout probability {probability} is not in [0, 1): 0 switches dropout off")
    # The last shift of `mix` is left out: it changes low bits only, and the high ones decide.
    return _scramble(rows[..., None] ^ words_W) >= round(probability * 2**32) - 2**31


def ones_and_zeros(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a factor; on a CPU a tenth of the time of a product with the mask itself or of a choice by it."""
    return keep.view(torch.uint8).to(dtype)


def fill_normal(
    part: Tensor, where: int, *, std: float, whole: Sequence[int] | None = None, offset: Sequence[int] | None = None
) -> None:
    """Fill part in place with normal numbers of mean 0: those that a tensor of shape whole has from offset on.

    where: `key(...)` of the seed and the weight's name. Element i (C order in whole) depends on where and i alone, so
    shards drawn apart are bitwise the slices of the weight drawn at once. Box-Muller in float64, so that the last bits
    of a device's logarithm and cosine vanish in the rounding to the tensor's type; no number is beyond 6.8 std.
    """
    flat = part.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        stop = min(start + _CHUNK, flat.numel())
        words = _element_words(where, start, stop, part.shape, whole, offset, part.device)
        # In place wherever it can be: the time is that of passes over memory.
        radius = _shift(words, 32).double().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = words.bitwise_and_(0xFFFFFFFF).double().mul_(2 * math.pi / 2**32)
        flat[start:stop] = radius.mul_(std).mul_(angle.cos_())


def fill_uniform(
    part: Tensor, where: int, *, bound: float, whole: Sequence[int] | None = None, offset: Sequence[int] | None = None
) -> None:
    """Fill part in place with uniform numbers in [-bound, bound]; everything else as in `fill_normal`."""
    flat = part.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        stop = min(start + _CHUNK, flat.numel())
        words = _element_words(where, start, stop, part.shape, whole, offset, part.device)
        flat[start:stop] = ((_shift(words, 11).double() + 0.5) / 2**52 - 1) * bound


def uniform_at(where: int, index: int) -> float:
    """One number in (0, 1) for this key and index."""
    words = _mix_64(torch.tensor([index]), where)
    return (int(_shift(words, 11)) + 0.5) / 2**53


def _element_words(
    where: int,
    start: int,
    stop: int,
    shape: Sequence[int],
    whole: Sequence[int] | None,
    offset: Sequence[int] | None,
    device: torch.device,
) -> Tensor:
    """int64 words of the flat elements start to stop of a part of this shape, by their flat index in the whole."""
    rest = torch.arange(start, stop, dtype=torch.int64, device=device)
    whole = shape if whole is None else whole
    offset = [0] * len(shape) if offset is None else offset
    for size, first, of in zip(shape, offset, whole, strict=True):
        if first < 0 or first + size > of:
            raise ValueError(f"shape {tuple(shape)} at offset {tuple(offset)} does not lie inside {tuple(whole)}")
    if tuple(whole) == tuple(shape):
        return _mix_64(rest, where)
    index = torch.zeros_like(rest)
    stride = 1
    for size, first, of in reversed(list(zip(shape, offset, whole, strict=True))):
        index += (rest % size + first) * stride
        rest = rest // size
        stride *= of
    return _mix_64(index, where)


def _scramble(words: Tensor) -> Tensor:
    """`mix` without its last step; in place after the first, since each step may be a pass over memory."""
    first, second = _MULTIPLIERS_32
    words = words ^ _shift(words, 16)
    words *= first
    words ^= _shift(words, 15)
    words *= second
    return words


def _mix_64(index: Tensor, where: int) -> Tensor:
    """int64 words: the finaliser of SplitMix64 on where + index * the golden ratio, where each index has its own."""
    first, second = _MULTIPLIERS_64
    words = index * _GOLDEN_64
    words += where
    words ^= _shift(words, 30)
    words *= first
    words ^= _shift(words, 27)
    words *= second
    words ^= _shift(words, 31)
    return words


def _shift(words: Tensor, places: int) -> Tensor:
    """Logical shift right: torch's >> repeats the sign bit of signed integers."""
    bits = 32 if words.dtype == torch.int32 else 64
    return (words >> places) & ((1 << (bits - places)) - 1)


def _word(where: int) -> int:
    """The low 32 bits of a key as a signed number, as int32 arithmetic wants it."""
    return (where + 2**31) % 2**32 - 2**31
