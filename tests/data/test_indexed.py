"""Token files: what is written is read back, a file is whole or absent, a wrong request says what would be right."""

import errno
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.data.indexed import IndexedDataset, IndexedWriter, best_dtype, open_indexed
from megalith.files import Disk
from tests.data.failing_disk import FailingDisk

DOCUMENTS = [[[1, 2, 3], [4]], [], [[5], [], [6, 7]]]
INTEGERS = ["uint8", "int8", "int16", "int32", "int64", "uint16"]


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "uint16") -> IndexedWriter:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return writer


def documents_in(prefix: Path) -> list[list[list[int]]]:
    indexed = IndexedDataset(prefix)
    bounds = indexed.document_index.tolist()
    items = [indexed.read(item).tolist() for item in range(indexed.num_items)]
    return [items[begin:end] for begin, end in pairwise(bounds)]


@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 127), max_size=5), max_size=4), max_size=6),
    dtype=st.sampled_from([*INTEGERS, "float64"]),
)
def test_documents_are_read_back_in_every_dtype(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], dtype: str
) -> None:
    prefix = tmp_path_factory.mktemp("any") / "corpus"
    writer = write(prefix, documents, dtype)
    assert documents_in(prefix) == documents
    assert IndexedDataset(prefix).dtype == np.dtype(dtype)
    tokens = [token for document in documents for item in document for token in item]
    largest = None if dtype == "float64" else max(tokens, default=None)
    assert (writer.num_tokens, writer.largest_token) == (len(tokens), largest)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_the_ends_of_a_dtype_fit_and_what_is_beyond_is_refused_by_place(tmp_path: Path, dtype: str) -> None:
    limits = np.iinfo(dtype)
    write(tmp_path / "fits", [[[limits.min, limits.max]]], dtype)
    assert documents_in(tmp_path / "fits") == [[[limits.min, limits.max]]]
    if dtype != "int64":
        for token in (limits.min - 1, limits.max + 1):
            message = rf"token {token} at position 1 of item 3 \(document 2\) does not fit {dtype}"
            with pytest.raises(ValueError, match=message):
                write(tmp_path / "beyond", [[[1], [1]], [], [[1], [0, token]]], dtype)
    assert {path.stem for path in tmp_path.iterdir()} == {"fits"}


def test_a_part_of_an_item_is_a_view_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "corpus", DOCUMENTS)
    indexed = IndexedDataset(tmp_path / "corpus")
    assert indexed.read(0, 1).tolist() == [2, 3]
    assert indexed.read(0, 1, 1).tolist() == [2]
    assert indexed.read(0, 3).tolist() == []
    assert not indexed.read(0).flags.writeable and indexed.read(0).base is not None
    assert (indexed.num_items, indexed.num_documents, indexed.num_tokens) == (5, 3, 7)


@pytest.mark.parametrize(("item", "start", "count"), [(5, 0, None), (-1, 0, None), (0, 4, None), (0, -1, 2), (0, 1, 3)])
def test_reading_what_is_not_there_is_refused(tmp_path: Path, item: int, start: int, count: int | None) -> None:
    write(tmp_path / "corpus", DOCUMENTS)
    with pytest.raises(ValueError, match="corpus"):
        IndexedDataset(tmp_path / "corpus").read(item, start, count)


def test_many_documents_at_once_are_the_same_file(tmp_path: Path) -> None:
    write(tmp_path / "one by one", DOCUMENTS)
    with IndexedWriter(tmp_path / "at once", "uint16") as writer:
        writer.add_documents([3, 1, 1, 0, 2], [2, 0, 3], np.arange(1, 8, dtype=np.uint16))
    for suffix in (".bin", ".idx"):
        written = (tmp_path / f"at once{suffix}").read_bytes()
        assert written == (tmp_path / f"one by one{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("lengths", "counts", "message"),
    [([3, 3], [2], "item_lengths"), ([8, -1], [2], "item_lengths"), ([3, 4], [1], "items_per_document")],
)
def test_numbers_that_do_not_add_up_are_refused(
    tmp_path: Path, lengths: list[int], counts: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message), IndexedWriter(tmp_path / "corpus", "uint16") as writer:
        writer.add_documents(lengths, counts, np.arange(7))
    assert not list(tmp_path.iterdir())


def test_an_item_too_long_for_the_format_is_refused(tmp_path: Path) -> None:
    tokens = np.broadcast_to(np.uint16(1), 2**31)  # takes no memory
    with (
        pytest.raises(ValueError, match=r"an item of 2147483648 tokens.*split the document"),
        IndexedWriter(tmp_path / "corpus", "uint16") as writer,
    ):
        writer.add_documents([2**31], [1], tokens)


def test_merged_files_keep_their_documents(tmp_path: Path) -> None:
    write(tmp_path / "first", DOCUMENTS)
    write(tmp_path / "second", [[[8]], [[9, 10], []]])
    with IndexedWriter(tmp_path / "both", "uint16") as writer:
        writer.merge(tmp_path / "first")
        writer.add_document([[11]])
        writer.merge(tmp_path / "second.idx")
    assert documents_in(tmp_path / "both") == [*DOCUMENTS, [[11]], [[8]], [[9, 10], []]]


def test_files_of_different_dtypes_cannot_be_merged(tmp_path: Path) -> None:
    write(tmp_path / "narrow", DOCUMENTS)
    with (
        pytest.raises(ValueError, match=r"tokens of uint16, .* of int32"),
        IndexedWriter(tmp_path / "wide", "int32") as writer,
    ):
        writer.merge(tmp_path / "narrow")


def test_the_tokens_get_their_name_before_the_index(tmp_path: Path) -> None:
    disk = FailingDisk()
    with IndexedWriter(tmp_path / "corpus", "uint16", disk=disk) as writer:
        writer.add_document([[1]])
        assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert disk.named == ["corpus.bin", "corpus.idx"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_if_writing_is_interrupted(tmp_path: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), IndexedWriter(tmp_path / "corpus", "uint16") as writer:
        writer.add_document([[1]])
        raise interruption("stop")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_whatever_operation_fails_a_file_is_whole_or_absent(tmp_path: Path, overwrite: bool) -> None:
    def attempt(prefix: Path, disk: Disk) -> None:
        with IndexedWriter(prefix, "uint16", overwrite=overwrite, disk=disk) as writer:
            writer.add_document([[1, 2, 3]])

    counting = FailingDisk()
    attempt(tmp_path / "counted", counting)
    assert counting.operations > 8
    outcomes = set()
    for operation in range(1, counting.operations + 3 * overwrite + 1):
        prefix = tmp_path / str(operation) / "corpus"
        prefix.parent.mkdir()
        if overwrite:
            write(prefix, DOCUMENTS)
        disk = FailingDisk(operation)
        try:
            attempt(prefix, disk)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        present = sorted(path.name for path in prefix.parent.iterdir())
        if present:
            assert present == ["corpus.bin", "corpus.idx"]
            assert documents_in(prefix) in ([[[1, 2, 3]]], DOCUMENTS if overwrite else [])
        outcomes.add("whole" if present else "absent")
    assert outcomes == {"whole", "absent"}


def test_an_existing_file_is_only_replaced_on_demand(tmp_path: Path) -> None:
    write(tmp_path / "corpus", DOCUMENTS)
    with pytest.raises(ValueError, match=r"corpus\.bin exists already"):
        write(tmp_path / "corpus", [[[9]]])
    with IndexedWriter(tmp_path / "corpus", "uint16", overwrite=True) as writer:
        writer.add_document([[9]])
    assert documents_in(tmp_path / "corpus") == [[[9]]]


def test_a_writer_is_used_in_a_with_block(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="with"):
        IndexedWriter(tmp_path / "corpus", "uint16").add_document([[1]])


@pytest.mark.parametrize("dtype", ["float32", "complex128", "uint32"])
def test_a_dtype_without_a_code_is_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ValueError, match=f"dtype={dtype} cannot be written"):
        IndexedWriter(tmp_path / "corpus", dtype)


def test_fractions_are_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float64"), IndexedWriter(tmp_path / "corpus", "uint16") as writer:
        writer.add_documents([1], [1], np.array([0.5]))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(None, "int32"), (100, "uint16"), (65499, "uint16"), (65500, "int32"), (250000, "int32")]
)
def test_small_vocabularies_take_two_bytes_a_token(vocab_size: int | None, dtype: str) -> None:
    assert best_dtype(vocab_size) == np.dtype(dtype)


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_a_prefix_may_carry_the_suffix_of_either_file(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "corpus", DOCUMENTS)
    assert open_indexed(f"{tmp_path / 'corpus'}{suffix}").prefix == tmp_path / "corpus"


def test_a_prefix_that_ends_like_a_suffix_is_taken_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "corpus.bin", DOCUMENTS)
    assert open_indexed(tmp_path / "corpus.bin").prefix == tmp_path / "corpus.bin"


def test_a_missing_file_names_similar_ones(tmp_path: Path) -> None:
    for name in ("wiki_text_document", "books_text_document"):
        write(tmp_path / name, DOCUMENTS)
    (tmp_path / "lonely.idx").touch()
    with pytest.raises(ValueError, match=r"wiki_text\.bin and .*wiki_text\.idx not found; .* has wiki_text_document"):
        open_indexed(tmp_path / "wiki_text")
    with pytest.raises(ValueError, match=r"lonely\.bin not found"):
        open_indexed(tmp_path / "lonely")
    with pytest.raises(ValueError, match="there is no directory"):
        open_indexed(tmp_path / "elsewhere" / "corpus")


def test_warming_up_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "corpus", DOCUMENTS)
    indexed = IndexedDataset(tmp_path / "corpus")
    indexed.warm_up()
    assert indexed.read(0).tolist() == [1, 2, 3]
