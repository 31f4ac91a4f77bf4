"""A trained model continues prompts: what `megalith generate` prints, and the sample at a run's end."""

import sys
from collections.abc import Sequence
from typing import TextIO

from megalith.data.tokenizer import TextStream, Tokenizer
from megalith.evaluate.generate import Sampling, generate, stream_tokens
from megalith.models.decoder import Decoder


def continuations(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], *, max_new_tokens: int, sampling: Sampling
) -> list[str]:
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
    return [tokenizer.decode(tokens) for tokens in made]


def stream_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stream: TextIO = sys.stdout,
) -> None:
    """Write a prompt and what follows it, token by token as it is made."""
    text = TextStream(tokenizer)
    stream.write(shown(prompt))
    model.eval()
    for _, token in stream_tokens(
        model,
        [prompt_ids(tokenizer, prompt)],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        vocab_size=tokenizer.vocab_size,
        eod=eod_of(tokenizer),
    ):
        stream.write(shown(text.push(token)))
        stream.flush()
    stream.write(shown(text.finish()) + "\n")
    stream.flush()


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
