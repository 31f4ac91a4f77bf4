"""The ids of Megatron-LM's tokenizers, and its padding of vocabularies."""

import json
from pathlib import Path
from typing import Any

import pytest

from megalith.data.tokenizer import Tokenizer, load_tokenizer, padded_vocab_size


@pytest.fixture(scope="module")
def recorded(golden: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((golden / "model_bert.json").read_text())
    return content


@pytest.fixture(scope="module")
def gpt2(golden: Path) -> Tokenizer:
    return load_tokenizer(
        "GPT2BPETokenizer",
        vocab_file=str(golden / "small-vocab.json"),
        merge_file=str(golden / "small-merges.txt"),
        vocab_extra_ids=7,
    )


def test_gpt2_ids_are_megatrons(gpt2: Tokenizer, recorded: dict[str, Any]) -> None:
    expected = recorded["bpe_small"]
    assert (gpt2.vocab_size, gpt2.eod) == (expected["vocab_size"], expected["eod"])
    tokens = {number: token for token, number in json.loads(gpt2.files["vocab.json"]).items()}
    for text, ids, names, decoded in expected["cases"]:
        assert gpt2.encode(text) == ids
        assert [tokens[number] for number in ids] == names
        assert gpt2.decode(ids) == decoded


@pytest.mark.parametrize(("kind", "key"), [("BertWordPieceLowerCase", "lower"), ("BertWordPieceCase", "cased")])
def test_wordpiece_ids_are_megatrons(golden: Path, recorded: dict[str, Any], kind: str, key: str) -> None:
    expected = recorded["wordpiece"]
    tokenizer = load_tokenizer(kind, vocab_file=str(golden / "bert-vocab.txt"))
    assert tokenizer.vocab_size == expected["vocab_size"]
    for role in ("cls", "sep", "mask", "pad"):
        assert tokenizer.role(role) == expected[role]
    for text, ids, _ in expected[key]:
        assert tokenizer.encode(text) == ids


def test_extra_ids_stand_where_megatron_puts_them(golden: Path, recorded: dict[str, Any]) -> None:
    expected = recorded["wordpiece"]["with_3_extra_ids"]
    tokenizer = load_tokenizer("BertWordPieceCase", vocab_file=str(golden / "bert-vocab.txt"), vocab_extra_ids=3)
    assert tokenizer.vocab_size == expected["vocab_size"]
    assert list(tokenizer.extra_ids) == expected["ids"]
    assert (tokenizer.bos, tokenizer.eos) == (expected["bos"], expected["eos"])


def test_vocabularies_are_padded_like_megatrons(recorded: dict[str, Any]) -> None:
    for size, multiple, tensor_parallel, padded in recorded["vocab_padding"]:
        assert padded_vocab_size(size, multiple, tensor_parallel) == padded
