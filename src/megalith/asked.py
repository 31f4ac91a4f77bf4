"""What the words of bench, finetune, index, plan and verify ask for, known before anything heavy is imported: so their
help and what is wrong with the words come at once.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from megalith.command_line import CommandParser
from megalith.config import Run, known_settings
from megalith.fields import describe
from megalith.plan.machine import MACHINES
from megalith.sources import read_command_line

EPOCHS = 3  # of fine-tuning
# Megatron-LM's name for learning from questions, whatever their source.
QUESTIONS = "RET-FINETUNE-NQ"
EMBEDDING_DTYPES = {"fp16": "float16", "fp32": "float32"}
MOST_PLANS = 10  # that a search shows
PLAN = """What a GPT job of any size will need on each rank, how long a step will take there, and what ranks send
each other. Needs no data, no GPU and no other rank. With --search: the fastest layouts that fit into memory; settings
of the layout that differ from their defaults stay as they are."""


class Asked(NamedTuple):
    """own: flags of the command itself; rest: the others, which are pretrain's; run: what those say."""

    own: argparse.Namespace
    rest: list[str]
    run: Run


def asked_of_bench(words: Sequence[str]) -> Asked:
    """Of `megalith bench`. Raises ValueError for what is wrong, as all functions here do."""
    parser = CommandParser(
        prog="megalith bench",
        usage="megalith bench [TASK] [RUN.toml] [--preset NAME] [--steps N] [--warmup N] [--json] [--flags ...]",
        description="How fast a model trains on this machine. Takes the flags of megalith pretrain; needs no data.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="timed steps [default 20]")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before those [default 3]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    own, rest = parser.parse_known_args(words)
    if own.steps < 1 or own.warmup < 1:
        raise ValueError(f"--steps = {own.steps}, --warmup = {own.warmup}: both must be at least 1")
    return Asked(own, rest, read_command_line(rest))


def asked_of_plan(words: Sequence[str]) -> Asked:
    """Of `megalith plan`."""
    parser = CommandParser(
        prog="megalith plan",
        usage="megalith plan [RUN.toml] [--preset NAME] [--ranks N] [--on MACHINE] [--search] [--json] "
        "[--flags of pretrain ...]",
        description=PLAN,
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks of the job [those of --nproc, or 1]")
    parser.add_argument(
        "--on",
        choices=(*MACHINES, "cpu"),
        default="h100",
        help="what the ranks compute on, in nodes of eight; cpu: this machine's, measured for three seconds [h100]",
    )
    parser.add_argument("--search", action="store_true", help=f"the {MOST_PLANS} fastest layouts that fit")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    own, rest = parser.parse_known_args(words)
    if own.ranks is not None and own.ranks < 1:
        raise ValueError(f"--ranks = {own.ranks}: must be at least 1")
    return Asked(own, rest, read_command_line(rest))


def asked_of_finetune(words: Sequence[str]) -> Asked:
    """Of `megalith finetune`; run: as far as the words tell it, without what the trained one will add."""
    parser = CommandParser(
        prog="megalith finetune",
        usage="megalith finetune RUN --task TASK --train-data FILE.. --valid-data FILE.. [--epochs N] [--flags]",
        description="Fine-tune a trained BERT to class pairs of sentences, or a bi-encoder (ict) to answer questions; "
        "every flag of megalith pretrain may follow.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="run directory of a bert, or of an ict (what --save named)")
    of_pairs = describe(known_settings()["pairs_format"].field)["choices"]
    parser.add_argument("--task", required=True, choices=[*of_pairs, QUESTIONS], help="what the files hold")
    parser.add_argument(
        "--train-data", nargs="+", required=True, metavar="FILE", help="pairs, or questions, to learn from"
    )
    parser.add_argument(
        "--valid-data", nargs="+", required=True, metavar="FILE", help="pairs, or questions, to validate on"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"[{EPOCHS}]")
    own, rest = parser.parse_known_args(words)
    if own.epochs < 1:
        raise ValueError(f"--epochs = {own.epochs}: must be greater than 0. Give a positive number")
    return Asked(own, rest, read_command_line([task_of_finetune(own.task), *rest]))


def task_of_finetune(task: str) -> str:
    """What pretrain calls it."""
    return "retriever" if task == QUESTIONS else "classify"


def asked_of_index(words: Sequence[str]) -> argparse.Namespace:
    """Of `megalith index`."""
    parser = CommandParser(
        prog="megalith index", description="Embed passages with a trained bi-encoder, to be searched."
    )
    add = parser.add_argument
    add("run", help="run directory of an ict or a retriever (what --save named)")
    add("--evidence-data-path", metavar="TSV", help="passages: a header line, then id, text, title [what the run says]")
    add("--embedding-path", metavar="FILE", help="the file to make [what the run says]")
    add("--indexer-batch-size", type=int, metavar="N", help="passages embedded at once [what the run says, 128]")
    add("--indexer-log-interval", type=int, metavar="N", help="batches between progress lines [1000]")
    add("--retriever-seq-length", type=int, metavar="N", help="tokens of a passage [what the run says]")
    add("--sample-rate", type=float, default=1.0, metavar="X", help="share of the passages that is embedded [1]")
    add("--embedding-dtype", choices=tuple(EMBEDDING_DTYPES), default="fp16", help="how vectors are kept [fp16]")
    add("--nproc", type=int, metavar="N", help="ranks to start on this machine")
    add("--step", type=int, metavar="N", help="checkpoint to use [the newest]")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options: argparse.Namespace = parser.parse_args(words)
    return options


def asked_of_verify(words: Sequence[str]) -> argparse.Namespace:
    """Of `megalith verify`."""
    parser = CommandParser(
        prog="megalith verify", description="Hold files against what was recorded of them, byte for byte."
    )
    parser.add_argument("path", nargs="+", help="prefix of token files, run directory, or directory of one checkpoint")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="token ids allowed are 0 to N-1 [those of the recorded tokenizer]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options: argparse.Namespace = parser.parse_args(words)
    return options
