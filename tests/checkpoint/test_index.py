"""The index: what was written comes back, and nothing else is taken for it."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from megalith.checkpoint.index import Index, parse, plain_json, render
from megalith.checkpoint.pieces import Place, Stored, StoredPiece
from megalith.checkpoint.repeats import folded
from megalith.checkpoint.shards import DamagedError
from megalith.files import Written, digest_of_bytes
from tests.checkpoint.runs import signed

PATH = Path("step-0000007/index.json")
FILES = ("rank-00000.safetensors", "rank-00003.safetensors")
INDEX = Index(
    step=7,
    state={
        "consumed_samples": 448,
        "loss_scale": 65536.0,
        "schedule": {"lr": 1.5e-4, "style": "cosine"},
        "ids": [1, None],
    },
    notes={"host": "näme", "seconds": 0.1},
    files={name: Written(100 + number, digest_of_bytes(name)) for number, name in enumerate(FILES)},
    tensors={
        "model.w": Stored(
            "F32",
            (4, 6),
            (StoredPiece(FILES[0], Place((0, 0), (4, 3))), StoredPiece(FILES[1], Place((0, 3), (4, 3)))),
        ),
        "step": Stored("I64", (), (StoredPiece(FILES[1], Place((), ())),)),
        "empty": Stored("BF16", (0, 2), ()),
    },
)


def fields() -> dict[str, Any]:
    """What the index file says, without its digest."""
    said: dict[str, Any] = json.loads(render(INDEX))
    del said["sha256"]
    return said


def test_an_index_comes_back_as_it_was() -> None:
    assert parse(PATH, render(INDEX)) == INDEX
    assert INDEX.same_contents(parse(PATH, render(INDEX)))
    assert INDEX.num_bytes == 201
    assert render(parse(PATH, render(INDEX))) == render(INDEX)


def test_every_changed_byte_is_noticed() -> None:
    text = render(INDEX)
    for position in range(len(text)):
        for bit in (0, 3, 7):
            changed = bytearray(text)
            changed[position] ^= 1 << bit
            with pytest.raises(DamagedError, match=re.escape(str(PATH))):
                parse(PATH, bytes(changed))
    for length in range(len(text)):
        with pytest.raises(DamagedError):
            parse(PATH, text[:length])
    with pytest.raises(DamagedError):
        parse(PATH, text + b"\n")


def test_the_hostile_texts_below_are_refused_for_what_they_say() -> None:
    said = {**fields(), "step": 8}
    assert parse(PATH, signed({**said, "notes": {"a": 1}})).step == 8


def with_piece(piece: Any) -> dict[str, Any]:
    return {**fields(), "tensors": {"w": ["F32", [4], [piece]]}}


def with_file(name: Any, size: Any = 100, digest: Any = "0" * 64) -> dict[str, Any]:
    return {**fields(), "files": [[name, size, digest]], "tensors": {}}


def nested(depth: int) -> Any:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE_NAMES: list[Any] = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "",
    "rank-00000.safetensors/..",
    "rank-00000.safetensors\n",
    "rank-00000.safetensors\0",
    "rank-0.safetensors",
    "RANK-00000.safetensors",
    "rank-00000.pt",
    "rank-\u0660\u0660\u0660\u0660\u0660.safetensors",
    "index.json",
    "a" * 5000,
    "~/rank-00000.safetensors",
    "$HOME",
    "rank-00000.safetensors;ls",
    "C:\\rank-00000.safetensors",
    None,
    5,
    ["rank-00000.safetensors"],
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_hostile_file_name_is_refused(name: Any) -> None:
    with pytest.raises(DamagedError, match="file name"):
        parse(PATH, signed({**with_file(name), "notes": {"": 0}}))


@pytest.mark.parametrize(
    "said, message",
    [
        ([], "not JSON"),
        ({"a": 1}, "format is not"),
        ({**fields(), "format": "megalith checkpoint 3"}, "format is not"),
        ({**fields(), "more": 1}, "its fields are"),
        ({name: value for name, value in fields().items() if name != "notes"}, "its fields are"),
        ({**fields(), "step": -1}, "step=-1 is not a count"),
        ({**fields(), "step": True}, "step=True is not a count"),
        ({**fields(), "step": 7.0}, r"step=7\.0 is not a count"),
        ({**fields(), "step": 10**30}, "is not a count"),
        ({**fields(), "state": []}, "state is not a JSON object"),
        ({**fields(), "state": {"a": nested(64)}}, "nested at most 64 deep"),
        ({**fields(), "state": {"a": float("nan")}}, "not JSON: NaN"),
        ({**fields(), "notes": {"a": float("inf")}}, "not JSON: Infinity"),
        ({**fields(), "files": {}}, "files is not a list"),
        ({**fields(), "files": [["rank-00000.safetensors", 1]]}, "not a list of 3"),
        (with_file(FILES[0], -1), "size or digest"),
        (with_file(FILES[0], 1 << 62), "size or digest"),
        (with_file(FILES[0], "1"), "size or digest"),
        (with_file(FILES[0], 1, "0" * 63), "size or digest"),
        (with_file(FILES[0], 1, "G" * 64), "size or digest"),
        (with_file(FILES[0], 1, 0), "size or digest"),
        ({**fields(), "files": [[FILES[0], 1, "0" * 64]] * 2}, "stand once"),
        ({**fields(), "tensors": []}, "tensors is not"),
        ({**fields(), "tensors": {"../w": ["F32", [0], []]}}, "tensor name"),
        ({**fields(), "tensors": {"w": ["F32", [0]]}}, "w is not a list of 3"),
        ({**fields(), "tensors": {"w": ["O", [0], []]}}, "number type 'O'"),
        ({**fields(), "tensors": {"w": [[], [0], []]}}, "number type"),
        ({**fields(), "tensors": {"w": ["F32", [4], []]}}, "hold 0 of 4"),
        ({**fields(), "tensors": {"w": ["F32", [1 << 40, 1 << 40], []]}}, "not sizes of a tensor"),
        ({**fields(), "tensors": {"w": ["F32", [0] * 17, []]}}, "not sizes of a tensor"),
        ({**fields(), "tensors": {"w": ["F32", [-4], []]}}, "not sizes of a tensor"),
        (with_piece([0, [0], [3]]), "hold 3 of 4"),
        (with_piece([0, [1], [4]]), "outside of shape"),
        (with_piece([0, [0, 0], [4, 1]]), "outside of shape"),
        (with_piece([2, [0], [4]]), "file number 2"),
        (with_piece([-1, [0], [4]]), "file number -1"),
        (with_piece([0, [0], [0]]), "is empty"),
        (with_piece([0, [0]]), "not a list of 3"),
        ({**fields(), "tensors": {"w": ["F32", [4], [[0, [0], [2]], [0, [2], [2]]]]}}, "stand once"),
        (with_piece([0, [0], [2], [2, 0, [2]]]), "stand once"),
        (with_piece([0, [0], [2], [2, 1, [1]]]), "overlap"),
        (with_piece([0, [0], [2], [2, 1, [4]]]), "outside of shape"),
        (with_piece([0, [0], [2], [2, 1, [-1]]]), "outside of shape"),
        (with_piece([0, [0], [2], [2, 2, [2]]]), "file number 2"),
        (with_piece([0, [0], [2], [2, -1, [2]]]), "file number -1"),
        (with_piece([0, [0], [2], [2, 1]]), "not a list of 3"),
        (with_piece([0, [0], [2], [2, 1, 2]]), "not a list"),
        (with_piece([0, [0], [2], [2, 1, [2, 0]]]), "another number of dimensions"),
        (with_piece([0, [0], [2], [1, 1, [2]]]), "no repeat of a piece"),
        (with_piece([0, [0], [2], [2.0, 1, [2]]]), "no repeat of a piece"),
        (with_piece([0, [0], [2], [2, True, [2]]]), "no repeat of a piece"),
        (with_piece([0, [0], [2], [2, 1, ["2"]]]), "no repeat of a piece"),
        (with_piece([0, [0], [2], [2, 1, [1 << 62]]]), "no repeat of a piece"),
        (with_piece([0, [0], [2], [1 << 61, 1, [2]]]), "more often than there are files"),
        (with_piece([0, [0], [2], *[[2, 1, [2]]] * 1000]), "more often than there are files"),
        ({**fields(), "tensors": {"w": ["F32", [4], [[0, [0], [3]], [1, [2], [2]]]]}}, "overlap"),
    ],
)  # fmt: skip
def test_an_index_that_says_nonsense_is_refused(said: Any, message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        parse(PATH, signed(said))


def test_a_bomb_of_brackets_is_refused() -> None:
    for opening in (b"[", b'{"a":'):
        body = opening * 200_000
        text = body + f'"sha256":"{digest_of_bytes(body)}"\n}}\n'.encode()
        with pytest.raises(DamagedError, match="not JSON"):
            parse(PATH, text)


def test_ten_thousand_signed_mutations_are_read_or_refused_and_nothing_else() -> None:
    random.seed(2)
    body = render(INDEX)[: -len('"sha256":""\n}\n') - 64]
    alphabet = b'0123456789{}[]",:.-eE \\ntrufalsFI' + bytes(range(256))
    refused = 0
    for _ in range(10_000):
        changed = bytearray(body)
        for _ in range(random.randint(1, 4)):
            position = random.randrange(len(changed))
            changed[position : position + random.randint(0, 2)] = bytes(
                random.choices(alphabet, k=random.randint(0, 2))
            )
        text = bytes(changed) + f'"sha256":"{digest_of_bytes(changed)}"\n}}\n'.encode()
        try:
            index = parse(PATH, text)
        except DamagedError:
            refused += 1
        else:
            assert parse(PATH, render(index)) == index
    assert refused > 5000


def test_state_is_plain_finite_and_shallow() -> None:
    assert plain_json("state", {"a": (1, 2), "b": {"c": None}}) == {"a": [1, 2], "b": {"c": None}}
    refused: list[Any] = [{"a": float("nan")}, {"a": {1, 2}}, {"a": nested(64)}, {"a": nested(5000)}, []]
    for value in refused:
        with pytest.raises(ValueError, match="state of the checkpoint"):
            plain_json("state", value)


def test_an_index_too_long_to_be_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalith.checkpoint.index.INDEX_LIMIT", 300)
    with pytest.raises(ValueError, match="more than 300"):
        render(INDEX)


def test_an_index_of_more_pieces_than_are_read_is_neither_written_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    text = render(INDEX)
    monkeypatch.setattr("megalith.checkpoint.index.PIECES_LIMIT", 2)
    with pytest.raises(ValueError, match=r"has 3 pieces, more than .* or 2 pieces"):
        render(INDEX)
    with pytest.raises(DamagedError, match="more than 2 pieces"):
        parse(PATH, text)


# What was written before pieces were folded.
FIRST_FORMAT = b"""{
"format":"megalith checkpoint 1",
"step":7,
"state":{"consumed_samples":448},
"notes":{},
"files":[
["rank-00000.safetensors",100,"%(digest)s"],
["rank-00003.safetensors",101,"%(digest)s"]],
"tensors":{
"empty":["BF16",[0,2],[]],
"model.w":["F32",[4,6],[[0,[0,0],[4,3]],[1,[0,3],[4,3]]]],
"step":["I64",[],[[1,[],[]]]]},
""" % {b"digest": b"0" * 64}


def test_an_index_of_the_first_format_is_read() -> None:
    text = FIRST_FORMAT + f'"sha256":"{digest_of_bytes(FIRST_FORMAT)}"\n}}\n'.encode()
    read = parse(PATH, text)
    assert read.tensors == INDEX.tensors
    assert read.files == {name: Written(100 + number, "0" * 64) for number, name in enumerate(FILES)}
    assert parse(PATH, render(read)) == read


@pytest.mark.parametrize("seed", range(8))
def test_pieces_unfold_in_the_order_in_which_they_were_folded(seed: int) -> None:
    random.seed(seed)
    for _ in range(100):
        rows, columns = random.randint(1, 6), random.randint(1, 6)
        pieces = [
            (row + 7 * column, Place((3 * row, 2 * column), (min(3, 16 - 3 * row), 2)))
            for row in range(rows)
            for column in range(columns)
        ]
        # Some follow no pattern.
        for number in random.sample(range(len(pieces)), random.choice([0, 0, min(2, len(pieces))])):
            pieces[number] = (random.randint(0, 99), pieces[number][1])
        blocks = folded(pieces)
        assert [piece for block in blocks for piece in block.unfolded()] == pieces
        assert len(blocks) <= len(pieces)


def test_a_grid_of_equal_pieces_is_one_block() -> None:
    grid = [(8 * row + column, Place((row, column), (1, 1))) for row in range(100) for column in range(8)]
    (block,) = folded(grid)
    assert block.to_json() == [0, [0, 0], [1, 1], [8, 1, [0, 1]], [100, 8, [1, 0]]]
