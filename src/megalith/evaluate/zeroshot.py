"""What a language model knows without being trained for it: perplexity per word, and the last word of a passage.

WikiText-style files (Merity et al. 2016, arXiv:1609.07843) are one text whose tokenization is undone first;
LAMBADA-style files (Paperno et al. 2016, arXiv:1606.06031) are JSON lines, each a passage whose last word is to be
told. Windows, counts and figures are those of Megatron-LM's zero-shot tasks.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megalith.evaluate.loss import StreamLoss
from megalith.models.decoder import Decoder

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class TextFigures:
    """Loss over a text, per token of the model and per word of the text."""

    loss: StreamLoss
    num_words: int  # of the text as it was given, parted by blanks

    @property
    def token_ratio(self) -> float:
        """Predicted tokens per predicted word."""
        return self.loss.count / (self.num_words - 1)

    @property
    def adjusted_perplexity(self) -> float:
        """Per word of the text as it was given, so that models with other tokenizers compare; capped likewise."""
        return math.exp(min(20.0, self.loss.mean * self.token_ratio))


@torch.no_grad()
def overlapping_loss(
    model: Decoder, tokens: NDArray[np.int64], *, window: int, stride: int, windows_at_once: int = 8
) -> StreamLoss:
    """The loss over a stream in windows that overlap: each token but the first is predicted once.

    The first window counts whole; each next one begins stride tokens later and counts its last stride tokens, which
    have window - stride tokens before them at least. Raises ValueError for a stream of fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"a stream of {len(tokens)} tokens has none to predict; give at least two")
    device = next(model.parameters()).device
    model.eval()
    count = len(tokens) - 1
    total = 0.0
    starts = [0, *range(stride, stride + max(0, count - window), stride)]
    # All but the last are as long as the window.
    whole = [start for start in starts if start + window <= count]
    groups = [whole[at : at + windows_at_once] for at in range(0, len(whole), windows_at_once)]
    for group in [*groups, *([start] for start in starts if start + window > count)]:
        pieces = torch.from_numpy(np.stack([tokens[start : start + window + 1] for start in group])).to(device)
        inputs, labels = pieces[:, :-1], pieces[:, 1:]
        positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
        losses = model.token_losses(model.hidden(model.stream(inputs, positions)), labels).double()
        for start, of_window in zip(group, losses, strict=True):
            total += of_window[0 if start == 0 else window - stride :].sum().item()
    return StreamLoss(total, count)


@dataclass(frozen=True)
class Cloze:
    """A passage, and the tokens that are to be told."""

    context: tuple[int, ...]
    answer: tuple[int, ...]


def cloze_of(text: str, encode: Encode, *, whole_word: bool) -> Cloze:
    """The passage without its end: its last token, or all tokens of its last word.

    Raises ValueError for a text of one word or token.
    """
    if whole_word:
        words = text.split()
        if len(words) < 2:
            raise ValueError("has fewer than two words")
        last = words[-1]
        cloze = Cloze(tuple(encode(text[: text.rindex(last)].strip())), tuple(encode(" " + last)))
    else:
        tokens = tuple(encode(text))
        cloze = Cloze(tokens[:-1], tokens[-1:])
    if not cloze.context:
        raise ValueError("has nothing before the word that is to be told")
    return cloze


@torch.no_grad()
def count_right(model: Decoder, passages: Sequence[Cloze], *, window: int, at_once: int = 8) -> int:
    """Of how many passages the model's likeliest token is right at every place of the answer."""
    device = next(model.parameters()).device
    model.eval()
    right = 0
    for first in range(0, len(passages), at_once):
        some = passages[first : first + at_once]
        rows = [(passage.context + passage.answer)[-(window + 1) :] for passage in some]
        longest = max(len(row) for row in rows) - 1
        # What stands after a passage's end is not seen by what stands before.
        inputs = torch.tensor([[*row[:-1], *[0] * (longest - len(row) + 1)] for row in rows], device=device)
        positions = torch.arange(longest, device=device).expand_as(inputs)
        likeliest = model(inputs, positions).argmax(-1).tolist()
        for row, passage, found in zip(rows, some, likeliest, strict=True):
            place, length = len(row) - 1, len(passage.answer)
            right += found[place - length : place] == list(passage.answer)
    return right


# Files of these two corpora have white space around marks, and signs for what was inside words. What is undone, and in
# which order, is as Megatron-LM has it, for its figures to be comparable.
_WIKITEXT = (
    # Marks inside numbers and words stand between at signs.
    (r" @([-,.])@ ", r"\1"),
    # No blank before a mark; one after it stays, unless the next mark takes it. Each mark has its turn, in this order.
    *((rf" \{mark} ", f"{mark} ") for mark in ":;.!?,"),
    # No blanks inside brackets and quotes.
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    # Headings of up to four signs.
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (f" {chr(176)} ", chr(176)),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)
_PENN = (
    (r" '", "'"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" n't", "n't"),
    (r" N ", "1 "),
    (r"\$ 1", "$1"),
    (r"# 1", "#1"),
)
FORMS = {"wikitext": (("s '", "s'"), *_WIKITEXT), "ptb": _PENN, "none": ()}


def form_of(path: str) -> str:
    """Which tokenization a file has, by its path with its folders, as Megatron-LM tells it: wikitext, ptb or none."""
    return next((form for form in ("ptb", "wikitext") if form in path.lower()), "none")


def detokenized(text: str, form: str) -> str:
    """The text with its tokenization undone as well as that can be done."""
    for pattern, instead in FORMS[form]:
        text = re.sub(pattern, instead, text)
    return text
