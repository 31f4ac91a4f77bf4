import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.evaluate.generate import Sampling, choose, generate, kept_tokens, stream_tokens
from megalith.layers.initial import draw_weights
from megalith.models.decoder import Decoder
from megalith.models.settings import ModelConfig

VOCABULARY = 30  # of the tokenizer; the table has 32 rows
GREEDY = Sampling(temperature=0)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 1, 4]]


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = ModelConfig(
        num_layers=3, hidden_size=16, num_attention_heads=4, max_position_embeddings=20, init_method_std=0.3
    )
    model = Decoder(config, 32)
    draw_weights(model, 1234)
    with torch.no_grad():
        # A fresh tied table favours the token that came in; noise makes continuations lively. Padding is likely, too.
        bias = model.get_parameter("final_norm.bias")
        bias.copy_(torch.randn(16, generator=torch.Generator().manual_seed(1)))
        model.word_embedding.weight[VOCABULARY:] = 3 * bias
    return model


def greedily_without_cache(model: Decoder, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None])
        tokens.append(int(logits[0, -1, :VOCABULARY].argmax()))
    return tokens[len(prompt) :]


def continuations(model: Decoder, prompts: list[list[int]], sampling: Sampling, *, new: int = 8) -> list[list[int]]:
    return generate(model, prompts, max_new_tokens=new, sampling=sampling, vocab_size=VOCABULARY)


def test_greedy_generation_with_the_cache_equals_recomputing_everything(model: Decoder) -> None:
    together = continuations(model, PROMPTS, GREEDY)
    assert together == [greedily_without_cache(model, prompt, 8) for prompt in PROMPTS]
    assert len({token for tokens in together for token in tokens}) > 3


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(temperature=1.5, top_k=9, top_p=0.9, seed=5)])
def test_a_continuation_does_not_depend_on_the_other_prompts_or_their_order(model: Decoder, sampling: Sampling) -> None:
    together = continuations(model, PROMPTS, sampling)
    assert continuations(model, PROMPTS[::-1], sampling) == together[::-1]
    for prompt, expected in zip(PROMPTS, together, strict=True):
        assert continuations(model, [prompt], sampling) == [expected]


def test_samples_repeat_with_their_seed_and_differ_between_seeds_and_equal_prompts(model: Decoder) -> None:
    first = continuations(model, [PROMPTS[0]] * 3, Sampling(seed=1))
    assert continuations(model, [PROMPTS[0]] * 3, Sampling(seed=1)) == first
    assert len({tuple(tokens) for tokens in first}) == 3
    assert continuations(model, [PROMPTS[0]], Sampling(seed=2))[0] not in first


def test_a_longer_continuation_begins_with_the_shorter(model: Decoder) -> None:
    assert [tokens[:4] for tokens in continuations(model, PROMPTS, Sampling())] == (
        continuations(model, PROMPTS, Sampling(), new=4)
    )


def test_ids_that_only_pad_the_table_are_never_chosen(model: Decoder) -> None:
    tokens = torch.tensor([PROMPTS[0]])
    # They would be: the model finds them the most likely.
    assert int(model(tokens, torch.arange(5)[None])[0, -1].argmax()) >= VOCABULARY
    for sampling in (GREEDY, Sampling(temperature=2.0)):
        chosen = continuations(model, [PROMPTS[0]] * 10, sampling)
        assert max(token for tokens in chosen for token in tokens) < VOCABULARY


def test_a_continuation_ends_before_the_end_of_document_and_the_others_go_on(model: Decoder) -> None:
    free = continuations(model, PROMPTS, Sampling())
    eod = free[1][3]
    ended = generate(model, PROMPTS, max_new_tokens=8, sampling=Sampling(), vocab_size=VOCABULARY, eod=eod)
    assert ended == [tokens[: tokens.index(eod)] if eod in tokens else tokens for tokens in free]
    assert len(ended[1]) <= 3


def test_a_continuation_ends_where_the_positions_do(model: Decoder) -> None:
    lengths = [len(tokens) for tokens in continuations(model, PROMPTS, GREEDY, new=100)]
    assert lengths == [20 - len(prompt) for prompt in PROMPTS]


def test_tokens_come_one_by_one_as_they_are_made(model: Decoder) -> None:
    stream = stream_tokens(model, PROMPTS, max_new_tokens=8, sampling=GREEDY, vocab_size=VOCABULARY)
    calls = []
    handle = model.final_norm.register_forward_hook(lambda *_: calls.append(1))
    first = [next(stream) for _ in PROMPTS]
    assert [prompt for prompt, _ in first] == [0, 1, 2, 3]
    assert len(calls) == 1
    handle.remove()
    expected = continuations(model, PROMPTS, GREEDY)
    rest = list(stream)
    assert [[token for prompt, token in first + rest if prompt == number] for number in range(4)] == expected


def test_no_prompts_or_no_tokens_give_nothing(model: Decoder) -> None:
    assert continuations(model, [], GREEDY) == []
    assert continuations(model, PROMPTS, GREEDY, new=0) == [[], [], [], []]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 2 has no tokens"),
        ([1] * 20, "prompt 2 has 20 tokens: the model can hold 20 .*; shorten it to 19"),
        ([1, 30], "prompt 2 has token 30, but the vocabulary has ids 0 to 29"),
        ([-1], "prompt 2 has token -1"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(model: Decoder, prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        continuations(model, [[1], prompt], GREEDY)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("temperature", math.nan)]
)
def test_sampling_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} {value}"):
        replace(Sampling(), **{name: value})  # type: ignore[arg-type]


LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=20).map(torch.tensor)


@settings(deadline=None, max_examples=60)
@given(LOGITS, st.integers(1, 25))
def test_top_k_keeps_the_k_most_likely_tokens(logits: torch.Tensor, top_k: int) -> None:
    ids, p = kept_tokens(logits, Sampling(top_k=top_k))
    assert len(set(ids.tolist())) == min(top_k, len(logits))
    rest = [i for i in range(len(logits)) if i not in ids.tolist()]
    assert not rest or float(logits[rest].max()) <= float(logits[ids].min())
    assert float(p.sum()) == pytest.approx(1)


@settings(deadline=None, max_examples=60)
@given(LOGITS, st.floats(0.01, 1))
def test_top_p_keeps_the_fewest_tokens_that_reach_it(logits: torch.Tensor, top_p: float) -> None:
    ids, p = kept_tokens(logits, Sampling(top_p=top_p))
    torch.testing.assert_close(p, torch.softmax(logits.double(), 0)[ids])
    assert float(p.sum()) >= top_p - 1e-12
    assert len(p) == 1 or float(p[:-1].sum()) < top_p + 1e-12


def test_top_k_comes_before_top_p() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    ids, p = kept_tokens(logits, Sampling(top_k=2, top_p=0.5))
    # Of 4/7 and 3/7 the first reaches one half alone; without top_k it would take two.
    assert ids.tolist() == [0]
    assert p.tolist() == pytest.approx([4 / 7])
    assert kept_tokens(logits, Sampling(top_p=0.5))[0].tolist() == [0, 1]


@settings(deadline=None, max_examples=60)
@given(LOGITS, st.floats(1e-6, 1 - 1e-6))
def test_one_likely_token_is_what_no_temperature_top_k_1_and_a_tiny_top_p_choose(
    logits: torch.Tensor, uniform: float
) -> None:
    best = int(logits.argmax())
    for sampling in (GREEDY, Sampling(top_k=1), Sampling(top_p=1e-9)):
        assert choose(logits, sampling, uniform) == best


def test_tokens_are_chosen_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    draws = (torch.arange(2000) + 0.5) / 2000
    counts = torch.zeros(4)
    for uniform in draws.tolist():
        counts[choose(logits, Sampling(), uniform)] += 1
    torch.testing.assert_close(counts / 2000, logits.exp(), rtol=0, atol=1e-3)
    # A higher temperature makes them more alike: probabilities to the power 1 / temperature.
    hot = torch.zeros(4)
    for uniform in draws.tolist():
        hot[choose(logits, Sampling(temperature=2.0), uniform)] += 1
    expected = logits.exp().sqrt() / logits.exp().sqrt().sum()
    torch.testing.assert_close(hot / 2000, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_generate(model: Decoder, dtype: torch.dtype) -> None:
    narrow = Decoder(model.config, 32, dtype=dtype)
    narrow.load_state_dict(model.state_dict())
    tokens = continuations(narrow, PROMPTS, Sampling())
    assert [len(each) for each in tokens] == [8, 8, 8, 8]
    assert narrow(torch.tensor([[1]]), torch.tensor([[0]])).dtype == dtype
