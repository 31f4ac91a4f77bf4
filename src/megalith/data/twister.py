"""The 64-bit Mersenne Twister of C++ (mt19937_64), many numbers at once: numpy has the 32-bit one only.

Matsumoto and Nishimura 1998, with the constants of Nishimura 2000 for 64-bit machines.
"""

import numpy as np
from numpy.typing import NDArray

STATE, MIDDLE = 312, 156  # words of the state; how far ahead a word is mixed in
UPPER, LOWER = np.uint64(0xFFFFFFFF80000000), np.uint64(0x7FFFFFFF)
MIX = np.uint64(0xB5026F5AA96619E9)
SEEDING = 6364136223846793005
ALL_BITS = 2**64 - 1
# Of the output: shifts, and what is kept of the shifted word.
TEMPERING = ((29, 0x5555555555555555, False), (17, 0x71D67FFFEDA60000, True), (37, 0xFFF7EEE000000000, True))
LAST_SHIFT = np.uint64(43)


class Twister64:
    """A stream of 64-bit numbers, the same as C++'s std::mt19937_64 with this seed."""

    def __init__(self, seed: int) -> None:
        words = [seed & ALL_BITS]
        for number in range(1, STATE):
            last = words[-1]
            words.append((SEEDING * (last ^ (last >> 62)) + number) & ALL_BITS)
        self._state = np.array(words, np.uint64)
        self._rest = np.empty(0, np.uint64)

    def draw(self, count: int) -> NDArray[np.uint64]:
        """The next count numbers."""
        parts = [self._rest]
        ready = len(self._rest)
        while ready < count:
            self._advance()
            parts.append(_tempered(self._state))
            ready += STATE
        drawn = np.concatenate(parts)
        self._rest = drawn[count:].copy()
        return drawn[:count]

    def _advance(self) -> None:
        """The next state, in place, in two halves: each word needs the one 156 ahead, which the first half makes."""
        state = self._state
        state[:MIDDLE] = state[MIDDLE:] ^ _twisted(state[:MIDDLE], state[1 : MIDDLE + 1])
        following = np.append(state[MIDDLE + 1 :], state[0])
        state[MIDDLE:] = state[:MIDDLE] ^ _twisted(state[MIDDLE:], following)


def _twisted(words: NDArray[np.uint64], following: NDArray[np.uint64]) -> NDArray[np.uint64]:
    joined = (words & UPPER) | (following & LOWER)
    mixed: NDArray[np.uint64] = (joined >> np.uint64(1)) ^ ((joined & np.uint64(1)) * MIX)
    return mixed


def _tempered(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = state.copy()
    for shift, kept, left in TEMPERING:
        shifted = words << np.uint64(shift) if left else words >> np.uint64(shift)
        words ^= shifted & np.uint64(kept)
    return words ^ (words >> LAST_SHIFT)
