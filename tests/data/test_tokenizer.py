"""What all kinds of tokenizer have in common, and the kinds that a library runs."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megalith.data.tokenizer import (
    KINDS,
    MANIFEST,
    TextStream,
    Tokenizer,
    load_saved_tokenizer,
    load_tokenizer,
    padded_vocab_size,
)

TEXTS = ["The cat sat on the mat.", "", "caf\u00e9 \u4e2d\u6587 \U0001f600\n", "a <eos> b"] * 3
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Path:
    """One tokenizer's files of every kind."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "vocab.json").write_bytes((golden / "small-vocab.json").read_bytes())
    (folder / "merges.txt").write_bytes((golden / "small-merges.txt").read_bytes())
    (folder / "vocab.txt").write_bytes((golden / "bert-vocab.txt").read_bytes())
    write_tokenizer_json(folder)
    write_sentencepiece(folder)
    return folder


def write_tokenizer_json(folder: Path) -> None:
    """A tokenizer.json with everything that could get in the way: truncation, padding, special tokens around."""
    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(
        TEXTS * 5,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    library.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(folder / "tokenizer.json"))


def write_sentencepiece(folder: Path) -> None:
    import sentencepiece

    words = [f"{a}{b}{c}" for a in ("un", "re", "in") for b in ("do", "make", "form") for c in ("ing", "able", "s", "")]
    with open(folder / "tokenizer.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([f"{a} {b}" for a in words for b in words]),
            model_writer=model,
            vocab_size=60,
            model_type="bpe",
            minloglevel=2,
        )


def load_kind(kind: str, folder: Path) -> Tokenizer:
    paths: dict[str, Any] = {setting: str(folder / name) for name, setting in KINDS[kind].items()}
    return load_tokenizer(kind, **paths)


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    return load_kind(request.param, folder)


def test_one_text_and_many_have_the_same_ids(tokenizer: Tokenizer) -> None:
    one_by_one = [tokenizer.encode(text) for text in TEXTS]
    batch = tokenizer.encode_batch(TEXTS)
    flat, lengths = tokenizer.encode_flat(TEXTS)
    assert [ids.tolist() for ids in batch] == one_by_one
    assert lengths.tolist() == [len(ids) for ids in one_by_one]
    assert flat.tolist() == [number for ids in one_by_one for number in ids]
    assert flat.dtype == np.int32
    assert flat.max() < tokenizer.vocab_size
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode("") == []


def test_a_saved_tokenizer_comes_back_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "run" / "tokenizer")
    again = load_saved_tokenizer(tmp_path / "run" / "tokenizer")
    assert (again.name, again.roles, again.digest) == (tokenizer.name, tokenizer.roles, tokenizer.digest)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_half_a_surrogate_pair_is_refused_by_all(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode_batch(["fine", "half \udc00"])


def test_ids_beyond_the_vocabulary_are_not_decoded(tokenizer: Tokenizer) -> None:
    for number in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token {number} cannot be decoded"):
            tokenizer.decode([number])


def test_digests_differ_between_kinds(folder: Path) -> None:
    assert len({load_kind(kind, folder).digest for kind in KINDS}) == len(KINDS)


def test_a_changed_file_of_a_saved_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    load_kind("BertWordPieceCase", folder).save(tmp_path)
    words = (tmp_path / "vocab.txt").read_text().split("\n")
    words[5], words[6] = words[6], words[5]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(ValueError, match=r"vocab.txt: expected the content that was saved .* changed or damaged"):
        load_saved_tokenizer(tmp_path)


@pytest.mark.parametrize("change", ["roles", "vocab_extra_ids", "memory", "digest", "tokenizer_type", "files"])
def test_a_changed_manifest_is_refused(folder: Path, tmp_path: Path, change: str) -> None:
    load_kind("BertWordPieceCase", folder).save(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["vocab_extra_ids" if change == "memory" else change] = {
        "roles": {"cls": 1},
        "vocab_extra_ids": 1,
        "memory": 1 << 40,
        "digest": "0",
        "tokenizer_type": "BertWordPieceLowerCase",
        "files": {},
    }[change]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="expected a tokenizer"):
        load_saved_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "expected JSON, found brackets nested too deeply"),
        (f'{{"vocab_extra_ids": {"9" * 5000}}}', "expected JSON, found a fault: Exceeds the limit"),
        ("[]", "expected a tokenizer's manifest, found something else"),
        ("\xff", "expected JSON, found a fault"),
    ],
)
def test_a_manifest_that_is_none_is_refused_by_its_path(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=f"{MANIFEST}.*{message}"):
        load_saved_tokenizer(tmp_path)


def test_a_directory_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{MANIFEST}: expected a tokenizer's file, found nothing there"):
        load_saved_tokenizer(tmp_path)


def test_an_unknown_kind_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="tokenizer_type=GPT3 is not one of GPT2BPETokenizer, Bert"):
        load_tokenizer("GPT3")


def test_a_missing_setting_names_its_flag() -> None:
    with pytest.raises(ValueError, match=r"GPT2BPETokenizer needs --merge-file, the path of a merges.txt"):
        load_tokenizer("GPT2BPETokenizer", vocab_file="vocab.json")


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a regular file, found a directory"):
        load_tokenizer("BertWordPieceCase", vocab_file=str(tmp_path))
    with pytest.raises(ValueError, match="expected a tokenizer's file, found nothing there"):
        load_tokenizer("BertWordPieceCase", vocab_file=str(tmp_path / "vocab.txt"))
    with pytest.raises(ValueError, match="expected a regular file, found a device"):
        load_tokenizer("BertWordPieceCase", vocab_file="/dev/zero")


@given(texts)
@settings(max_examples=100, deadline=None)
def test_bytes_are_their_own_ids(text: str) -> None:
    tokenizer = load_tokenizer("ByteLevelTokenizer")
    assert bytes(tokenizer.encode(text)) == text.encode()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    stream = TextStream(tokenizer)
    yield from (stream.push(number) for number in ids)
    yield stream.finish()


@given(st.lists(st.integers(0, 256), max_size=30), texts)
@settings(max_examples=300, deadline=None)
def test_streamed_text_is_the_decoded_text(ids: list[int], text: str) -> None:
    """Whatever the bytes: whole characters, parts of characters, or none that make sense."""
    tokenizer = load_tokenizer("ByteLevelTokenizer")
    for numbers in (ids, tokenizer.encode(text), [*tokenizer.encode(text), *ids]):
        assert "".join(streamed(tokenizer, numbers)) == tokenizer.decode(numbers)


def test_streamed_text_is_the_decoded_text_for_every_kind(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("unaffs redoing the caf\u00e9 \u4e2d\u6587 \U0001f600, runs on.")
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_is_streamed_when_it_is_whole() -> None:
    parts = list(streamed(load_tokenizer("ByteLevelTokenizer"), list("a\u4e2d!".encode())))
    assert parts == ["a", "", "", "\u4e2d", "!", ""]


def test_hugging_face_ids_are_the_librarys_without_cutting_filling_or_framing(folder: Path) -> None:
    tokenizer = load_kind("HuggingFaceTokenizer", folder)
    library = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    assert [tokenizer.encode(text) for text in TEXTS] == [
        library.encode(text, add_special_tokens=False).ids for text in TEXTS
    ]
    assert len(tokenizer.encode("x" * 100)) > 64
    assert tokenizer.decode(tokenizer.encode(TEXTS[2])) == TEXTS[2]


def test_hugging_face_special_tokens_in_a_text_are_recognised(folder: Path) -> None:
    assert 1 in load_kind("HuggingFaceTokenizer", folder).encode("a <eos> b")


def test_hugging_face_roles_come_from_the_configuration_beside_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = {"eos_token": {"content": "<eos>", "lstrip": False}, "bos_token": "<bos>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_kind("HuggingFaceTokenizer", tmp_path)
    assert tokenizer.roles == {"eod": 1, "bos": 0, "eos": 1}
    tokenizer.save(tmp_path / "saved")
    assert load_saved_tokenizer(tmp_path / "saved").roles == tokenizer.roles


def test_hugging_face_end_of_document_is_found_by_its_usual_name(folder: Path) -> None:
    assert load_kind("HuggingFaceTokenizer", folder).eod == 1


@pytest.mark.parametrize(
    ("config", "roles"),
    [
        ({"model_max_length": 1024}, {"eod": 1, "eos": 1}),
        ({"bos_token": "<bos>"}, {"eod": 1, "eos": 1, "bos": 0}),
        ({"eos_token": None}, {}),
    ],
)
def test_hugging_face_end_of_document_is_the_usual_one_where_the_configuration_is_silent(
    config: dict[str, Any], roles: dict[str, int], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_kind("HuggingFaceTokenizer", tmp_path).roles == roles


def test_a_tokenizer_configuration_that_is_no_object_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: expected an object, found a list"):
        load_kind("HuggingFaceTokenizer", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tokenizer.json, line 1: expected JSON"),
        ("[]", 'tokenizer.json: expected an object with "model", found a list'),
        ('{"model": {}}', "expected a tokenizer that the tokenizers library can read, found a fault"),
        ('{"model": {"type": "Nonsense"}}', "expected a tokenizer that the tokenizers library can read"),
        (
            '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "a"}}',
            "tokenizer.json: expected tokens with ids up to 2147483646, found 4294967295",
        ),
        (
            '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}}',
            "tokenizer.json: expected tokens with ids",
        ),
    ],
)
def test_a_damaged_tokenizer_json_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_kind("HuggingFaceTokenizer", tmp_path)


def test_sentencepiece_ids_are_the_librarys(folder: Path) -> None:
    import sentencepiece

    tokenizer = load_kind("SentencePieceTokenizer", folder)
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("undoing remakes informable", "un  do", ""):
        assert tokenizer.encode(text) == library.encode(text)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos) == (60, 2, 1)
    assert tokenizer.decode(tokenizer.encode("undoing remakes")) == "undoing remakes"


def test_a_damaged_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\x00 not a model")
    with pytest.raises(ValueError, match=r"tokenizer.model: expected a SentencePiece model"):
        load_kind("SentencePieceTokenizer", tmp_path)


def test_without_sentencepiece_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"not installed; pip install 'megalith\[data\]' brings it"):
        load_kind("SentencePieceTokenizer", folder)


def test_padding_reaches_the_next_multiple() -> None:
    assert padded_vocab_size(50257, 128, 1) == 50304
    assert padded_vocab_size(50304, 128, 1) == 50304
    assert padded_vocab_size(50257, 128, 8) == 51200
