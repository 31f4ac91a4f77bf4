"""T5: an encoder reads a text with gaps, and a decoder learns to tell what stood in them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megalith.config import Run
from megalith.data.loader import BatchSource
from megalith.data.masking import T5_LONGEST, SpanRule
from megalith.data.spans import (
    SPECIAL_TOKENS,
    MockSpanRows,
    SpanBatches,
    SpanCutRule,
    SpanRows,
    pieces_for_spans,
)
from megalith.data.tokenizer import Tokenizer
from megalith.datasets import Report
from megalith.derived import sequence_length
from megalith.evaluate.loss import unigram_entropy
from megalith.models.shape import shape_of
from megalith.models.t5 import T5
from megalith.parallel.apply import BuildPart
from megalith.parallel.step import Batch
from megalith.sentence_datasets import build_sentence_rows
from megalith.task import Baseline, Task, made_up, stack_flops

FEWEST_SENTENCES = 1  # of a sample
PAD = 0  # of made-up tokens, of which none is it
MOST_COUNTED = 2000  # samples looked at for the frequencies


def decoder_length(run: Run) -> int:
    """Tokens of the decoder in a sample."""
    assert run.data.decoder_seq_length is not None, "check_t5.py saw to it"
    return run.data.decoder_seq_length


def num_places(run: Run) -> int:
    """Tokens of the encoder and of the decoder, whose streams travel joined."""
    return sequence_length(run) + decoder_length(run)


def build_part(run: Run, vocab_size: int, dtype: torch.dtype) -> BuildPart:
    """What builds a part of a T5, without weights yet."""
    return partial(T5, run.model, vocab_size, dtype=dtype, device="meta")


def build_parts(
    run: Run,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    targets: Mapping[str, int],
    report: Report,
    moved: Callable[[], None],
) -> dict[str, SpanBatches]:
    """The batches of every part that is asked for samples and has documents.

    Raises ValueError for a tokenizer that lacks what samples need, and for data that is missing, damaged or does not
    fit the vocabulary.
    """
    length = sequence_length(run)
    if not tokenizer.extra_ids:
        raise ValueError(f"{tokenizer.name}: its file has no tokens <extra_id_0>, ... to stand for spans; use another")
    rule = SpanCutRule(
        encoder_length=length,
        decoder_length=decoder_length(run),
        pieces=pieces_for_spans(tokenizer),
        # The original T5 has no token for the start: its decoder begins with padding.
        bos=tokenizer.roles.get("bos", tokenizer.pad),
        eos=tokenizer.eos,
        pad=tokenizer.pad,
        sentinels=tokenizer.extra_ids,
        masking=SpanRule(run.data.mask_prob, longest=T5_LONGEST, geometric=True),
    )
    rows = build_sentence_rows(
        run,
        longest=length - SPECIAL_TOKENS,
        least=FEWEST_SENTENCES,
        # Not the model's, which padding may have made larger: only of the tokenizer's is it known where words begin.
        vocab_size=rule.pieces.vocab_size,
        make_rows=lambda sentences: SpanRows(sentences, rule),
        targets=targets,
        report=report,
        moved=moved,
    )
    return {name: SpanBatches(part, length, rule.pad, tokenizer.extra_ids) for name, part in rows.items()}


def build_mock(run: Run, vocab_size: int, targets: Mapping[str, int]) -> dict[str, SpanBatches]:
    """Made-up batches of every part that is asked for samples; each part has rows of its own."""
    length = sequence_length(run)

    def make(num_samples: int, seed: int) -> SpanBatches:
        size = run.data.vocab_size or vocab_size
        rows = MockSpanRows(
            num_samples, encoder_length=length, decoder_length=decoder_length(run), vocab_size=size, seed=seed
        )
        return SpanBatches(rows, length, PAD)

    return made_up(run, targets, make)


def run_part(part: nn.Module, entering: Tensor, batch: Batch) -> Tensor:
    """The joined streams, or from the last part the loss of telling each token of the spans."""
    leaving: Tensor = part(
        entering,
        padding=batch["padding"],
        rows=batch.get("rows"),
        labels=batch["labels"],
        loss_weights=batch["loss_mask"],
    )
    return leaving.reshape(1) if leaving.dim() == 0 else leaving


def step_flops(run: Run, vocab_size: int, batch: int, *, causal: bool = False) -> float:
    """By Megatron's convention, or with the decoder's self-attention at half, see monitor/flops.py."""
    shape = shape_of(run.model)
    encoder, decoder = sequence_length(run), decoder_length(run)
    heads = shape.num_heads * shape.head_width
    stacks = stack_flops(run, batch, length=encoder)
    stacks += stack_flops(run, batch, length=decoder, vocab_size=vocab_size, causal=causal)
    # Cross-attention: queries and output of the decoder's tokens, keys and values of the encoder's, scores and values.
    cross = 4 * shape.width * heads * (decoder + encoder) + 4 * decoder * encoder * heads
    return stacks + float(3 * batch * shape.num_layers * cross)


def unigram_baseline(run: Run, source: BatchSource) -> Baseline:
    """Nats per token of the frequencies of what the decoder has to tell, in the first samples of the data.

    Which sentinel comes next follows from those before it, so all count as one token.
    """
    numbers = np.arange(min(len(source), MOST_COUNTED))
    batch = source.read(numbers, numbers)
    told = batch["labels"][batch["loss_mask"] > 0]
    if isinstance(source, SpanBatches) and source.sentinels:
        told = np.where(np.isin(told, source.sentinels), source.sentinels[0], told)
    entropy = unigram_entropy(told)
    meaning = "the loss of knowing how often each token is told (which sentinel is free) and nothing else"
    return Baseline("lm loss", entropy, "unigram entropy", meaning)


def identity(run: Run) -> dict[str, Any]:
    """What the weights depend on beside the sizes of the transformer."""
    model = run.model
    relative = {"relative_attention_max_distance": model.relative_attention_max_distance}
    return {
        "ffn_hidden_size": shape_of(model).inner,
        "normalization": model.normalization,
        "activation_function": model.activation_function,
        "swiglu": model.swiglu,
        "position_embedding_type": model.position_embedding_type,
        "softmax_scale": model.softmax_scale,
        **(relative if model.position_embedding_type == "relative" else {}),
        "scale_decoder_outputs": model.scale_decoder_outputs,
    }


TASK = Task(
    title="T5",
    build_part=build_part,
    build_parts=build_parts,
    run_part=run_part,
    losses=lambda run: ("lm loss",),
    masks=lambda run: ("loss_mask",),
    num_places=num_places,
    step_flops=step_flops,
    build_mock=build_mock,
    causal_flops=partial(step_flops, causal=True),
    baseline=unigram_baseline,
    identity=identity,
)
