"""Text in, text out: prompts, streams and what a terminal must not obey."""

import io

import pytest
import torch

from megalith.data.tokenizer import load_tokenizer
from megalith.evaluate.generate import Sampling
from megalith.evaluate.loss import stream_loss, unigram_entropy
from megalith.evaluate.talk import continuations, prompt_ids, shown, stream_text
from megalith.layers.initial import draw_weights
from megalith.models.decoder import Decoder
from megalith.models.settings import ModelConfig

TOKENIZER = load_tokenizer("ByteLevelTokenizer")
CONFIG = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=32)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model() -> Decoder:
    decoder = Decoder(CONFIG, 264)
    draw_weights(decoder, 5)
    return decoder


def test_a_stream_is_the_prompt_and_the_continuation_that_a_batch_gives(model: Decoder) -> None:
    stream = io.StringIO()
    assert not stream_text(model, TOKENIZER, "ab", max_new_tokens=8, sampling=GREEDY, stream=stream)
    made = continuations(model, TOKENIZER, ["ab", "a longer prompt"], max_new_tokens=8, sampling=GREEDY)
    assert stream.getvalue() == "ab" + shown(made[0].text) + "\n"


def test_a_continuation_that_fills_the_model_is_known_to_be_cut(model: Decoder) -> None:
    for asked, cut in ((29, False), (30, False), (31, True), (5000, True)):
        stream = io.StringIO()
        assert stream_text(model, TOKENIZER, "ab", max_new_tokens=asked, sampling=GREEDY, stream=stream) is cut
        made = continuations(model, TOKENIZER, ["ab", "c"], max_new_tokens=asked, sampling=GREEDY)
        assert [one.is_cut for one in made] == [cut, asked > 31]


def test_a_prompt_that_the_model_cannot_hold_is_refused_before_it_is_shown(model: Decoder) -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match=r"prompt 1 has 32 tokens: the model can hold 32 .*shorten it to 31"):
        stream_text(model, TOKENIZER, "x" * 32, max_new_tokens=1, sampling=GREEDY, stream=stream)
    assert stream.getvalue() == ""


def test_an_empty_prompt_begins_a_new_document() -> None:
    assert prompt_ids(TOKENIZER, "") == [TOKENIZER.eod]


def test_control_characters_are_shown_and_not_sent() -> None:
    assert shown("a\x1b[2J\tb\n\x07") == "a\\x1b[2J\tb\n\\x07"


@pytest.mark.parametrize("length", [2, 9, 16, 17, 40, 65])
def test_stream_loss_predicts_every_token_but_the_first_once(model: Decoder, length: int) -> None:
    tokens = (torch.arange(length) * 37 % 256).numpy()
    loss = stream_loss(model, tokens, window=8, windows_at_once=2)
    expected, count = 0.0, 0
    for first in range(0, length - 1, 8):
        window = torch.from_numpy(tokens[first : first + 9])[None]
        positions = torch.arange(window.shape[1] - 1)[None]
        with torch.no_grad():
            logits = model(window[:, :-1], positions)[0]
        expected += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    assert loss.count == count == length - 1
    assert loss.total == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="has none to predict"):
        stream_loss(model, tokens[:1], window=8)


def test_unigram_entropy_of_equal_frequencies_is_their_logarithm() -> None:
    tokens = torch.arange(8).repeat(5).numpy()
    assert unigram_entropy(tokens) == pytest.approx(torch.tensor(8.0).log().item())
