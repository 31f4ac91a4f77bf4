"""BERT: an encoder that fills in masked tokens and tells whether two parts of a text stand in their order."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megalith.config import Run
from megalith.data.loader import BatchSource
from megalith.data.masking import SpanRule, pieces_of
from megalith.data.pairs import SPECIAL_TOKENS, MockPairRows, PairBatches, PairRows, PairRule
from megalith.data.tokenizer import Tokenizer
from megalith.datasets import Report
from megalith.derived import sequence_length
from megalith.evaluate.loss import unigram_entropy
from megalith.models.bert import Bert
from megalith.models.shape import shape_of
from megalith.parallel.apply import BuildPart
from megalith.parallel.step import Batch
from megalith.sentence_datasets import build_sentence_rows
from megalith.task import Baseline, Task, made_up, stack_flops

MOST_COUNTED = 20_000_000  # tokens looked at for the frequencies


def build_part(run: Run, vocab_size: int, dtype: torch.dtype) -> BuildPart:
    """What builds a part of a BERT, without weights yet."""
    return partial(Bert, run.model, vocab_size, dtype=dtype, device="meta")


def build_parts(
    run: Run,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    targets: Mapping[str, int],
    report: Report,
    moved: Callable[[], None],
) -> dict[str, PairBatches]:
    """The batches of every part that is asked for samples and has documents.

    Raises ValueError for a tokenizer that lacks what samples need, and for data that is missing, damaged or does not
    fit the vocabulary.
    """
    length, two_parts = sequence_length(run), run.model.bert_binary_head
    rule = PairRule(
        length=length,
        pieces=pieces_of(tokenizer),
        cls=tokenizer.cls,
        sep=tokenizer.sep,
        mask=tokenizer.mask,
        pad=tokenizer.pad,
        masking=SpanRule(run.data.mask_prob),
        binary_head=two_parts,
    )
    rows = build_sentence_rows(
        run,
        longest=length - SPECIAL_TOKENS,
        least=2 if two_parts else 1,
        # Not the model's, which padding may have made larger: only of the tokenizer's is it known where words begin.
        vocab_size=rule.pieces.vocab_size,
        make_rows=lambda sentences: PairRows(sentences, rule),
        targets=targets,
        report=report,
        moved=moved,
    )
    return {name: PairBatches(part) for name, part in rows.items()}


def build_mock(run: Run, vocab_size: int, targets: Mapping[str, int]) -> dict[str, PairBatches]:
    """Made-up batches of every part that is asked for samples; each part has rows of its own."""

    def make(num_samples: int, seed: int) -> PairBatches:
        size, share = run.data.vocab_size or vocab_size, run.data.mask_prob
        return PairBatches(
            MockPairRows(num_samples, length=sequence_length(run), vocab_size=size, share=share, seed=seed)
        )

    return made_up(run, targets, make)


def run_part(part: nn.Module, entering: Tensor, batch: Batch) -> Tensor:
    """The stream, or from the last part the losses of the masked tokens and of the order."""
    leaving: Tensor = part(
        entering,
        batch["types"],
        padding=batch["padding"],
        rows=batch.get("rows"),
        labels=batch["labels"],
        loss_weights=batch["loss_mask"],
        order=batch["order"],
        order_weights=batch["order_mask"],
    )
    return leaving


def step_flops(run: Run, vocab_size: int, batch: int) -> float:
    """Operations of a step, by Megatron's convention: every token is scored, masked or not."""
    shape, length = shape_of(run.model), sequence_length(run)
    blocks = stack_flops(run, batch, length=length, vocab_size=vocab_size)
    transform = 2 * length * shape.width**2
    pooled = 2 * shape.width**2 + 4 * shape.width if run.model.bert_binary_head else 0
    return blocks + float(3 * batch * (transform + pooled))


def unigram_baseline(run: Run, source: BatchSource) -> Baseline | None:
    """Nats per token of the sentences' frequencies; None for data that is no single corpus."""
    if not isinstance(source, PairBatches) or not isinstance(source.rows, PairRows):
        return None
    entropy = unigram_entropy(source.rows.sentences.all_tokens(MOST_COUNTED))
    meaning = "the loss of knowing how often each token occurs and nothing else"
    return Baseline("lm loss", entropy, "unigram entropy", meaning)


def identity(run: Run) -> dict[str, Any]:
    """What the weights depend on beside the sizes of the transformer."""
    model = run.model
    return {"bert_binary_head": model.bert_binary_head, "norm_after_residual": model.norm_after_residual}


def losses(run: Run) -> tuple[str, ...]:
    """Of the masked tokens, and of the order of two parts where there is a head for it."""
    return ("lm loss", "sop loss") if run.model.bert_binary_head else ("lm loss",)


def masks(run: Run) -> tuple[str, ...]:
    """What weights them: each is a mean of its own, over masked tokens and over samples, and they are added."""
    return ("loss_mask", "order_mask") if run.model.bert_binary_head else ("loss_mask",)


TASK = Task(
    title="BERT",
    build_part=build_part,
    build_parts=build_parts,
    run_part=run_part,
    losses=losses,
    masks=masks,
    num_places=sequence_length,
    step_flops=step_flops,
    build_mock=build_mock,
    is_tied=lambda run: True,
    baseline=unigram_baseline,
    identity=identity,
    next_commands=(("finetune", "megalith finetune {save} --task MNLI --train-data FILE --valid-data FILE"),),
)
