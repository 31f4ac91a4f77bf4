"""Text from a model that lies on many ranks, whatever its layout: all ranks compute each token together.

Without a key-value cache: every token costs a forward pass over the window. That is enough for a sample at a run's end;
`megalith generate` continues text from the checkpoint of any layout in one process, with a cache.

Shape letters: T tokens of the window, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalith.evaluate.generate import Sampling, choose
from megalith.layers.random import key, uniform_at
from megalith.parallel.context import cut_tokens, in_natural_order
from megalith.parallel.mesh import Groups, Layout


@torch.no_grad()
def continue_together(
    parts: Mapping[int, nn.Module],
    layout: Layout,
    groups: Groups,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    window: int,
    stream: tuple[int, torch.dtype],
    sampling: Sampling,
    vocab_size: int,
    eod: int | None,
    device: torch.device,
) -> list[int]:
    """The continuation of a prompt, the same on every rank; all ranks call it alike.

    parts: those held here, by number. window: tokens that the model sees, the training's sequence length. stream: width
    and type of what travels between parts. It ends before eod, after max_new_tokens, or when the window is full.
    """
    tokens = list(prompt)
    where = key(sampling.seed, "sample", 0, *tokens)
    while len(tokens) < min(window, len(prompt) + max_new_tokens):
        logits_V = next_logits(parts, layout, groups, tokens, window=window, stream=stream, device=device)
        token = choose(logits_V[:vocab_size].float().cpu(), sampling, uniform_at(where, len(tokens)))
        if token == eod:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def next_logits(
    parts: Mapping[int, nn.Module],
    layout: Layout,
    groups: Groups,
    tokens: Sequence[int],
    *,
    window: int,
    stream: tuple[int, torch.dtype],
    device: torch.device,
) -> Tensor:
    """V: the scores of the token that follows, on every rank. Behind the tokens the window is filled up, unseen."""
    filled = torch.zeros(1, window, dtype=torch.int64, device=device)
    filled[0, : len(tokens)] = torch.tensor(tokens, device=device)
    whole = {"tokens": filled, "positions": torch.arange(window, device=device)[None]}
    batch = cut_tokens(whole, groups.context)
    leaving = batch["tokens"]
    num_parts = layout.pipeline * len(parts)
    along = layout.ranks_along("pipeline")
    for number in range(num_parts):
        here, after = along[number % layout.pipeline], along[(number + 1) % layout.pipeline]
        if number in parts:
            leaving = parts[number](leaving, batch["positions"])
        if number + 1 < num_parts and here != after:
            leaving = _pass_on(leaving, here, after, layout, batch["tokens"].shape[1], stream)
    last = along[(num_parts - 1) % layout.pipeline]
    logits = _from_last(leaving if layout.rank == last else None, last, layout, groups, device)
    return in_natural_order(logits, 1, groups.context)[0, len(tokens) - 1]


def _pass_on(
    leaving: Tensor, here: int, after: int, layout: Layout, num_tokens: int, stream: tuple[int, torch.dtype]
) -> Tensor:
    """Send the stream to the stage of the next part; there it arrives, elsewhere nothing happens."""
    if layout.rank == here:
        # Under sequence parallelism a rank holds some of the tokens; the receiver is told how many.
        dist.send(torch.tensor([leaving.shape[1]], device=leaving.device), after)
        dist.send(leaving.contiguous(), after)
    if layout.rank == after:
        held = torch.zeros(1, dtype=torch.int64, device=leaving.device)
        dist.recv(held, here)
        assert 0 < int(held) <= num_tokens
        leaving = torch.empty(1, int(held), stream[0], dtype=stream[1], device=leaving.device)
        dist.recv(leaving, here)
    return leaving


def _from_last(logits: Tensor | None, last: int, layout: Layout, groups: Groups, device: torch.device) -> Tensor:
    """The last stage's logits, on every stage."""
    if groups.pipeline is None:
        assert logits is not None
        return logits
    shape = torch.tensor(logits.shape if logits is not None else (0, 0, 0), device=device)
    dist.broadcast(shape, last, group=groups.pipeline)
    sent = logits.float().contiguous() if logits is not None else torch.empty(*shape.tolist(), device=device)
    dist.broadcast(sent, last, group=groups.pipeline)
    return sent
