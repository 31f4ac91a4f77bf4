"""The retriever: a bi-encoder that learns from questions and the passages that answer them (DPR)."""

import dataclasses
from collections.abc import Callable, Mapping
from threading import Lock

import torch

from megalith.config import Run
from megalith.data.loader import BatchSource
from megalith.data.marked import Marks
from megalith.data.question_batches import Negatives, QuestionBatches
from megalith.data.questions import read_training_questions
from megalith.data.tokenizer import Tokenizer
from megalith.datasets import Report, identify_training_files
from megalith.derived import retriever_length
from megalith.parallel.apply import BuildPart
from megalith.task import Baseline, Task
from megalith.tasks import ict


def training_negatives(run: Run) -> Negatives:
    """Passages that do not answer a question, in training: some at random, hard ones if there are enough."""
    return Negatives(run.data.train_hard_neg if run.data.train_with_neg else 0, 0, filled=True, shuffled=True)


def validation_negatives(run: Run) -> Negatives:
    """The same in validation: the first ones, of both kinds."""
    return Negatives(run.data.val_av_rank_hard_neg, run.data.val_av_rank_other_neg, filled=False, shuffled=False)


def num_contexts(run: Run) -> int:
    """Passages of a question in training."""
    return 1 + training_negatives(run).count


def build_part(run: Run, vocab_size: int, dtype: torch.dtype) -> BuildPart:
    """What builds the bi-encoder, without weights yet."""
    return ict.build_part(run, vocab_size, dtype, report_rank=True)


def build_parts(
    run: Run,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    targets: Mapping[str, int],
    report: Report,
    moved: Callable[[], None],
) -> dict[str, QuestionBatches]:
    """The questions of --train-data and --valid-data. Raises ValueError naming the file that is no such data."""
    marks = Marks.of(tokenizer, retriever_length(run))
    lock = Lock()
    files = {"train": (run.data.train_data, training_negatives(run))}
    files["valid"] = (run.data.valid_data, validation_negatives(run))
    return {
        name: QuestionBatches(
            read_training_questions(paths),
            tokenizer,
            marks,
            negatives=negatives,
            seed=run.train.seed,
            vocab_size=vocab_size,
            lock=lock,
        )
        for name, (paths, negatives) in files.items()
        if paths and targets[name]
    }


def losses(run: Run) -> tuple[str, ...]:
    """The loss, the mean rank of the right passage among all of the microbatch, and an accuracy for each k."""
    return ("loss", "rank", *ict.losses(run)[1:])


def num_places(run: Run) -> int:
    """Tokens of a question and of its passages."""
    return retriever_length(run) * (1 + num_contexts(run))


def step_flops(run: Run, vocab_size: int, batch: int) -> float:
    """Operations of a step, by Megatron's convention."""
    return ict.step_flops(run, vocab_size, batch, length=retriever_length(run), contexts=num_contexts(run))


def chance_baseline(run: Run, source: BatchSource) -> Baseline:
    """What guessing among all passages of a validation's microbatch costs; of a question as many as on average."""
    assert isinstance(source, QuestionBatches)
    held = sum(1 + source.negatives.held(question) for question in source.questions)
    return ict.chance_baseline(run, source, contexts=held / len(source.questions))


TASK: Task = dataclasses.replace(
    ict.TASK,
    title="RETRIEVER",
    build_part=build_part,
    build_parts=build_parts,
    losses=losses,
    masks=lambda run: ("loss_mask",) * len(losses(run)),
    num_places=num_places,
    step_flops=step_flops,
    build_mock=None,
    identify_data=identify_training_files,
    baseline=chance_baseline,
    validates_all=True,
)
