"""Text from a decoder: token by token, several prompts at once, each as if it were alone.

Every random number is a hash of the seed, the prompt and the place of the token. So a continuation does not depend on
the other prompts of the call or their order, and the same call gives the same text again. (Rounding may differ with the
number of prompts, since matrix products are then cut differently; that decides only between equally likely tokens.)

Shape letters: B prompts still running, T token, V vocabulary (padded).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalith.layers.cache import KeyValueCache
from megalith.layers.random import key, uniform_at
from megalith.models.decoder import Decoder
from megalith.models.shape import shape_of


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: logits are divided by it; 0 always takes the most likely token. top_k: only so many of the most likely
    tokens; 0 for all. top_p: only the most likely tokens that together reach this probability (nucleus sampling,
    Holtzman et al. 2020); 1 for all. With both, top_k is applied first.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(
                f"temperature {self.temperature} is not 0 or above: use 0 for the most likely token, 1 for the model"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is below 0: use 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]: use 1 for all tokens")


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    vocab_size: int,
    eod: int | None = None,
) -> list[list[int]]:
    """The continuation of every prompt; see `stream_tokens`."""
    continuations: list[list[int]] = [[] for _ in prompts]
    for prompt, token in stream_tokens(
        model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, vocab_size=vocab_size, eod=eod
    ):
        continuations[prompt].append(token)
    return continuations


@torch.no_grad()
def stream_tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    vocab_size: int,
    eod: int | None = None,
) -> Iterator[tuple[int, int]]:
    """Pairs of a prompt's number and its next token, as they are made.

    A continuation ends before the end-of-document token, after max_new_tokens, or when prompt and continuation fill the
    model's max_position_embeddings, whichever comes first. vocab_size: the tokenizer's; ids that only pad the model's
    table are never chosen. Raises ValueError for a prompt that is empty, too long, or has ids beyond vocab_size.
    """
    num_positions = tokens_held(model)
    device = model.word_embedding.weight.device
    check_prompts(prompts, num_positions, vocab_size)
    wheres = _prompt_keys(prompts, sampling.seed)
    capacity = min(num_positions, max(map(len, prompts), default=0) + max_new_tokens)
    cache = KeyValueCache(len(prompts), capacity, device=device)
    running = list(range(len(prompts)))
    places = [len(prompt) for prompt in prompts]
    new = _padded(prompts, device)
    counts = list(places)
    for made in range(max_new_tokens):
        if not running:
            return
        positions = (cache.lengths_B[:, None] + torch.arange(new.shape[1], device=device)).clamp(max=num_positions - 1)
        logits_BV = _last_logits(model, new, positions, counts, cache)[:, :vocab_size]
        cache.advance(counts)
        tokens = [
            choose(logits_V, sampling, uniform_at(wheres[prompt], places[prompt]))
            for prompt, logits_V in zip(running, logits_BV.float().cpu(), strict=True)
        ]
        ended = set()
        for row, (prompt, token) in enumerate(zip(running, tokens, strict=True)):
            if token == eod:
                ended.add(row)
                continue
            yield prompt, token
            places[prompt] += 1
            if places[prompt] == num_positions or made + 1 == max_new_tokens:
                ended.add(row)
        stay = [row for row in range(len(running)) if row not in ended]
        if len(stay) < len(running):
            cache.keep(stay)
            running = [running[row] for row in stay]
        new = torch.tensor([[tokens[row]] for row in stay], dtype=torch.int64, device=device).view(-1, 1)
        counts = [1] * len(stay)


def tokens_held(model: Decoder) -> int:
    """How many tokens a model can hold, those of the prompt among them."""
    return shape_of(model.config).num_positions


def choose(logits_V: Tensor, sampling: Sampling, uniform: float) -> int:
    """One token id: the one at which the sum of probabilities, from the most likely down, first exceeds uniform.

    logits_V: fp32 on the CPU. uniform: in (0, 1). Of equal logits the smaller id counts as the more likely.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    ids, p = kept_tokens(logits_V, sampling)
    place = int(torch.searchsorted(p.cumsum(0), uniform * float(p.sum()), right=True))
    return int(ids[min(place, len(ids) - 1)])


def kept_tokens(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Ids that may be sampled, most likely first, and their probabilities (float64, not divided by their sum)."""
    logits, ids = (logits_V.double() / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        logits, ids = logits[: sampling.top_k], ids[: sampling.top_k]
    p = torch.softmax(logits, 0)
    # A token stays if those before it do not reach top_p: so the first always stays.
    num_kept = int((p.cumsum(0) - p < sampling.top_p).sum())
    return ids[:num_kept], p[:num_kept]


def _last_logits(model: Decoder, tokens: Tensor, positions: Tensor, counts: list[int], cache: KeyValueCache) -> Tensor:
    """BV: the logits after each row's last real token; the other places are never projected to the vocabulary."""
    x_BTD = model.stream(tokens, positions, cache=cache)
    last_B = torch.tensor(counts, device=tokens.device) - 1
    x_B1D = x_BTD[torch.arange(len(counts), device=tokens.device), last_B][:, None]
    return model.token_scores(model.hidden(x_B1D))[:, 0]


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 BT: the prompts, filled up behind with 0, which no real token ever sees."""
    length = max(map(len, prompts), default=0)
    rows = [list(prompt) + [0] * (length - len(prompt)) for prompt in prompts]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), length)


def _prompt_keys(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """A key per prompt, from its tokens and, where a prompt is given several times, which of these it is."""
    seen: Counter[tuple[int, ...]] = Counter()
    wheres = []
    for prompt in prompts:
        tokens = tuple(prompt)
        wheres.append(key(seed, "sample", seen[tokens], *tokens))
        seen[tokens] += 1
    return wheres


def check_prompts(prompts: Sequence[Sequence[int]], num_positions: int, vocab_size: int) -> None:
    """Raise ValueError for a prompt, counted from 1, that is empty, too long, or has ids beyond vocab_size."""
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(
                f"prompt {number} has no tokens: begin with at least one, the end-of-document token will do"
            )
        if len(prompt) >= num_positions:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens: the model can hold {num_positions} "
                f"(max_position_embeddings), with a new one at least; shorten it to {num_positions - 1}"
            )
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(f"prompt {number} has token {wrong[0]}, but the vocabulary has ids 0 to {vocab_size - 1}")
