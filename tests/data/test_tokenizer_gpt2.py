"""GPT-2's BPE against two libraries, against its rule written out plainly, and against itself."""

import itertools
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers

import megalith.data.bpe
import megalith.data.pieces
from megalith.data.bpe import Gpt2Rule, Merges, byte_symbols, equal_library, find_gpt2_pieces
from megalith.data.corpus import standard_library_documents
from megalith.data.pieces import PieceEncoder
from megalith.data.token_codecs import BytePairCodec
from megalith.data.tokenizer import Tokenizer, load_tokenizer, train_byte_bpe

regex: Any = pytest.importorskip("regex")  # comes with tiktoken; has no types

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Characters that this Python's Unicode version knows: on newer ones the libraries have other opinions.
characters = st.characters(exclude_categories=("Cs", "Cn"))
# What the pattern tells apart, far more often than chance would have it.
BITS = (
    *(
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x85",
        "\x1c",
        "'",
        "'s",
        "'re",
        "'ll",
        "'LL",
        "'v",
    ),
    *(
        "''",
        "a",
        "Zeta",
        "\u00e9",
        "\u0416",
        "\u4e2d",
        "\u0e01",
        "0",
        "42",
        "\u0664",
        "\u00b2",
        "!",
        "--",
        "\u2014",
        "_",
    ),
    *("\U0001f600", "\0"),
)
bits = st.sampled_from(BITS)
texts = st.lists(bits | st.text(characters, max_size=5), max_size=20).map("".join)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Some documents of the standard library, about 1 MB."""
    return list(standard_library_documents())[::5]


@pytest.fixture(scope="module")
def tokenizer(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_byte_bpe(documents, 2000, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def by_tokenizers(tokenizer: Tokenizer) -> LibraryTokenizer:
    """The same vocabulary and merges in the tokenizers library."""
    vocabulary, merges = files_of(tokenizer)
    library = LibraryTokenizer(models.BPE(vocabulary, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return library


@pytest.fixture(scope="module")
def by_tiktoken(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """The same vocabulary in tiktoken, which takes the ids for ranks."""
    byte_of = {symbol: number for number, symbol in enumerate(byte_symbols())}
    vocabulary, _ = files_of(tokenizer)
    ranks = {
        bytes(byte_of[character] for character in token): number
        for token, number in vocabulary.items()
        if token != "<|endoftext|>"
    }
    return tiktoken.Encoding("ours", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def files_of(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    merges = [tuple(line.split()) for line in tokenizer.files["merges.txt"].decode().splitlines()[1:]]
    return json.loads(tokenizer.files["vocab.json"]), [(a, b) for a, b in merges]


def merge_plainly(piece: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[str]:
    """The rule of byte pair encoding as one would write it on paper."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    symbols = list(piece)
    while True:
        known = [pair for pair in itertools.pairwise(symbols) if pair in ranks]
        if not known:
            return symbols
        best = min(known, key=lambda pair: ranks[pair])
        merged: list[str] = []
        while symbols:
            if tuple(symbols[:2]) == best:
                merged.append(symbols[0] + symbols[1])
                del symbols[:2]
            else:
                merged.append(symbols.pop(0))
        symbols = merged


@given(texts)
@settings(max_examples=500, deadline=None)
def test_pieces_are_those_of_the_pattern(text: str) -> None:
    buffer = np.frombuffer(text.encode() + b"\xff", np.uint8)
    lengths = np.diff(find_gpt2_pieces(buffer), append=len(buffer)).tolist()
    assert lengths == [len(piece.encode()) for piece in regex.findall(PATTERN, text)] + [1]


@given(st.lists(texts, max_size=6))
@settings(max_examples=200, deadline=None)
def test_texts_of_one_buffer_do_not_touch_each_other(many: list[str]) -> None:
    buffer = np.frombuffer(b"".join(text.encode() + b"\xff" for text in many) or b"\xff", np.uint8)
    expected = [length for text in many for length in (*(len(p.encode()) for p in regex.findall(PATTERN, text)), 1)]
    assert np.diff(find_gpt2_pieces(buffer), append=len(buffer)).tolist() == (expected or [1])


@given(texts)
@settings(max_examples=200, deadline=None)
def test_ids_are_those_of_tokenizers_and_tiktoken(
    tokenizer: Tokenizer, by_tokenizers: LibraryTokenizer, by_tiktoken: tiktoken.Encoding, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert ids == by_tokenizers.encode(text).ids
    assert ids == by_tiktoken.encode_ordinary(text)


def test_ids_of_real_text_are_those_of_tokenizers_and_tiktoken(
    tokenizer: Tokenizer, by_tokenizers: LibraryTokenizer, by_tiktoken: tiktoken.Encoding, documents: list[str]
) -> None:
    batch = [ids.tolist() for ids in tokenizer.encode_batch(documents)]
    assert batch == by_tiktoken.encode_ordinary_batch(documents, num_threads=1)
    assert batch == [encoding.ids for encoding in by_tokenizers.encode_batch(documents)]


@given(st.lists(texts, max_size=8))
@settings(max_examples=100, deadline=None)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, many: list[str]) -> None:
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(many)] == many


@st.composite
def small_alphabets(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and merges of a, b and c in any order, regular or not; some of what is merged has no id."""
    known = ["a", "b", "c"]
    merges: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(1, 10))):
        pair = (draw(st.sampled_from(known)), draw(st.sampled_from(known)))
        merges.append(pair)
        known.append(pair[0] + pair[1])
    merges = draw(st.permutations(merges))
    tokens = draw(st.lists(st.sampled_from(sorted(set(known))), unique=True, min_size=1))
    return {token: number + 1 for number, token in enumerate(tokens)}, merges


@given(small_alphabets(), st.lists(st.text("abc", min_size=1, max_size=30), min_size=1, max_size=5))
@settings(max_examples=300, deadline=None)
def test_merging_follows_the_rule_for_any_merges(
    files: tuple[dict[str, int], list[tuple[str, str]]], pieces: list[str]
) -> None:
    vocabulary, merges = files
    ids, counts = Merges(vocabulary, merges).encode_pieces([piece.encode() for piece in pieces])
    expected = [merge_plainly(piece, merges) for piece in pieces]
    assert counts.tolist() == [len(symbols) for symbols in expected]
    # A symbol that is not in the vocabulary has the id 0.
    assert ids.tolist() == [vocabulary.get(symbol, 0) for symbols in expected for symbol in symbols]


@given(small_alphabets(), st.lists(st.text("abc", min_size=1, max_size=9), min_size=8, max_size=40).map("".join))
@settings(max_examples=150, deadline=None)
def test_long_pieces_are_merged_by_the_same_rule(
    files: tuple[dict[str, int], list[tuple[str, str]]], piece: str
) -> None:
    vocabulary, merges = files
    expected = [vocabulary.get(symbol, 0) for symbol in merge_plainly(piece, merges)]
    whole = Merges(vocabulary, merges)
    symbols = np.frombuffer(piece.encode(), np.uint8).astype(np.int32)
    for merge in (whole._merge_long, whole._merge_queued):
        assert whole._ids[merge(symbols.copy())].tolist() == expected


@given(small_alphabets(), st.lists(st.text("abc", min_size=1, max_size=30), min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_a_library_is_used_only_where_it_finds_the_same_ids(
    files: tuple[dict[str, int], list[tuple[str, str]]], pieces: list[str]
) -> None:
    merges = list(dict.fromkeys(files[1]))
    tokens = dict.fromkeys([*byte_symbols(), *(a + b for a, b in merges)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    library = equal_library(vocabulary, merges, Merges(vocabulary, merges))
    if library is not None:
        for piece in pieces:
            assert library.encode_ordinary(piece) == [vocabulary[symbol] for symbol in merge_plainly(piece, merges)]


@pytest.mark.parametrize(
    ("merges", "fits"),
    [
        ([("a", "b"), ("ab", "c")], True),
        ([("b", "c"), ("a", "b"), ("ab", "c")], False),  # abc never becomes one token, but tiktoken makes it one
        ([("ab", "c"), ("a", "b")], False),  # a merge before its parts are made
        ([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")], False),  # one token made in two ways
    ],
)
def test_a_library_is_refused_where_the_merges_say_more_than_the_tokens(
    merges: list[tuple[str, str]], fits: bool
) -> None:
    tokens = dict.fromkeys([*byte_symbols(), *(a + b for a, b in merges), "<|endoftext|>"])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    assert (equal_library(vocabulary, merges, Merges(vocabulary, merges)) is not None) == fits


def test_a_library_is_refused_for_ids_out_of_order_or_missing_bytes() -> None:
    merges = [("a", "b"), ("c", "d")]
    swapped = {token: number for number, token in enumerate([*byte_symbols(), "cd", "ab"])}
    assert equal_library(swapped, merges, Merges(swapped, merges)) is None
    missing = {token: number for number, token in enumerate([*byte_symbols()[1:], "ab", "cd"])}
    assert equal_library(missing, merges, Merges(missing, merges)) is None


def test_giving_pieces_to_the_library_changes_no_ids(
    tokenizer: Tokenizer, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, lengths = tokenizer.encode_flat(documents)
    monkeypatch.setattr(megalith.data.bpe, "MOST_LONG", 2000)
    monkeypatch.setattr(megalith.data.pieces, "GROUP_SIZE", 1 << 14)
    codec = fresh_codec(tokenizer)
    found, found_lengths = codec.encode(documents)
    rule = codec._encoder._rule
    assert isinstance(rule, Gpt2Rule)
    assert rule._library is not None
    assert np.array_equal(found, expected)
    assert np.array_equal(found_lengths, lengths)


def test_end_of_text_in_a_document_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([tokenizer.eod]) == "<|endoftext|>"


def test_a_text_cut_into_buffers_has_the_ids_of_the_whole(
    tokenizer: Tokenizer, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n\n".join(documents)[:300_000] + "\u3000 \u4e2d\u6587\u3000\nx"
    monkeypatch.setattr(megalith.data.pieces, "GROUP_SIZE", 1 << 30)
    whole = fresh_codec(tokenizer).encode([text])[0]
    for size in (1 << 10, 1 << 13, 1 << 16):
        monkeypatch.setattr(megalith.data.pieces, "GROUP_SIZE", size)
        ids, lengths = fresh_codec(tokenizer).encode(["", text, ""])
        assert lengths.tolist() == [0, len(whole), 0]
        assert np.array_equal(ids, whole)


def test_forgetting_pieces_changes_no_ids(
    tokenizer: Tokenizer, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = tokenizer.encode_flat(documents[:20])
    monkeypatch.setattr(megalith.data.pieces, "GROUP_SIZE", 1 << 12)
    monkeypatch.setattr(megalith.data.pieces, "MOST_PIECES", 1000)
    assert np.array_equal(fresh_codec(tokenizer).encode(documents[:20])[0], expected)


@pytest.mark.parametrize("unit", ["a", " ", "=", "ab", "\n", "ACGT", "\u4e2d\u6587"])
def test_a_piece_without_end_is_encoded_in_good_time(
    tokenizer: Tokenizer, by_tokenizers: LibraryTokenizer, unit: str
) -> None:
    text = unit * 4000
    assert tokenizer.encode(text) == by_tokenizers.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(unit * 200_000)) == unit * 200_000


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("a\ud800b")


def test_many_pieces_fill_and_grow_the_table() -> None:
    """200,000 different words: growing the table keeps every entry."""
    vocabulary = {symbol: number for number, symbol in enumerate([*byte_symbols(), "ab"])}
    encoder = PieceEncoder(Gpt2Rule(vocabulary, [("a", "b")]))
    letters = str.maketrans("0123456789", "ghijklmnop")
    text = " ".join(format(number, "x").translate(letters) for number in range(200_000))
    first, _ = encoder.encode([text])
    assert encoder._num_pieces > 200_000
    assert np.array_equal(encoder.encode([text])[0], first)
    of_byte = np.array([vocabulary[symbol] for symbol in byte_symbols()])
    plain = of_byte[np.frombuffer(text.encode(), np.uint8)]
    pairs = np.flatnonzero((plain[:-1] == vocabulary["a"]) & (plain[1:] == vocabulary["b"]))
    plain[pairs] = vocabulary["ab"]
    assert np.array_equal(first, np.delete(plain, pairs + 1))


def fresh_codec(tokenizer: Tokenizer) -> BytePairCodec:
    return BytePairCodec(*files_of(tokenizer))


def test_training_is_deterministic_and_ordered_like_gpt2(documents: list[str], tmp_path: Path) -> None:
    first = train_byte_bpe(documents[:20], 600, tmp_path / "first")
    second = train_byte_bpe(iter(documents[:20]), 600, tmp_path / "second")
    assert first.files == second.files
    assert first.digest == second.digest
    assert first.vocab_size == 600
    assert first.eod == 599
    vocabulary, merges = files_of(first)
    tokens = list(vocabulary)
    assert tokens[:256] == sorted(byte_symbols())
    assert tokens[256:599] == [a + b for a, b in merges]


def test_training_refuses_a_size_without_room_for_the_bytes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        train_byte_bpe(["text"], 256, tmp_path)


def test_training_on_a_small_text_gives_what_there_is(tmp_path: Path) -> None:
    tokenizer = train_byte_bpe(["abab abab"], 1000, tmp_path)
    assert 257 < tokenizer.vocab_size < 1000
    assert tokenizer.eod == tokenizer.vocab_size - 1


def load_gpt2(folder: Path, vocabulary: object, merges: str | bytes) -> Tokenizer:
    """A tokenizer from files with this content."""
    (folder / "vocab.json").write_text(vocabulary if isinstance(vocabulary, str) else json.dumps(vocabulary))
    (folder / "merges.txt").write_bytes(merges.encode() if isinstance(merges, str) else merges)
    return load_tokenizer(
        "GPT2BPETokenizer", vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt")
    )


GOOD = {symbol: number for number, symbol in enumerate([*byte_symbols(), "ab"])}


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        ("{", "#\na b\n", "vocab.json, line 1: expected JSON"),
        ("[" * 100_000, "#\na b\n", "vocab.json: expected JSON, found brackets nested too deeply"),
        ("[1]", "#\na b\n", "vocab.json: expected a JSON object of tokens and ids, found a list"),
        ({}, "#\na b\n", "expected a JSON object of tokens and ids, found an empty object"),
        ({**GOOD, "x!": "7"}, "#\na b\n", r"expected ids from 0 to 257 .* found '7' for 'x!'"),
        ({**GOOD, "x!": True}, "#\na b\n", "found True for 'x!'"),
        ({**GOOD, "x!": 900}, "#\na b\n", "found 900 for 'x!'"),
        ({**GOOD, "x!": 5}, "#\na b\n", "expected one token per id"),
        (GOOD, "#\n", "merges.txt: expected a version line and pairs"),
        (GOOD, "#\na b\nc\n", "merges.txt, line 3: expected two tokens with a blank between, found 'c'"),
        (GOOD, "#\na b\nb c\n", "merges.txt, line 3: expected a merge into a token of .*vocab.json, found 'bc'"),
        (
            {**GOOD, **{f"word{n}": len(GOOD) + n for n in range(300)}},
            "#\na b\n",
            "expected merges for nearly all tokens .* found none for 300 of 557",
        ),
    ],
)
def test_damaged_or_mismatched_files_are_refused_by_name(
    tmp_path: Path, vocabulary: object, merges: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_gpt2(tmp_path, vocabulary, merges)


def test_files_that_are_not_utf8_are_refused_with_the_offset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"merges.txt: expected UTF-8 text, found byte 0xff at offset 4"):
        load_gpt2(tmp_path, GOOD, b"#\na \xff\n")


def test_the_last_line_of_merges_counts_only_with_its_newline(tmp_path: Path) -> None:
    tokenizer = load_gpt2(tmp_path, {**GOOD, "cd": 257}, "#\na b\nc d")
    assert tokenizer.encode("ab cd") == [256, GOOD["\u0120"], GOOD["c"], GOOD["d"]]


def test_a_vocabulary_without_end_of_text_says_so(tmp_path: Path) -> None:
    tokenizer = load_gpt2(tmp_path, GOOD, "#version: 0.2\r\na b\r\n")
    with pytest.raises(ValueError, match="GPT2BPETokenizer has no eod token"):
        _ = tokenizer.eod


def test_unicode_classes_agree_with_this_python() -> None:
    """Every assigned character alone, behind a letter, tells its class by where the pieces start."""
    every = [chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000]
    assigned = [c for c in every if unicodedata.category(c) not in ("Cn", "Co")]
    buffer = np.frombuffer(b"".join(f"a{c}".encode() + b"\xff" for c in assigned), np.uint8)
    starts = np.zeros(len(buffer), bool)
    starts[find_gpt2_pieces(buffer)] = True
    ends = np.cumsum([len(c.encode()) + 2 for c in assigned])
    joined = ~starts[ends - 1 - np.array([len(c.encode()) for c in assigned])]
    assert [c for c, j in zip(assigned, joined.tolist(), strict=True) if j] == [
        c for c in assigned if regex.match(r"\p{L}", c)
    ]
