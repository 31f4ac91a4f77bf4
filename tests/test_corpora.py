"""--corpus python for tasks that read sentences: the standard library's prose, its titles and a WordPiece of it."""

import sysconfig
from pathlib import Path

import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

import megalith.data.corpus
from megalith.corpora import make_sentences, titles_prefix, tokenizer_folder
from megalith.data.corpus import titled_documents
from megalith.data.indexed import open_indexed
from megalith.data.sentences import split_sentences
from megalith.data.tokenizer import load_tokenizer

MODULE = '"""{name} opens files. It closes them, too! Does it read? It does."""\n\nx = {name}(1)\n'


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of our own making, of four modules."""
    root = tmp_path / "library"
    (root / "json").mkdir(parents=True)
    for name in ("alpha", "beta", "json/__init__", "json/tool"):
        (root / f"{name}.py").write_text(MODULE.format(name=name.rpartition("/")[2].strip("_")))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    monkeypatch.setattr(megalith.data.corpus, "SMALLEST_DOCUMENT", 1)
    monkeypatch.setattr(megalith.data.corpus, "CODE_SHARE", 1)
    return tmp_path


def test_every_document_of_prose_has_a_title_and_its_sentences_are_items(library: Path) -> None:
    prefix = library / "python-90_text_sentence"
    make_sentences(prefix, 90)
    documents = dict(titled_documents(code=False))
    assert set(documents) == {f"{name} documentation" for name in ("alpha", "beta", "json", "json tool")}
    assert len(dict(titled_documents())) == 8
    tokenizer = load_tokenizer("BertWordPieceLowerCase", vocab_file=str(tokenizer_folder(prefix) / "vocab.txt"))
    sentences, titles = open_indexed(prefix), open_indexed(titles_prefix(prefix))
    assert sentences.num_documents == titles.num_documents == titles.num_items == 4
    for number, (title, text) in enumerate(documents.items()):
        assert titles.read(number).tolist() == tokenizer.encode(title)
        items = range(sentences.document_index[number], sentences.document_index[number + 1])
        read = [sentences.read(item).tolist() for item in items]
        assert read == [tokenizer.encode(sentence) for sentence in split_sentences(text)]
        assert len(read) == 5


def test_the_vocabulary_is_the_same_every_time_and_the_library_reads_it_alike(library: Path) -> None:
    contents = []
    for number in range(3):
        prefix = library / f"try{number}_text_sentence"
        make_sentences(prefix, 90)
        contents.append((tokenizer_folder(prefix) / "vocab.txt").read_text())
    assert contents[0] == contents[1] == contents[2]
    assert contents[0].startswith("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    vocabulary = {token: number for number, token in enumerate(contents[0].split())}
    assert len(vocabulary) <= 90
    theirs = LibraryTokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    theirs.normalizer = normalizers.BertNormalizer(lowercase=True)
    theirs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    theirs.decoder = decoders.WordPiece()
    ours = load_tokenizer("BertWordPieceLowerCase", vocab_file=str(tokenizer_folder(prefix) / "vocab.txt"))
    for _, text in titled_documents():
        assert ours.encode(text) == theirs.encode(text).ids


def test_a_vocabulary_without_room_for_single_letters_is_refused(library: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size=10 must be above \d+: special tokens and single letters"):
        make_sentences(library / "small_text_sentence", 10)
