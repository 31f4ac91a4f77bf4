"""Ways in which the bytes of a file go wrong: by disks, by transfers, by editors, and by whoever means harm."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

# Numbers at which readers stumble, as 64-bit words.
NUMBERS = (0, 1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
MOST_NESTED = 100_000


def mutated(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """How a file's content was changed, and what it is now; it may be the same."""
    ways = list(BYTEWISE)
    if content[:1] in (b"{", b"["):
        ways += JSON_WAYS
    way = draw.choice(ways)
    return way.__name__, way(content, draw)


def bit_turned(content: bytes, draw: random.Random) -> bytes:
    bit = draw.randrange(8 * len(content))
    return content[: bit // 8] + bytes([content[bit // 8] ^ (1 << bit % 8)]) + content[bit // 8 + 1 :]


def header_bit_turned(content: bytes, draw: random.Random) -> bytes:
    return bit_turned(content[:64], draw) + content[64:]


def bytes_changed(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def cut_off(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.choice([0, 1, len(content) - 1, draw.randrange(len(content))])]


def continued(content: bytes, draw: random.Random) -> bytes:
    return content + draw.choice([draw.randbytes(draw.randint(1, 100)), bytes(8), content])


def zeroed(content: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(content))
    length = min(draw.choice([1, 8, 512, 4096]), len(content) - begin)
    return content[:begin] + bytes(length) + content[begin + length :]


def part_removed(content: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(content))
    return content[:begin] + content[begin + draw.choice([1, 4, 8, 64]) :]


def part_repeated(content: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(content))
    end = begin + draw.choice([1, 4, 8, 64])
    return content[:end] + content[begin:end] + content[end:]


def words_swapped(content: bytes, draw: random.Random) -> bytes:
    width = draw.choice([1, 4, 8])
    if len(content) < 2 * width:
        return content
    first, second = sorted(draw.sample(range(0, len(content) - width + 1, width), 2))
    one, other = content[first : first + width], content[second : second + width]
    return content[:first] + other + content[first + width : second] + one + content[second + width :]


def number_put_in(content: bytes, draw: random.Random) -> bytes:
    """A number that is too large, or close to a limit, at a place where a number may stand."""
    width, code = draw.choice([(8, "<Q"), (4, "<I")])
    number = draw.choice([*NUMBERS, len(content), len(content) + 1]) % 2 ** (8 * width)
    begin = draw.randrange(min(len(content), draw.choice([64, len(content)])))
    return content[:begin] + struct.pack(code, number) + content[begin + width :]


def made_up(content: bytes, draw: random.Random) -> bytes:
    kept = draw.choice([0, 8, 16])
    return content[:kept] + draw.randbytes(draw.randint(1, 2 * len(content)))


BYTEWISE: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    bit_turned,
    header_bit_turned,
    bytes_changed,
    cut_off,
    continued,
    zeroed,
    part_removed,
    part_repeated,
    words_swapped,
    number_put_in,
    made_up,
)


def value_replaced(content: bytes, draw: random.Random) -> bytes:
    """One value in a JSON text is another: too large, of another kind, not there, or twice there."""
    try:
        tree = json.loads(content)
    except ValueError:
        return content
    _replace(tree, draw)
    return json.dumps(tree, separators=(",", ":")).encode() + content[len(content.rstrip()) :]


def nested(content: bytes, draw: random.Random) -> bytes:
    """A value deep in brackets; parsers that call themselves overflow."""
    depth = draw.choice([100, 1000, MOST_NESTED])
    bracket, closing = draw.choice([(b"[", b"]"), (b'{"a":', b"}")])
    place = content.find(b":", draw.randrange(len(content)))
    return content[: place + 1] + bracket * depth + b"0" + closing * depth + b"," + content[place + 1 :]


def number_grown(content: bytes, draw: random.Random) -> bytes:
    """A number of thousands of digits, or no number at all."""
    places = [place for place, byte in enumerate(content) if 48 <= byte <= 57]
    if not places:
        return content
    place = draw.choice(places)
    number = draw.choice([b"9" * 5000, b"1e400", b"NaN", b"-1", b"1.5", b"-Infinity", b"true", b"0" * 20])
    return content[:place] + number + content[place + 1 :]


JSON_WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (value_replaced, nested, number_grown)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    2**63,
    2**70,
    "",
    "../../etc/passwd",
    "a\x00b",
    [],
    {},
    [[]],
    "é" * 300,
)


def _replace(tree: Any, draw: random.Random) -> None:
    """Change one value somewhere below, in place."""
    holders: list[tuple[Any, Any]] = []
    level = [tree]
    while level:
        entry = level.pop()
        keys = list(entry) if isinstance(entry, dict) else list(range(len(entry)))
        holders += [(entry, key) for key in keys]
        level += [entry[key] for key in keys if isinstance(entry[key], dict | list)]
    if not holders:
        return
    holder, key = draw.choice(holders)
    way = draw.randrange(4)
    if way == 0:
        del holder[key]
    elif way == 1:
        other, other_key = draw.choice(holders)
        holder[key] = other[other_key] if not isinstance(other[other_key], dict | list) else 0
    elif way == 2 and type(holder[key]) is int:
        holder[key] += draw.choice([-1, 1, 8, 2**32])
    else:
        holder[key] = draw.choice(VALUES)
