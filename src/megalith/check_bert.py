"""What is checked for BERT alone: its samples, the tokens that they need, and where its norms stand."""

import math
from collections.abc import Iterator
from pathlib import Path

from megalith.config import Fault, Run, fault, flag_of
from megalith.data.masking import WORDPIECE
from megalith.data.pairs import SPECIAL_TOKENS
from megalith.derived import given_length, tokenizer_type

SHORTEST = SPECIAL_TOKENS + 2  # tokens of a sample: each of two parts has one
NEEDED = ("[CLS]", "[SEP]", "[MASK]", "[PAD]")


def bert_faults(run: Run) -> Iterator[Fault]:
    """Every fault of a BERT's settings."""
    yield from encoder_faults(run)
    yield from masking_faults(run, special=SPECIAL_TOKENS, shortest=SHORTEST)


def masking_faults(run: Run, *, special: int, shortest: int) -> Iterator[Fault]:
    """Faults of a sample's length, and of the share of its tokens that is masked.

    special: tokens of a sample that are not of the text. shortest: tokens that a sample needs.
    """
    data = run.data
    name, length = given_length(run)
    if length is not None and 0 < length < shortest:
        yield fault(name, length, f"is too short for a {run.task}, whose samples need {shortest}", "Lengthen it")
    if not 0 < data.mask_prob < 1:
        yield fault("mask_prob", data.mask_prob, f"must be above 0 and below 1 for {run.task}", "Give such a share")
    elif length is not None and length >= shortest and not data.mock_data:
        count = length - special
        if data.mask_prob * count < 1:
            rule = (
                f"of the {count} tokens of text in {flag_of(name)} = {length} is less than one, so none is ever masked"
            )
            remedy = f"Give at least {math.ceil(1000 / count) / 1000:g}, or longer sequences"
            yield fault("mask_prob", data.mask_prob, rule, remedy)
    if not 0 <= data.short_seq_prob <= 1:
        yield fault("short_seq_prob", data.short_seq_prob, "must be from 0 to 1", "Give such a share")


def encoder_faults(run: Run) -> Iterator[Fault]:
    """Faults of settings that all models made of BERT's encoder share."""
    model = run.model
    if model.norm_after_residual and model.apply_residual_connection_post_layernorm:
        rule = (
            f"contradicts {flag_of('apply_residual_connection_post_layernorm')}, which has norms in front of branches"
        )
        yield fault("norm_after_residual", None, rule, "Give only one of them")
    if model.untie_embeddings_and_output_weights:
        rule = f"is for gpt; a {run.task} scores tokens with its word table"
        yield fault("untie_embeddings_and_output_weights", None, rule, "Leave it out")
    if not run.data.mock_data and run.data.corpus is None:
        yield from _tokenizer(run)


def _tokenizer(run: Run) -> Iterator[Fault]:
    kind, path = tokenizer_type(run), run.data.vocab_file
    if kind not in WORDPIECE:
        rule = f"does not say which tokens begin a word, on which {run.task} depends"
        yield fault("tokenizer_type", kind, rule, f"Use {' or '.join(WORDPIECE)}")
    elif path is not None and Path(path).is_file():
        tokens = {line.strip() for line in Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines()}
        if missing := [token for token in NEEDED if token not in tokens]:
            yield fault(
                "vocab_file", path, f"has no {', no '.join(missing)}", f"A {run.task} needs them: add a line each"
            )
