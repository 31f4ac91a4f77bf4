"""BERT's WordPiece against its rule written out plainly, against the tokenizers library, and its files."""

import itertools
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, normalizers, pre_tokenizers

import megalith.data.pieces
from megalith.data.corpus import standard_library_documents
from megalith.data.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
STEMS = "the cat run a b c hello world un able ning s ly ss ete cafe i".split()
STEMS += "\u00e9t\u00e9 \u03c2 \u03c3 \u03b1 \u0416 \u0436 \u4e2d \u6587".split()
MARKS = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u2019\u2014\u00bf\u3002")
VOCABULARY = [
    *SPECIAL,
    *STEMS,
    *(f"##{stem}" for stem in STEMS),
    *MARKS,
    *"0123456789",
    *(f"##{d}" for d in "0123456789"),
]

BITS = (
    *(
        " ",
        "  ",
        "\n",
        "\t",
        "\r",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x85",
        "\x0b",
        "\x1c",
        "\0",
        "\ufffd",
        "\u200b",
        "\u00ad",
    ),
    *(
        "a",
        "runs",
        "cats",
        "Cafe\u0301",
        "\u00c9T\u00c9",
        "\u0391\u03a3",
        "\u03a3",
        "\u0130",
        "\u1e9e",
        "\u0301",
        "!\u0301",
        "=",
    ),
    *(
        "\u4e2d",
        "\u6587\u6587",
        "\uf900",
        "\U0002f81a",
        "\u3002",
        "\u2019",
        "\u2014",
        "42",
        "_",
        "'",
        ".",
        "-",
        "[CLS]",
        "\ue000",
    ),
    *("\u2260", "\U0001f600", "\u0e01", "\uac00", "\u0374"),
)
bits = st.sampled_from(BITS)
texts = st.lists(bits | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=20).map("".join)


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module", params=["BertWordPieceLowerCase", "BertWordPieceCase"])
def tokenizer(request: pytest.FixtureRequest, vocab_file: str) -> Tokenizer:
    return load_tokenizer(request.param, vocab_file=vocab_file)


def words_plainly(text: str, lower_case: bool) -> Iterator[str]:
    """BERT's cleaning and cutting, step by step over the whole text."""
    clean = ""
    for c in text:
        if c in "\t\n\r" or unicodedata.category(c) == "Zs":
            clean += " "
        elif c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cf"):
            continue
        elif any(
            first <= ord(c) <= last
            for first, last in (
                *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
                *((0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
            )
        ):
            clean += f" {c} "
        else:
            clean += c
    for word in clean.split():
        if lower_case:
            word = "".join(c for c in unicodedata.normalize("NFD", word.lower()) if unicodedata.category(c) != "Mn")
        for _, group in itertools.groupby(enumerate(word), key=lambda place: place[0] if is_mark(place[1]) else -1):
            yield "".join(c for _, c in group)


def is_mark(c: str) -> bool:
    in_ascii = 33 <= ord(c) <= 47 or 58 <= ord(c) <= 64 or 91 <= ord(c) <= 96 or 123 <= ord(c) <= 126
    return in_ascii or unicodedata.category(c).startswith("P")


def pieces_plainly(word: str) -> list[str]:
    """The longest known piece from the left, again and again."""
    if len(word) > 200:
        return ["[UNK]"]
    pieces: list[str] = []
    rest = word
    while rest:
        fitting = [n for n in range(len(rest), 0, -1) if ("##" if pieces else "") + rest[:n] in VOCABULARY]
        if not fitting:
            return ["[UNK]"]
        pieces.append(("##" if pieces else "") + rest[: fitting[0]])
        rest = rest[fitting[0] :]
    return pieces


@given(st.lists(texts, min_size=1, max_size=4))
@settings(max_examples=400, deadline=None)
def test_ids_follow_the_rule(tokenizer: Tokenizer, many: list[str]) -> None:
    lower_case = tokenizer.name == "BertWordPieceLowerCase"
    expected = [
        [VOCABULARY.index(piece) for word in words_plainly(text, lower_case) for piece in pieces_plainly(word)]
        for text in many
    ]
    assert [ids.tolist() for ids in tokenizer.encode_batch(many)] == expected


def test_words_of_two_hundred_characters_are_the_longest(tokenizer: Tokenizer) -> None:
    a, unknown = VOCABULARY.index("a"), VOCABULARY.index("[UNK]")
    assert tokenizer.encode("a" * 200) == [a] + [VOCABULARY.index("##a")] * 199
    assert tokenizer.encode("a" * 201) == [unknown]
    assert tokenizer.encode("a" * 300_000 + " a") == [unknown, a]


def test_ids_of_real_text_are_those_of_the_library(tmp_path: Path) -> None:
    """On text without private and unassigned characters, where the library's cleaning is BERT's."""
    documents = list(standard_library_documents())[::9]
    vocabulary = train_wordpiece(documents, 2000)
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    for lower_case, kind in ((True, "BertWordPieceLowerCase"), (False, "BertWordPieceCase")):
        library = LibraryTokenizer(
            models.WordPiece(
                {token: n for n, token in enumerate(vocabulary)}, unk_token="[UNK]", max_input_chars_per_word=200
            )
        )
        library.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        ours = load_tokenizer(kind, vocab_file=str(tmp_path / "vocab.txt"))
        expected = [encoding.ids for encoding in library.encode_batch(documents)]
        assert [ids.tolist() for ids in ours.encode_batch(documents)] == expected


def train_wordpiece(documents: list[str], size: int) -> list[str]:
    """The tokens of a vocabulary trained on documents, in the order of their ids."""
    from tokenizers import trainers

    library = LibraryTokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.train_from_iterator(
        documents, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    )
    vocabulary = library.get_vocab()
    return sorted(vocabulary, key=lambda token: vocabulary[token])


def test_a_text_cut_into_buffers_has_the_ids_of_the_whole(
    tokenizer: Tokenizer, vocab_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join([*BITS, "\u4e2d\u6587", "runs, cats"] * 200)
    expected = tokenizer.encode(text)
    monkeypatch.setattr(megalith.data.pieces, "GROUP_SIZE", 100)
    assert load_tokenizer(tokenizer.name, vocab_file=vocab_file).encode(text) == expected


def test_decoding_joins_the_pieces_of_words(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("the cats, running, jump")) == "the cats , running , [UNK]"
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


def test_special_tokens_have_roles_but_no_end_of_document(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask) == (0, 2, 3, 4)
    assert tokenizer.vocab_size == len(VOCABULARY) + 2
    assert (tokenizer.bos, tokenizer.eos) == (len(VOCABULARY), len(VOCABULARY) + 1)
    with pytest.raises(ValueError, match=r"has no eod token \(it has: cls, sep, pad, mask, bos, eos\)"):
        _ = tokenizer.eod


def test_extra_tokens_follow_the_vocabulary(vocab_file: str) -> None:
    tokenizer = load_tokenizer("BertWordPieceCase", vocab_file=vocab_file, vocab_extra_ids=3)
    assert tokenizer.extra_ids == (len(VOCABULARY) + 2, len(VOCABULARY) + 3, len(VOCABULARY) + 4)
    assert tokenizer.vocab_size == len(VOCABULARY) + 5
    assert tokenizer.digest != load_tokenizer("BertWordPieceCase", vocab_file=vocab_file).digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\n", r"vocab.txt: expected \[UNK\] among its 2 tokens, found none"),
        ("[UNK]\na\nb\na\n", "vocab.txt, line 4: expected one new token, found 'a' again \\(line 2\\)"),
        ("[UNK]\n\nb\n", "vocab.txt, line 2: expected one new token, found an empty line"),
        ("", "vocab.txt: expected 1 to 268435456 bytes, found 0"),
    ],
)
def test_damaged_vocabularies_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer("BertWordPieceCase", vocab_file=str(tmp_path / "vocab.txt"))
