"""T5's samples and what their tokens see are Megatron-LM's, number by number."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megalith.data.masking import SpanRule, random_of
from megalith.data.spans import SpanCutRule, SpanSample, cut_spans
from megalith.layers.mask import make_mask
from tests.golden.test_sentence_maps import BOS, EOS, PAD, SENTINELS, pieces

CASES = json.loads((Path(__file__).parent / "data" / "masked_lm_samples.json").read_text())["t5"]


def rule_of(case: dict[str, Any], **changes: Any) -> SpanCutRule:
    settings: dict[str, Any] = {
        "encoder_length": case["max_seq_length"],
        "decoder_length": case["max_seq_length_dec"],
        "pieces": pieces(),
        "bos": BOS,
        "eos": EOS,
        "pad": PAD,
        "sentinels": SENTINELS,
        "masking": SpanRule(case["masked_lm_prob"], longest=10, geometric=True),
    }
    return SpanCutRule(**(settings | changes))


def made(case: dict[str, Any], **changes: Any) -> SpanSample:
    sentences = [np.array(sentence, np.uint16) for sentence in case["sentences"]]
    return cut_spans(sentences, case["target_seq_length"], rule_of(case, **changes), random_of(case["rng_seed"], 0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['rng_seed']}")
def test_samples_are_identical(case: dict[str, Any]) -> None:
    sample, expected = made(case), case["sample"]
    assert sample.encoder.tolist() == expected["text_enc"]
    assert sample.decoder.tolist() == expected["text_dec"]
    assert sample.labels.tolist() == expected["labels"]
    assert (sample.labels >= 0).astype(int).tolist() == expected["loss_mask"]


def outer(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """What Megatron-LM lets tokens see: both the one that looks and the one that is seen are no padding."""
    return (rows[:, None] >= 1).astype(np.int64) * (columns[None, :] >= 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['rng_seed']}")
def test_real_tokens_see_what_they_see_in_megatron(case: dict[str, Any]) -> None:
    sample, expected = made(case), case["sample"]
    encoder, decoder = sample.encoder, sample.decoder
    causal = np.tril(np.ones((len(decoder), len(decoder)), np.int64))
    masks = {
        "enc_mask": outer(encoder, encoder),
        "dec_mask": outer(decoder, decoder) * causal,
        "enc_dec_mask": outer(decoder, encoder),
    }
    for name, mask in masks.items():
        assert list(mask.shape) == expected[name]["shape"]
        assert hashlib.sha256(mask.tobytes()).hexdigest() == expected[name]["sha256"]
    padding = torch.tensor(encoder == PAD).int()[None]
    for name, queries in (("enc_mask", encoder), ("enc_dec_mask", decoder)):
        documents = torch.zeros(1, len(queries), dtype=torch.int32)
        ours = make_mask(len(queries), causal=False, query_documents_BT=documents, key_documents_BS=padding)
        assert ours.visible is not None
        real = queries != PAD
        assert np.array_equal(ours.visible[0, 0].numpy()[real], masks[name][real])
    real = decoder != PAD
    assert np.array_equal(causal[real], masks["dec_mask"][real])


def test_spans_without_a_sentinel_or_room_stay_where_they_are() -> None:
    # Many short spans.
    case = {**CASES[0], "masked_lm_prob": 0.5}
    masking = SpanRule(0.5, longest=1, geometric=True)
    whole = made(case, masking=masking, decoder_length=64)
    used = [token for token in whole.decoder.tolist() if token in SENTINELS]
    assert len(used) > 4
    two = made(case, masking=masking, decoder_length=64, sentinels=SENTINELS[:2])
    assert [token for token in two.encoder.tolist() if token in SENTINELS] == list(SENTINELS[:2])
    short = made(case, masking=masking, decoder_length=8)
    assert len(short.decoder) == 8 and EOS in short.labels
    tokens = np.concatenate(case["sentences"])[: case["target_seq_length"]].tolist()
    for sample in (whole, two, short):
        assert refilled(sample) == tokens


@pytest.mark.parametrize("room", [2, 3, 9, 17, 25, 40])
def test_a_span_without_room_leaves_it_to_shorter_ones(room: int) -> None:
    case = {**CASES[1], "max_seq_length_dec": 64}
    masking = SpanRule(0.6, longest=4, geometric=True)
    expected, held = list[list[int]](), 1
    for span in spans_of(made(case, masking=masking)).values():
        if held + 1 + len(span) <= room:
            expected.append(span)
            held += 1 + len(span)
    assert list(spans_of(made(case, masking=masking, decoder_length=room)).values()) == expected


def spans_of(sample: SpanSample) -> dict[int, list[int]]:
    """What the decoder says of each sentinel."""
    spans: dict[int, list[int]] = {}
    for token in sample.decoder.tolist()[1:]:
        if token in SENTINELS:
            spans[token] = []
        elif token != PAD:
            spans[list(spans)[-1]].append(token)
    return spans


def refilled(sample: SpanSample) -> list[int]:
    """The text that a sample was made of: every sentinel replaced by what the decoder says of it."""
    spans = spans_of(sample)
    tokens: list[int] = []
    for token in sample.encoder.tolist():
        tokens += spans.get(token, [] if token == PAD else [token])
    return tokens
