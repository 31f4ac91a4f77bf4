"""`megalith finetune`: a trained BERT learns to class pairs of sentences; `megalith pretrain classify`, told less.

Sizes and tokenizer are those of the run that is started from, the length follows from the epochs; every flag of
pretrain may stand behind and wins.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from megalith.config import Run, known_settings
from megalith.data.pair_files import LAYOUTS, read_pairs
from megalith.data.tokenizer import load_saved_tokenizer
from megalith.derived import global_batch_size, sequence_length
from megalith.fields import describe
from megalith.sources import read_command_line
from megalith.trained import run_of

# What is good for a BERT of any size (Devlin et al. 2018, appendix A.3), unless told otherwise.
USUAL = """
    --micro-batch-size 8 --global-batch-size 32 --lr 5e-5 --lr-decay-style linear --lr-warmup-fraction 0.065
    --log-interval 10 --eval-first --unigram-baseline
""".split()
EPOCHS = 3


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see megalith finetune --help")


def main(words: Sequence[str], *, started: float, pretrain: Callable[[Sequence[str], float], int]) -> int:
    """Fine-tune as the words say; pretrain: the command that does it. Raises ValueError for what is unfit."""
    return pretrain(pretrain_words(words), started)


def pretrain_words(words: Sequence[str]) -> list[str]:
    """The words of `megalith pretrain` that do what the words of `megalith finetune` ask for."""
    parser = _Parser(
        prog="megalith finetune",
        usage="megalith finetune RUN --task MNLI|QQP --train-data FILE.. --valid-data FILE.. [--epochs N] [--flags]",
        description="Fine-tune a trained BERT to class pairs of sentences; every flag of megalith pretrain may follow.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="run directory of a bert (what --save named)")
    parser.add_argument("--task", required=True, choices=sorted(LAYOUTS), help="how the files are laid out")
    parser.add_argument("--train-data", nargs="+", required=True, metavar="FILE", help="pairs to learn from")
    parser.add_argument("--valid-data", nargs="+", required=True, metavar="FILE", help="pairs to validate on")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"[{EPOCHS}]")
    options, rest = parser.parse_known_args(words)
    if options.epochs < 1:
        raise ValueError(f"--epochs = {options.epochs}: must be greater than 0. Give a positive number")
    pretrained = run_of(options.run)
    if pretrained.task != "bert":
        raise ValueError(
            f"{options.run}: holds a {pretrained.task} model; only a bert is fine-tuned to class sentences."
        )
    folder = Path(options.run) / "tokenizer"
    tokenizer = load_saved_tokenizer(folder)
    begun = [
        "classify",
        *model_words(pretrained),
        *("--seq-length", str(sequence_length(pretrained))),
        *("--tokenizer-type", tokenizer.name, "--vocab-file", str(folder / "vocab.txt")),
        *(("--vocab-extra-ids", str(len(tokenizer.extra_ids))) if tokenizer.extra_ids else ()),
        *("--load", options.run, "--finetune", "--save", f"{str(options.run).rstrip('/')}-{options.task.lower()}"),
        *("--pairs-format", options.task, "--train-data", *options.train_data, "--valid-data", *options.valid_data),
        *USUAL,
    ]
    asked = read_command_line([*begun, *rest])
    layout = LAYOUTS[options.task]
    counts = [len(read_pairs(paths, layout)) for paths in (options.train_data, options.valid_data)]
    # Of each epoch the rest that fills no batch is left out, as in Megatron-LM.
    steps, validations = (max(1, count // global_batch_size(asked, 1)) for count in counts)
    every = ["--eval-interval", str(steps), "--eval-iters", str(validations), "--save-interval", str(steps)]
    return [*begun, "--train-iters", str(options.epochs * steps), *every, *rest]


def model_words(run: Run) -> list[str]:
    """The flags that give a run's model again."""
    known, words = known_settings(), list[str]()
    for field in fields(run.model):
        value = getattr(run.model, field.name)
        if value == field.default or value is None:
            continue
        words.append(known[field.name].flag)
        if not describe(field)["switch"]:
            words.append(str(value))
    return words
