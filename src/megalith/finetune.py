"""`megalith finetune`: a trained BERT learns to class pairs of sentences, a bi-encoder to find answers to questions.

It is `megalith pretrain classify` and `megalith pretrain retriever`, told less.

Sizes and tokenizer are those of the run that is started from, the length follows from the epochs; every flag of
pretrain may stand behind and wins.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megalith.asked import QUESTIONS, Asked, task_of_finetune
from megalith.config import Run, known_settings
from megalith.data.pair_files import LAYOUTS, read_pairs
from megalith.data.questions import read_training_questions
from megalith.derived import compute_dtype, global_batch_size, retriever_length, sequence_length
from megalith.fields import describe
from megalith.sources import read_command_line
from megalith.trained import run_of, tokenizer_of

# What is good for a BERT of any size (Devlin et al. 2018, appendix A.3), unless told otherwise.
USUAL = """
    --micro-batch-size 8 --global-batch-size 32 --lr 5e-5 --lr-decay-style linear --lr-warmup-fraction 0.065
    --log-interval 10 --eval-first --unigram-baseline
""".split()
# Settings of a model that have no meaning with other types of the computation, which is the fine-tuning's own.
OF_TYPES = {"fp32_residual_connection": ("float16", "bfloat16"), "fp16_lm_cross_entropy": ("float16",)}
REPORTED = ("1", "5", "20")  # of the accuracies among all passages of a microbatch


def pretrain_words(given: Asked) -> list[str]:
    """The words of `megalith pretrain` that do what those of `megalith finetune` ask for (`asked_of_finetune`).

    Raises ValueError for what is unfit.
    """
    options, rest, told = given
    pretrained = run_of(options.run)
    for_questions = options.task == QUESTIONS
    wanted = ("ict", "retriever", "bert") if for_questions else ("bert",)
    if pretrained.task not in wanted:
        raise ValueError(
            f"{options.run}: holds a {pretrained.task} model; --task {options.task} takes a {' or a '.join(wanted)}."
        )
    other_family = for_questions and pretrained.task == "bert"
    folder = Path(options.run) / "tokenizer"
    tokenizer = tokenizer_of(options.run, pretrained)
    begun = [
        task_of_finetune(options.task),
        *model_words(pretrained, compute_dtype(told)),
        *("--seq-length", str(sequence_length(pretrained))),
        *("--tokenizer-type", tokenizer.name, "--vocab-file", str(folder / "vocab.txt")),
        *(("--vocab-extra-ids", str(len(tokenizer.extra_ids))) if tokenizer.extra_ids else ()),
        *(("--bert-load", options.run) if other_family else ("--load", options.run, "--finetune")),
        *("--save", f"{str(options.run).rstrip('/')}-{options.task.lower()}"),
        *("--train-data", *options.train_data, "--valid-data", *options.valid_data),
        *(question_words(pretrained) if for_questions else ("--pairs-format", options.task)),
        *USUAL,
    ]
    asked = read_command_line([*begun, *rest])
    counts = [_count(options.task, paths) for paths in (options.train_data, options.valid_data)]
    # Of each epoch the rest that fills no batch is left out, as in Megatron-LM.
    size = global_batch_size(asked, 1)
    steps, validations = max(1, counts[0] // size), -(-counts[1] // size)
    every = ["--eval-interval", str(steps), "--eval-iters", str(validations), "--save-interval", str(steps)]
    return [*begun, "--train-iters", str(options.epochs * steps), *every, *rest]


def _count(task: str, paths: Sequence[str]) -> int:
    """Samples in the files."""
    if task == QUESTIONS:
        return len(read_training_questions(paths))
    return len(read_pairs(paths, LAYOUTS[task], warn=lambda text: None))  # the training tells it


def question_words(run: Run) -> list[str]:
    """The flags by which a run's model reads questions and passages, and is measured."""
    reported = run.evaluate.retriever_report_topk_accuracies or REPORTED
    scaled = ["--retriever-score-scaling"] if run.evaluate.retriever_score_scaling else []
    length = str(retriever_length(run))
    return ["--retriever-seq-length", length, "--retriever-report-topk-accuracies", *map(str, reported), *scaled]


def model_words(run: Run, dtype: str) -> list[str]:
    """The flags that give a run's model again, computed in a type."""
    known, words = known_settings(), list[str]()
    for field in fields(run.model):
        value = getattr(run.model, field.name)
        if value == field.default or value is None or dtype not in OF_TYPES.get(field.name, (dtype,)):
            continue
        words.append(known[field.name].flag)
        if not describe(field)["switch"]:
            words.append(str(value))
    return words
