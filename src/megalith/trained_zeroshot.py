"""What `megalith evaluate --task` asks of a trained GPT: perplexity per word of a text, or last words of passages."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalith.derived import sequence_length
from megalith.evaluate.zeroshot import (
    FORMS,
    Cloze,
    TextFigures,
    cloze_of,
    count_right,
    detokenized,
    form_of,
    overlapping_loss,
)
from megalith.trained import TrainedModel, open_trained

TASKS = ("WIKITEXT103", "LAMBADA")


def measure_zeroshot(
    directory: str,
    *,
    task: str,
    files: Sequence[str],
    overlap: int,
    strict: bool,
    detokenize: str | None,
    step: int | None,
    device: str,
) -> tuple[dict[str, Any], str]:
    """The figures of a task on one file, and the line that Megatron-LM prints of them.

    overlap: tokens that are new in each window. strict: the whole last word is to be told, not its last token.
    detokenize: a name of `FORMS`, or None to go by the file's path. Raises ValueError naming what is wrong.
    """
    if len(files) != 1:
        raise ValueError(f"--valid-data: {len(files)} files were given; --task {task} reads one")
    if detokenize is not None and task == "LAMBADA":
        raise ValueError(f"--detokenize = {detokenize}: LAMBADA's passages are plain text. Leave it out")
    trained = open_trained(directory, step=step, device=device)
    path = Path(files[0])
    figures: dict[str, Any] = {"run": directory, "step": trained.step, "task": task, "data": files[0]}
    if task == "LAMBADA":
        passages = read_passages(path, trained, strict=strict)
        right = count_right(trained.model, passages, window=sequence_length(trained.run))
        accuracy = right / len(passages)
        line = f"number correct: {right:.4E} | total examples: {len(passages):.4E} | avg accuracy: {accuracy:.4E}"
        return {**figures, "examples": len(passages), "correct": right, "accuracy": accuracy}, _framed(task, line)
    form = form_of(files[0]) if detokenize is None else detokenize
    found = text_figures(path, trained, form=form, overlap=overlap)
    line = (
        f"avg loss: {found.loss.mean:.4E} | ppl: {found.loss.perplexity:.4E} | "
        f"adjusted ppl: {found.adjusted_perplexity:.4E} | token ratio: {found.token_ratio} |"
    )
    figures |= {
        "detokenized": form,
        "tokens": found.loss.count,
        "words": found.num_words,
        "loss": found.loss.mean,
        "perplexity": found.loss.perplexity,
        "adjusted_perplexity": found.adjusted_perplexity,
        "token_ratio": found.token_ratio,
    }
    told = "as it is" if form == "none" else f"with the tokenization of {form} undone"
    return figures, f" {path} is read {told}\n{_framed(task, line)}"


def _framed(task: str, figures: str) -> str:
    line = f" validation results on {task} | {figures}"
    rule = "-" * (len(line) + 1)
    return f"{rule}\n{line}\n{rule}"


def text_figures(path: Path, trained: TrainedModel, *, form: str, overlap: int) -> TextFigures:
    """Loss of a text file. Raises ValueError for one that is no text or holds too little."""
    assert form in FORMS
    window = sequence_length(trained.run)
    if not 1 <= overlap <= window:
        raise ValueError(f"--overlapping-eval = {overlap}: must be from 1 to the model's window of {window} tokens")
    text = read_text(path)
    words = len(text.strip().split(" "))
    tokens = np.asarray(trained.tokenizer.encode(detokenized(text, form)), np.int64)
    if words < 2 or len(tokens) < 2:
        raise ValueError(f"{path}: holds {words} word(s) in {len(tokens)} token(s); two are needed")
    return TextFigures(overlapping_loss(trained.model, tokens, window=window, stride=overlap), words)


def read_passages(path: Path, trained: TrainedModel, *, strict: bool) -> list[Cloze]:
    """The passages of a file of JSON lines. Raises ValueError naming the line that is none."""
    passages = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record["text"] if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise ValueError("has no text under the key text")
            passages.append(cloze_of(text, trained.tokenizer.encode, whole_word=strict))
        except (ValueError, KeyError, RecursionError) as error:
            reason = "has no key text" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{path}, line {number}: {reason}. Each line is an object with a passage as text"
            ) from error
    if not passages:
        raise ValueError(f"{path}: holds no passages")
    return passages


def read_text(path: Path) -> str:
    """A file's text. Raises ValueError for what is no UTF-8 or cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"--valid-data = {path}: {error.strerror}") from error
