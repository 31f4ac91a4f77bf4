"""A trained model continues prompts: what `megalith generate` prints, and the sample at a run's end."""

import sys
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from megalith.data.tokenizer import TextStream, Tokenizer
from megalith.evaluate.generate import Sampling, check_prompts, generate, stream_tokens, tokens_held
from megalith.models.decoder import Decoder


class Continuation(NamedTuple):
    """What follows a prompt. is_cut: fewer tokens than were asked for, because the model can hold no more."""

    text: str
    is_cut: bool


def continuations(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], *, max_new_tokens: int, sampling: Sampling
) -> list[Continuation]:
    """The text that follows each prompt. An empty prompt begins a new document."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    model.eval()
    made = generate(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        vocab_size=tokenizer.vocab_size,
        eod=eod_of(tokenizer),
    )
    return [
        Continuation(tokenizer.decode(tokens), _is_cut(model, len(prompt), len(tokens), max_new_tokens))
        for prompt, tokens in zip(ids, made, strict=True)
    ]


def stream_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stream: TextIO = sys.stdout,
) -> bool:
    """Write a prompt and what follows it, token by token as it is made; give whether that is cut (`Continuation`).

    Raises ValueError, before anything is written, for a prompt that the model cannot hold.
    """
    text, ids, made = TextStream(tokenizer), prompt_ids(tokenizer, prompt), 0
    check_prompts([ids], tokens_held(model), tokenizer.vocab_size)
    stream.write(shown(prompt))
    model.eval()
    for _, token in stream_tokens(
        model,
        [ids],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        vocab_size=tokenizer.vocab_size,
        eod=eod_of(tokenizer),
    ):
        made += 1
        stream.write(shown(text.push(token)))
        stream.flush()
    stream.write(shown(text.finish()) + "\n")
    stream.flush()
    return _is_cut(model, len(ids), made, max_new_tokens)


def _is_cut(model: Decoder, num_prompt: int, num_made: int, max_new_tokens: int) -> bool:
    return num_made < max_new_tokens and num_prompt + num_made == tokens_held(model)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt; of an empty one, the token that ends the document before."""
    ids = tokenizer.encode(prompt)
    if ids:
        return ids
    eod = eod_of(tokenizer)
    if eod is None:
        raise ValueError("--prompt: is empty, and the tokenizer has no end-of-document token to begin with. Give one.")
    return [eod]


def eod_of(tokenizer: Tokenizer) -> int | None:
    return tokenizer.roles.get("eod")


def shown(text: str) -> str:
    """Text with its line breaks and tabs, and every other control character made visible: a terminal obeys none."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
