"""Perplexity per word and last words: every token once with enough before it, greedy answers, files told by line."""

import math

import numpy as np
import pytest
import torch

from megalith.data.tokenizer import load_tokenizer
from megalith.evaluate.loss import StreamLoss, stream_loss
from megalith.evaluate.zeroshot import (
    Cloze,
    TextFigures,
    cloze_of,
    count_right,
    detokenized,
    form_of,
    overlapping_loss,
)
from megalith.layers.initial import draw_weights
from megalith.models.decoder import Decoder
from megalith.models.settings import ModelConfig

TOKENIZER = load_tokenizer("ByteLevelTokenizer")
CONFIG = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=32)


@pytest.fixture(scope="module")
def model() -> Decoder:
    decoder = Decoder(CONFIG, 264)
    draw_weights(decoder, 5)
    return decoder


@pytest.mark.parametrize("length", [2, 8, 9, 10, 13, 30, 41])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_each_token_is_predicted_once_from_all_that_its_window_holds(model: Decoder, length: int, stride: int) -> None:
    window = 8
    tokens = np.random.RandomState(1).randint(0, 256, length)
    found = overlapping_loss(model, tokens, window=window, stride=stride, windows_at_once=3)
    expected = 0.0
    for target in range(1, length):
        # The first window that holds the target as one of those that it counts.
        start = 0 if target <= window else -(-(target - window) // stride) * stride
        seen = torch.from_numpy(tokens[start:target])[None]
        with torch.no_grad():
            logits = model(seen, torch.arange(seen.shape[1])[None])[0, -1]
        expected += torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[target])).item()
    assert found.count == length - 1
    assert found.total == pytest.approx(expected, rel=1e-5)


def test_windows_that_do_not_overlap_give_the_plain_loss(model: Decoder) -> None:
    tokens = np.random.RandomState(2).randint(0, 256, 50)
    assert overlapping_loss(model, tokens, window=8, stride=8).total == pytest.approx(
        stream_loss(model, tokens, window=8).total, rel=1e-6
    )


def test_perplexity_is_what_a_token_costs_and_ends_at_that_of_20_nats() -> None:
    assert StreamLoss(total=3 * math.log(7), count=3).perplexity == pytest.approx(7)
    assert StreamLoss(total=63.0, count=3).perplexity == math.exp(20)


def test_perplexity_per_word_is_what_a_word_costs() -> None:
    figures = TextFigures(StreamLoss(total=60.0, count=30), num_words=13)
    assert figures.token_ratio == 30 / 12
    assert figures.adjusted_perplexity == pytest.approx(math.exp(60.0 / 12))


def test_the_last_word_or_the_last_token_is_asked_for() -> None:
    encode = TOKENIZER.encode
    text = "he ate an apple"
    assert cloze_of(text, encode, whole_word=True) == Cloze(tuple(b"he ate an"), tuple(b" apple"))
    assert cloze_of(text, encode, whole_word=False) == Cloze(tuple(b"he ate an appl"), (ord("e"),))
    with pytest.raises(ValueError, match="fewer than two words"):
        cloze_of("apple ", encode, whole_word=True)


def test_an_answer_is_right_if_every_token_of_it_is_the_likeliest(model: Decoder) -> None:
    passages = []
    for text in (
        "a passage",
        "another one that is longer",
        "x",
        "a passage that is longer than the window of the model",
    ):
        context = list(text.encode())
        # Of a passage that is too long the end stays; the answer pushes out as many tokens as it has but one.
        begin = max(0, len(context) + 2 - 31)
        for _ in range(3):
            seen = torch.tensor([context[begin:]])
            context.append(int(model(seen, torch.arange(seen.shape[1])[None])[0, -1].argmax()))
        passages.append(Cloze(tuple(context[:-3]), tuple(context[-3:])))
    assert count_right(model, passages, window=31, at_once=2) == 4
    wrong = [Cloze(p.context, (*p.answer[:2], (p.answer[2] + 1) % 256)) for p in passages]
    assert count_right(model, [*passages, *wrong], window=31, at_once=3) == 4


@pytest.mark.parametrize(
    ("form", "written", "meant"),
    [
        ("wikitext", "a 10 @-@ year , 1 @,@ 000 @.@ 5 km", "a 10-year, 1,000.5 km"),
        ("wikitext", 'the " big " ( and small ) dogs \' bones', 'the "big" (and small) dogs\' bones'),
        ("wikitext", " \n = = Name = = \n It 's here . \n", "\n== Name ==\nIt's here.\n"),
        ("wikitext", "Acme Inc . , which ? ! he : . y", "Acme Inc., which ?! he:. y"),
        ("ptb", "it 's N $ N", "it's1 $ N"),
        ("none", "as it 's , \n", "as it 's , \n"),
    ],
)
def test_tokenization_is_undone(form: str, written: str, meant: str) -> None:
    assert detokenized(written, form) == meant


def test_the_form_is_told_by_the_path() -> None:
    paths = ("wikitext-103.tokens", "wikitext-103/wiki.test.tokens", "ptb.valid.txt", "book.txt")
    assert [form_of(path) for path in paths] == ["wikitext", "wikitext", "ptb", "none"]
