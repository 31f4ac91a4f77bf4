"""`megalith evaluate`: the figures of a trained model."""

import argparse
import json
from collections.abc import Sequence

from megalith.command_line import CommandParser
from megalith.config import BIENCODERS
from megalith.terminal import printable

DESCRIPTION = (
    "Loss and perplexity of a trained model on its data or on files; a vit's accuracy; what a retriever finds."
)
MEASURED = ("gpt", "vit", "classify", *BIENCODERS)  # tasks whose runs can be evaluated


def main(words: Sequence[str]) -> int:
    """Read the flags and print the figures; return the exit status."""
    parser = CommandParser(prog="megalith evaluate", description=DESCRIPTION)
    parser.add_argument("run", help="run directory (what --save named)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--split", choices=("train", "valid", "test"), help="a split of the run's data [valid]")
    what.add_argument(
        "--file",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="text, JSON lines, or prefixes of token files; for a vit a folder of images",
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use [the newest]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    of_search, of_zeroshot = _add_search_flags(parser), _add_zeroshot_flags(parser)
    options = parser.parse_args(words)

    from megalith.trained import measure, run_of

    task = run_of(options.run).task
    _refuse_idle(options, task, search=parser.given(options, of_search), zeroshot=parser.given(options, of_zeroshot))
    if task in BIENCODERS:
        from megalith.retrieving import answer

        found = answer(options)
        if options.json:
            print(json.dumps(found))
        return 0
    if task not in MEASURED:
        known = f"{', '.join(MEASURED[:-1])} and {MEASURED[-1]}"
        raise ValueError(
            f"{options.run}: holds a {task} model; those of {known} can be evaluated. Its log has its losses."
        )
    if options.task is not None:
        return _evaluate_zeroshot(options)
    if task == "vit":
        from megalith.trained_images import measure_images as measure
    elif task == "classify":
        from megalith.trained_pairs import measure_pairs as measure
    report = measure(options.run, split=options.split, files=options.file, step=options.step, device=options.device)
    if options.json:
        print(json.dumps(report))
        return 0
    sets = report.pop("data_sets", ())
    for figures in (report, *sets):
        for name, value in figures.items():
            text = f"{value:,.4f}" if isinstance(value, float) else str(value)
            text = ", ".join(value) if isinstance(value, list) else text
            print(f"{name:>14}: {printable(text)}")
    return 0


def _refuse_idle(options: argparse.Namespace, task: str, *, search: list[str], zeroshot: list[str]) -> None:
    """Raise ValueError for flags that would do nothing. search, zeroshot: those of either group that were given."""
    if search and task not in BIENCODERS:
        raise ValueError(f"{', '.join(search)}: {options.run} holds a {task} model; questions are for an ict")
    if zeroshot and task != "gpt":
        raise ValueError(f"{', '.join(zeroshot)}: {options.run} holds a {task} model; zero-shot tasks are for a gpt")
    if zeroshot and options.task is None:
        raise ValueError(f"{', '.join(zeroshot)}: nothing reads it without --task. Add --task WIKITEXT103 or LAMBADA")
    if options.task is not None and (options.split or options.file):
        raise ValueError(f"--task = {options.task}: is measured on --valid-data. Leave --split and --file out")


def _add_zeroshot_flags(parser: argparse.ArgumentParser) -> list[str]:
    """The flags of zero-shot tasks, Megatron-LM's where it has them; their settings."""
    group = parser.add_argument_group("zero-shot tasks of a gpt")
    add = group.add_argument
    add("--task", choices=("WIKITEXT103", "LAMBADA"), help="perplexity per word, or the last words of passages")
    add(
        "--valid-data",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="a text, or JSON lines with passages as text",
    )
    add("--overlapping-eval", type=int, default=32, metavar="N", help="new tokens in each window [32]")
    add("--strict-lambada", action="store_true", help="the whole last word is to be told, not its last token")
    add("--detokenize", choices=("wikitext", "ptb", "none"), help="tokenization to undo [by the file's path]")
    return [action.dest for action in group._group_actions]


def _evaluate_zeroshot(options: argparse.Namespace) -> int:
    from megalith.trained_zeroshot import measure_zeroshot

    figures, line = measure_zeroshot(
        options.run,
        task=options.task,
        files=options.valid_data,
        overlap=options.overlapping_eval,
        strict=options.strict_lambada,
        detokenize=options.detokenize,
        step=options.step,
        device=options.device,
    )
    print(json.dumps(figures) if options.json else line)
    return 0


def _add_search_flags(parser: argparse.ArgumentParser) -> list[str]:
    """The flags of open-domain question answering, Megatron-LM's where it has them; their settings."""
    group = parser.add_argument_group("of a bi-encoder (ict)")
    add = group.add_argument
    for split in ("dev", "test"):
        add(f"--qa-data-{split}", metavar="TSV", help="questions, each with a list of answers")
    add("--evidence-data-path", metavar="TSV", help="the passages [what the run says]")
    add("--embedding-path", metavar="FILE", help="what megalith index made of them [what the run says]")
    add("--faiss-topk-retrievals", type=int, default=100, metavar="N", help="passages found for a question [100]")
    add("--faiss-match", choices=("string", "regex"), default="string", help="answers are words, or patterns [string]")
    add("--faiss-use-gpu", action="store_true", help="accepted; the exact search runs on the GPU with --device cuda")
    add("--search", choices=("torch", "faiss"), default="torch", help="exact products, or FAISS's flat index [torch]")
    add("--retriever-report-topk-accuracies", type=int, nargs="+", metavar="K", help="which accuracies to print")
    return [action.dest for action in group._group_actions]
