"""Files of embeddings: written whole, and refused by name if a bit of them is not what was written; searches."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megalith.evaluate import search
from megalith.evaluate.embeddings import Embeddings, open_embeddings, write_block, write_joined
from megalith.evaluate.search import search_by_faiss, search_exactly
from megalith.files import DISK
from tests.data.failing_disk import FailingDisk

MADE_FROM = {"model": "abc", "step": 3}


def some_vectors(count: int, width: int = 6, *, seed: int = 0) -> NDArray[np.float16]:
    return np.random.RandomState(seed).standard_normal((count, width)).astype(np.float16)


def write_parts(folder: Path, sizes: tuple[int, ...] = (5, 5, 2)) -> tuple[list[Embeddings], NDArray[np.float16]]:
    """Files of one block each, and all their vectors."""
    vectors = some_vectors(sum(sizes))
    parts, first = [], 0
    for number, size in enumerate(sizes):
        ids = np.arange(first, first + size, dtype=np.int64) * 10
        write_block(folder / f"part{number}", ids, vectors[first : first + size], MADE_FROM, disk=DISK)
        parts.append(open_embeddings(folder / f"part{number}"))
        first += size
    return parts, vectors


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    parts, _ = write_parts(tmp_path)
    write_joined(tmp_path / "embeddings", parts, MADE_FROM)
    return tmp_path / "embeddings"


def test_joined_parts_hold_all_rows_in_their_order(joined: Path, tmp_path: Path) -> None:
    _, vectors = write_parts(tmp_path)
    opened = open_embeddings(joined)
    assert opened.ids.tolist() == [10 * number for number in range(12)]
    assert np.array_equal(opened.vectors, vectors) and opened.vectors.dtype == np.float16
    assert opened.made_from == MADE_FROM and opened.block == 5 and len(opened.digests) == 3
    with pytest.raises(ValueError, match="read-only"):
        opened.vectors[0] = 0


def test_an_id_that_stands_in_two_parts_is_refused(tmp_path: Path) -> None:
    parts, _ = write_parts(tmp_path)
    with pytest.raises(ValueError, match="the passage 0 was embedded twice"):
        write_joined(tmp_path / "embeddings", [*parts, parts[0]], MADE_FROM)
    assert not (tmp_path / "embeddings").exists()
    write_block(tmp_path / "twice", np.zeros(2, np.int64), some_vectors(2), MADE_FROM, disk=DISK)
    with pytest.raises(ValueError, match="twice: ids: expected each once, found one twice"):
        open_embeddings(tmp_path / "twice")


def test_every_changed_byte_is_found(joined: Path) -> None:
    content = joined.read_bytes()
    header_end = 16 + int.from_bytes(content[8:16], "little") + 32
    padding = range(header_end, header_end + -header_end % 64)
    for place in range(len(content)):
        if place in padding:
            continue
        joined.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"embeddings: .*: expected .*, found"):
            open_embeddings(joined)
    for size in range(0, len(content), 17):
        joined.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"embeddings: .*: expected .*, found"):
            open_embeddings(joined)


def forged(header: Any, body: bytes = b"") -> bytes:
    """A file whose header has the digest that it should have."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    front = b"MGLTHVEC" + len(text).to_bytes(8, "little") + text + hashlib.sha256(text).digest()
    return front + bytes(-len(front) % 64) + body


GOOD = {"count": 1, "width": 1, "dtype": "float32", "block": 1, "digests": ["0" * 64], "made_from": {}}


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (b"[[[[[[", "header"),
        (b"[" * 100_000, "header"),
        (b"\xff\xfe", "header"),
        ([], "header"),
        ({**GOOD, "count": 0}, "count"),
        ({**GOOD, "count": True}, "count"),
        ({**GOOD, "count": 1.5}, "count"),
        ({**GOOD, "count": 2**62}, "count"),
        ({**GOOD, "width": -1}, "width"),
        ({**GOOD, "width": 2**40}, "width"),
        ({**GOOD, "block": 0}, "block"),
        ({**GOOD, "dtype": "object"}, "dtype"),
        ({**GOOD, "dtype": ["float32"]}, "dtype"),
        ({**GOOD, "digests": "00"}, "digests"),
        ({**GOOD, "digests": []}, "digests"),
        ({**GOOD, "made_from": 3}, "made_from"),
        ({**GOOD, "count": 2**39, "block": 2**39}, "size"),
        (GOOD, "rows 0 to 0"),
    ],
)
def test_a_forged_header_is_refused_by_its_field(header: Any, named: str, tmp_path: Path) -> None:
    (tmp_path / "forged").write_bytes(forged(header, bytes(12)))
    with pytest.raises(ValueError, match=f"forged: {named}: expected"):
        open_embeddings(tmp_path / "forged")


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file of embeddings; megalith index makes one"):
        open_embeddings(tmp_path / "nothing")
    with pytest.raises(ValueError, match="expected a regular file"):
        open_embeddings(tmp_path)


def test_a_failing_disk_leaves_no_file(tmp_path: Path) -> None:
    parts, _ = write_parts(tmp_path)
    counting = FailingDisk()
    write_joined(tmp_path / "whole", parts, MADE_FROM, disk=counting)
    for number in range(1, counting.operations):
        with pytest.raises(OSError, match="No space left"):
            write_joined(tmp_path / "broken", parts, MADE_FROM, disk=FailingDisk(number))
        # The last operations are of the directory, after the file has got its name: it is whole then.
        if (tmp_path / "broken").exists():
            assert len(open_embeddings(tmp_path / "broken")) == 12
            (tmp_path / "broken").unlink()
    assert not list(tmp_path.glob(".broken*"))


def ranked_by_numpy(embeddings: Embeddings, questions: torch.Tensor, count: int) -> list[list[int]]:
    """The definition, in float64."""
    scores = questions.double().numpy() @ embeddings.vectors.astype(np.float64).T
    return [[int(embeddings.ids[row]) for row in np.argsort(-line)[:count]] for line in scores]


@pytest.mark.parametrize("searching", [search_exactly, search_by_faiss], ids=["torch", "faiss"])
@pytest.mark.parametrize("count", [1, 4, 50])
def test_searches_find_the_largest_products(
    searching: Callable[..., Any], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if searching is search_by_faiss:
        pytest.importorskip("faiss")
    # Several pieces, the last one shorter than what is asked for.
    monkeypatch.setattr(search, "ROWS_AT_ONCE", 7)
    write_block(tmp_path / "part", np.arange(40, dtype=np.int64)[::-1] + 100, some_vectors(40), MADE_FROM, disk=DISK)
    embeddings = open_embeddings(tmp_path / "part")
    questions = torch.from_numpy(some_vectors(5, seed=1).astype(np.float32))
    ids, scores = searching(embeddings, questions, count)
    assert ids.tolist() == ranked_by_numpy(embeddings, questions, count)
    assert scores.shape == ids.shape and (np.diff(scores) <= 0).all()
