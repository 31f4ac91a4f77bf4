"""Sentence maps and masked samples are Megatron-LM's, number by number."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalith.data import sentence_maps
from megalith.data.block_maps import build_block_map
from megalith.data.masking import Pieces, SpanRule, choose_spans, random_of
from megalith.data.pairs import PairRule, make_pair
from megalith.data.sentence_maps import SentencePlan, build_sentence_map

FOLDER = Path(__file__).parent / "data"
RECORDED = json.loads((FOLDER / "sentence_mappings.json").read_text())
SAMPLES = json.loads((FOLDER / "masked_lm_samples.json").read_text())
CLS, SEP, MASK, PAD, BOS, EOS = 2, 3, 4, 0, 5, 6
VOCABULARY = 200
SENTINELS = range(150, 200)


@pytest.mark.parametrize("case", RECORDED["build_mapping"], ids=lambda case: f"{case['max_seq_length']}-{case['seed']}")
def test_maps_are_bit_identical(case: dict[str, Any]) -> None:
    rows = build_sentence_map(
        np.array(RECORDED["doc_idx"], np.int64),
        np.array(RECORDED["sentence_sizes"], np.int32),
        # Where a number of passes was given instead, they end with this very sample.
        num_samples=min(case["max_num_samples"], case["shape"][0]),
        plan=SentencePlan(case["max_seq_length"], case["min_num_sent"], case["short_seq_prob"], case["seed"]),
    )
    assert rows.dtype == case["dtype"] and list(rows.shape) == case["shape"]
    assert rows[:20].tolist() == case["first20"] and rows[-20:].tolist() == case["last20"]
    assert hashlib.sha256(rows.tobytes()).hexdigest() == case["sha256"]


def test_a_map_of_a_later_part_in_small_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    index, lengths = np.array(RECORDED["doc_idx"], np.int64), np.array(RECORDED["sentence_sizes"], np.int32)
    plan = SentencePlan(60, 2, 0.3, 7)
    whole = build_sentence_map(index, lengths, num_samples=100, plan=plan)
    monkeypatch.setattr(sentence_maps, "BLOCK", 7)
    later = build_sentence_map(index + 5, np.append(np.full(5, 9, np.int32), lengths), num_samples=100, plan=plan)
    assert (later == whole + np.array([5, 5, 0], np.uint32)).all()


@pytest.mark.parametrize(
    "case", RECORDED["build_blocks_mapping"], ids=lambda case: f"{case['max_seq_length']}-{case['use_one_sent']}"
)
def test_block_maps_are_bit_identical(case: dict[str, Any]) -> None:
    rows = build_block_map(
        np.array(RECORDED["doc_idx"], np.int64),
        np.array(RECORDED["sentence_sizes"], np.int32),
        np.array(RECORDED["title_sizes"], np.int32),
        # Where one pass was asked for instead, it ends with this very block.
        num_samples=min(case["max_num_samples"], case["shape"][0]),
        longest=case["max_seq_length"],
        least=1 if case["use_one_sent"] else 2,
        seed=case["seed"],
    )
    assert rows.dtype == case["dtype"] and list(rows.shape) == case["shape"]
    assert rows[:20].tolist() == case["first20"] and rows[-20:].tolist() == case["last20"]
    assert hashlib.sha256(rows.tobytes()).hexdigest() == case["sha256"]


def pieces() -> Pieces:
    """The rule by which the vocabulary of the recorded samples was made."""
    ids = np.arange(VOCABULARY)
    return Pieces(VOCABULARY, ~((ids > 10) & (ids % 5 == 0)), np.isin(ids, [CLS, SEP]))


@pytest.mark.parametrize("case", SAMPLES["bert"], ids=lambda case: f"seed{case['rng_seed']}")
def test_samples_of_bert_are_identical(case: dict[str, Any]) -> None:
    rule = PairRule(
        case["max_seq_length"], pieces(), CLS, SEP, MASK, PAD, SpanRule(case["masked_lm_prob"]), case["binary_head"]
    )
    sentences = [np.array(sentence, np.uint16) for sentence in case["sentences"]]
    made = make_pair(sentences, case["target_seq_length"], rule, random_of(case["rng_seed"], 0))
    expected = case["sample"]
    assert made.tokens.tolist() == expected["text"]
    assert made.types.tolist() == expected["types"]
    assert made.labels.tolist() == expected["labels"]
    assert made.swapped == bool(expected["is_random"])
    assert made.num_tokens == sum(expected["padding_mask"])
    assert (made.labels >= 0).astype(int).tolist() == expected["loss_mask"]


@pytest.mark.parametrize("case", SAMPLES["t5"], ids=lambda case: f"seed{case['rng_seed']}")
def test_spans_of_t5_are_identical(case: dict[str, Any]) -> None:
    target = case["target_seq_length"]
    tokens = np.concatenate(case["sentences"])[:target]
    rule = SpanRule(case["masked_lm_prob"], longest=10, geometric=True)
    spans = list(choose_spans(tokens, pieces(), rule, rule.share * target, random_of(case["rng_seed"], 0)))
    encoder: list[int] = []
    decoder: list[int] = [BOS]
    begin = 0
    for sentinel, span in zip(SENTINELS, sorted(spans, key=lambda places: int(places[0])), strict=False):
        assert span.tolist() == list(range(span[0], span[-1] + 1))
        encoder += [*tokens[begin : span[0]].tolist(), sentinel]
        decoder += [sentinel, *tokens[span].tolist()]
        begin = int(span[-1]) + 1
    encoder += tokens[begin:].tolist()
    expected = case["sample"]
    assert encoder == expected["text_enc"][: len(encoder)] and not any(expected["text_enc"][len(encoder) :])
    assert decoder == expected["text_dec"][: len(decoder)] and not any(expected["text_dec"][len(decoder) :])
