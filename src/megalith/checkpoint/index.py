"""The index of a checkpoint: one JSON file that says what the checkpoint is and lists every byte it consists of.

Its last line is the SHA-256 of all lines before it, and it lists the SHA-256 of every other file: so a changed bit
anywhere is noticed. This catches accidents; whoever can write the files can also write a fitting index.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megalith.checkpoint.pieces import (
    TENSOR_NAME,
    TORCH_DTYPES,
    Stored,
    StoredPiece,
    Table,
    check_cover,
)
from megalith.checkpoint.repeats import Block, Repeat, folded
from megalith.checkpoint.shards import DamagedError
from megalith.files import Written, digest_of_bytes

FORMAT = "megalith checkpoint 2"
# The first lists every piece by itself, which in the second is a block without repeats.
READ_FORMATS = ("megalith checkpoint 1", FORMAT)
INDEX_NAME = "index.json"
INDEX_LIMIT = 64 << 20  # bytes
STATE_ROOM = 4 << 20  # bytes of these that are left to state and notes when a table's size is looked at beforehand
PIECES_LIMIT = 1 << 24  # pieces in memory; tensors of which the same files hold the same places count once
DEPTH_LIMIT = 64  # nested JSON values
# Names that a checkpoint's files may have; nothing else from an index ever becomes a path.
FILE_NAME = re.compile(r"rank-[0-9]{5,9}\.safetensors")
LAST_LINE = re.compile(rb'"sha256":"([0-9a-f]{64})"\n\}\n')
LAST_LINE_LENGTH = len('"sha256":""\n}\n') + 64
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds.

    state: what a run goes on from, beside the tensors; two checkpoints of a step are the same only if it is equal.
    notes: what is worth knowing but may differ between equal checkpoints: times, versions, hosts.
    """

    step: int
    state: Mapping[str, Any]
    notes: Mapping[str, Any]
    files: Mapping[str, Written]
    tensors: Table

    @property
    def num_bytes(self) -> int:
        """Bytes of all files but the index."""
        return sum(written.size for written in self.files.values())

    def same_contents(self, other: "Index") -> bool:
        """Whether both hold the same bytes of the same tensors, and the same state."""
        return (self.step, self.state, self.files, self.tensors) == (
            other.step,
            other.state,
            other.files,
            other.tensors,
        )


def plain_json(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of value as reading it from JSON would give it.

    Raises ValueError if it is no JSON object, is nested too deeply, or holds a number that JSON lacks (NaN, infinity).
    """
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} of the checkpoint cannot be kept as JSON: {error}") from error
    if not isinstance(plain, dict) or not _is_shallow(plain):
        raise ValueError(f"{name} of the checkpoint must be a JSON object nested at most {DEPTH_LIMIT} deep")
    return plain


def render(index: Index, *, spare: int = 0) -> bytes:
    """The text of the index file: one line per setting, file and tensor.

    spare: bytes by which it must be shorter than what is read. Raises ValueError if it is longer, or lists more pieces.
    """
    numbers = {name: number for number, name in enumerate(sorted(index.files))}
    files = [[name, index.files[name].size, index.files[name].digest] for name in sorted(index.files)]
    tensors = []
    blocks: dict[tuple[StoredPiece, ...], str] = {}
    for name in sorted(index.tensors):
        dtype, shape, pieces = index.tensors[name].dtype, index.tensors[name].shape, index.tensors[name].pieces
        if pieces not in blocks:
            found = folded((numbers[file], place) for file, place in pieces)
            blocks[pieces] = _compact([block.to_json() for block in found])
        tensors.append(f"{_compact(name)}:[{_compact(dtype)},{_compact(list(shape))},{blocks[pieces]}]")
    lines = [
        f'"format":{_compact(FORMAT)}',
        f'"step":{index.step}',
        f'"state":{_compact(index.state)}',
        f'"notes":{_compact(index.notes)}',
        '"files":[\n' + ",\n".join(_compact(file) for file in files) + "]",
        '"tensors":{\n' + ",\n".join(tensors) + "}",
    ]
    body = ("{\n" + ",\n".join(lines) + ",\n").encode()
    text = body + f'"sha256":"{digest_of_bytes(body)}"\n}}\n'.encode()
    num_pieces, limit = sum(map(len, blocks)), INDEX_LIMIT - spare
    if len(text) > limit or num_pieces > PIECES_LIMIT:
        raise ValueError(
            f"the index of the checkpoint takes {len(text)} bytes and has {num_pieces} pieces, more than {limit} bytes "
            f"or {PIECES_LIMIT} pieces"
        )
    return text


def check_size(table: Table) -> None:
    """Raise ValueError if a checkpoint of such tensors would have an index too large to be read."""
    largest = Written((1 << 62) - 1, "0" * 64)
    files = {piece.file: largest for stored in table.values() for piece in stored.pieces}
    try:
        render(Index(0, {}, {}, files, table), spare=STATE_ROOM)
    except ValueError as error:
        raise ValueError(f"{error}; cut tensors over fewer ranks (--data-parallel-shard-size)") from error


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def parse(path: Path, text: bytes) -> Index:
    """The index in the text of a file; path is for messages.

    Raises DamagedError if it is not what `render` gave.
    """
    last = LAST_LINE.fullmatch(text[-LAST_LINE_LENGTH:])
    if last is None:
        raise DamagedError(f"{path} does not end with the digest of an index: it is cut short or not an index")
    found, expected = digest_of_bytes(text[:-LAST_LINE_LENGTH]), last[1].decode()
    if found != expected:
        raise DamagedError(f"{path} was changed: its SHA-256 is {found}, expected {expected}")
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not JSON: {error}") from error
    try:
        return _index_from(fields)
    except ValueError as error:
        raise DamagedError(f"{path}: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _index_from(fields: Any) -> Index:
    """The index in parsed JSON; ValueError if a field is missing or of a wrong kind."""
    if not isinstance(fields, dict) or fields.get("format") not in READ_FORMATS:
        raise ValueError(f"format is not {' or '.join(map(repr, READ_FORMATS))}")
    if fields.keys() != {"format", "step", "state", "notes", "files", "tensors", "sha256"}:
        raise ValueError(f"its fields are {', '.join(sorted(fields))}")
    step, state, notes = fields["step"], fields["state"], fields["notes"]
    if not is_count(step):
        raise ValueError(f"step={step!r} is not a count")
    for name, value in (("state", state), ("notes", notes)):
        if not isinstance(value, dict) or not _is_shallow(value):
            raise ValueError(f"{name} is not a JSON object nested at most {DEPTH_LIMIT} deep")
    files = _files_from(fields["files"])
    return Index(step, state, notes, files, _tensors_from(fields["tensors"], list(files)))


def _files_from(listed: Any) -> dict[str, Written]:
    files = {}
    for entry in _list(listed, "files"):
        name, size, digest = _list(entry, "an entry of files", 3)
        if not isinstance(name, str) or FILE_NAME.fullmatch(name) is None or name in files:
            raise ValueError(f"file name {str(name)[:100]!r} must match {FILE_NAME.pattern} and stand once")
        if not is_count(size) or not isinstance(digest, str) or DIGEST.fullmatch(digest) is None:
            raise ValueError(f"size or digest of {name} is none")
        files[name] = Written(size, digest)
    return files


def _tensors_from(listed: Any, files: list[str]) -> dict[str, Stored]:
    if not isinstance(listed, dict):
        raise ValueError("tensors is not a JSON object")
    tensors = {}
    # Most tensors of a model are cut as many others: what was found sound once is shared, in memory too.
    known: dict[tuple[tuple[int, ...], tuple[Block, ...]], tuple[StoredPiece, ...]] = {}
    num_pieces = 0
    for name, entry in listed.items():
        if TENSOR_NAME.fullmatch(name) is None:
            raise ValueError(f"tensor name {name[:100]!r} must match {TENSOR_NAME.pattern}")
        dtype, shape, pieces = _list(entry, name, 3)
        if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
            raise ValueError(f"{name}: number type {str(dtype)[:100]!r} must be one of {', '.join(TORCH_DTYPES)}")
        whole_shape = _counts(shape, name)
        blocks = tuple(_block_from(piece, name, len(files)) for piece in _list(pieces, name))
        key = (whole_shape, blocks)
        if key not in known:
            num_pieces += sum(math.prod(repeat.times for repeat in block.repeats) for block in blocks)
            if num_pieces > PIECES_LIMIT:
                raise ValueError(f"{name}: more than {PIECES_LIMIT} pieces up to it")
            known[key] = tuple(_pieces_from(blocks, name, whole_shape, files))
            check_cover(name, whole_shape, [piece.place for piece in known[key]])
        tensors[name] = Stored(dtype, whole_shape, known[key])
    return tensors


def _block_from(listed: Any, name: str, num_files: int) -> Block:
    number, offset, extent = _list(_list(listed, name)[:3], name, 3)
    _check_file(number, name, num_files)
    block = Block(number, _counts(offset, name), _counts(extent, name), tuple(_repeats_from(listed[3:], name)))
    if any(len(repeat.offset_step) != len(block.offset) for repeat in block.repeats):
        raise ValueError(f"{name}: a repeat of a piece has another number of dimensions than the piece")
    # Each is in a file of its own, so no hostile index unfolds to more.
    if math.prod(repeat.times for repeat in block.repeats) > num_files:
        raise ValueError(f"{name}: a piece is repeated more often than there are files ({num_files})")
    return block


def _repeats_from(listed: list[Any], name: str) -> Iterator[Repeat]:
    for entry in listed:
        times, file_step, offset_step = _list(entry, name, 3)
        steps = (file_step, *_list(offset_step, name))
        if not is_count(times) or times < 2 or not all(type(step) is int and abs(step) < 1 << 62 for step in steps):
            raise ValueError(f"{name}: {str(entry)[:100]} is no repeat of a piece")
        yield Repeat(times, file_step, tuple(offset_step))


def _pieces_from(blocks: Sequence[Block], name: str, shape: tuple[int, ...], files: list[str]) -> Iterator[StoredPiece]:
    seen = set()
    for block in blocks:
        for number, place in block.unfolded():
            _check_file(number, name, len(files))
            if number in seen:
                raise ValueError(f"{name}: file number {number} must stand once")
            seen.add(number)
            inside = len(shape) == len(place.offset) == len(place.extent) and all(
                0 <= start <= start + size <= limit
                for start, size, limit in zip(place.offset, place.extent, shape, strict=True)
            )
            if not inside or place.volume == 0:
                raise ValueError(
                    f"{name}: the piece {tuple(place)} (offset, extent) is empty or outside of shape {shape}"
                )
            yield StoredPiece(files[number], place)


def _check_file(number: Any, name: str, num_files: int) -> None:
    if not is_count(number) or number >= num_files:
        raise ValueError(f"{name}: file number {number!r} must be below {num_files}")


def _list(value: Any, name: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise ValueError(f"{name} is not a list" + ("" if length is None else f" of {length}"))
    return value


def _counts(value: Any, name: str) -> tuple[int, ...]:
    numbers = _list(value, name)
    if len(numbers) > 16 or not all(map(is_count, numbers)) or math.prod(numbers) >= 1 << 62:
        raise ValueError(f"{name}: {str(value)[:100]} are not sizes of a tensor")
    return tuple(numbers)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_shallow(value: Any) -> bool:
    """Whether JSON values are nested at most DEPTH_LIMIT deep."""
    level = [value]
    for _ in range(DEPTH_LIMIT):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        if not inner:
            return True
        level = inner
    return False
