"""The command `megalith` and its subcommands. What a user got wrong is said in a sentence each, without a traceback.

Nothing heavy is imported before it is known that the words make sense.
"""

import argparse
import difflib
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, TextIO, cast

from megalith.command_line import CommandParser
from megalith.descriptors import allow_most_descriptors, descriptor_remedy, open_standard_streams
from megalith.launch import PEER_LOST, PeerLostError, end_with_parent, ranks_in, speaks_for_all
from megalith.terminal import Answer, printable, why_no_text

if TYPE_CHECKING:
    from megalith.config import Run

FAULT = 2  # exit status of a command that could not start
MEASURED = ("gpt", "vit", "classify", "ict", "retriever")  # tasks whose runs megalith evaluate takes
ANSWERING = ("verify", "generate", "evaluate", "bench", "plan")  # commands of which nothing is left but what they print
# What to do, by the number of an error of the system that nobody has met nearer to where it arose.
REMEDIES = {
    errno.EACCES: "Correct its permissions, or name another",
    errno.EPERM: "Correct its permissions, or name another",
    errno.EDQUOT: "Make room",
    errno.EIO: "See to the disk",
    errno.EISDIR: "Name a file",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ENOENT: "Correct the path",
    errno.ENOSPC: "Make room",
    errno.ENOTDIR: "Correct the path",
    errno.EROFS: "Choose another place",
}
OUT_OF_MEMORY = 79  # of one that got no more memory, on the host or on a device


def main(words: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the exit status."""
    started = time.monotonic()
    closed = open_standard_streams()
    allow_most_descriptors()
    # Nothing that is written can be changed by everybody, whatever the umask was.
    os.umask(os.umask(0o022) | 0o002)
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else FAULT
    if words[0] == "--version":
        from megalith import __version__

        print(f"megalith {__version__}")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        print(f"megalith: {printable(words[0])} is not a command. {_meant(words[0])}", file=sys.stderr)
        return FAULT
    try:
        if words[0] not in ANSWERING:
            if "stdout" in closed and os.environ.get("RANK", "0") == "0":
                print(f"megalith: standard output is closed: what {words[0]} says there is lost", file=sys.stderr)
            return command(words[1:], started)
        if "stdout" in closed:
            raise ValueError(f"standard output is closed: megalith {words[0]} has no place for its answer. Open it.")
        with redirect_stdout(cast(TextIO, Answer(sys.stdout))):
            status = command(words[1:], started)
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("megalith: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away; a second write at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except PeerLostError as error:
        print(f"megalith: rank {os.environ.get('RANK', '0')} ends: {printable(str(error))}", file=sys.stderr)
        return PEER_LOST
    except (MemoryError, RuntimeError, ImportError) as error:
        if descriptor_remedy(str(error)) is not None:
            return _tell(error)

        from megalith.checkpoint.directory import CheckpointError
        from megalith.monitor.memory import is_out_of_memory

        if isinstance(error, CheckpointError) and not is_out_of_memory(error):
            return _tell(error)
        if not is_out_of_memory(error):
            raise
        said = str(error).splitlines() or ["no more can be had"]
        print(f"megalith: out of memory: {printable(said[0])}", file=sys.stderr)
        print(
            "megalith: checkpoints that were saved are whole; the same command goes on from the newest", file=sys.stderr
        )
        return OUT_OF_MEMORY
    except (ValueError, OSError) as error:
        return _tell(error)


def _tell(error: Exception) -> int:
    """Say what a user can correct, a line for each fault; give the exit status."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        text = f"{error.filename or 'an operation of the system failed'}: {error.strerror}"
        if remedy := REMEDIES.get(error.errno or 0):
            text = f"{text}. {remedy}."
    for line in text.splitlines():
        if (remedy := descriptor_remedy(line)) is not None:
            line = f"{line.rstrip('.')}. {remedy}"
        print(f"megalith: {printable(line)}", file=sys.stderr)
    return FAULT


def _meant(word: str) -> str:
    """A remedy for what is not a command: a task is one of pretrain, everything else may be mistyped."""
    from megalith.config import TASKS

    if word in TASKS:
        return f"Did you mean megalith pretrain {word}?"
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    return f"Did you mean {near[0]}?" if near else "megalith --help lists them."


def usage() -> str:
    lines = ["usage: megalith COMMAND ...", ""]
    lines += [f"  {name:<12}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "megalith COMMAND --help tells more; docs/start.md leads through a first run."])


def pretrain(words: Sequence[str], started: float) -> int:
    """Train a model from a preset, a run file or flags; the same command goes on where it stopped."""
    from megalith.config import ConfigError
    from megalith.sources import flag_parser, moved_run_files, read_command_line

    if "-h" in words or "--help" in words:
        flag_parser().print_help()
        return 0
    rank, world_size, local_rank = ranks_in(os.environ)
    try:
        run = read_command_line(words)
    except ConfigError:
        # Said by one rank of each node.
        if local_rank == 0:
            raise
        return FAULT
    if run.parallel.nproc is not None and "RANK" not in os.environ:
        return start_ranks(words, run)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun leaves its ranks behind when it is killed.
        end_with_parent()

    from megalith.monitor.signals import ending_at_once, stopped_status

    status = stopped_status(saves=run.checkpoint.save is not None)
    with ending_at_once(status, speaks=speaks_for_all(rank)):
        from megalith.check import check
        from megalith.check_files import file_faults

        if faults := [*check(run, world_size), *file_faults(run), *moved_run_files(words, run)]:
            # One rank of each node, which has a command line and files of its own; the others fail alike.
            if local_rank == 0:
                raise ConfigError(faults)
            return FAULT

        from megalith.train import train

        return train(run, started=started)


def start_ranks(words: Sequence[str], run: "Run") -> int:
    """Start that many processes on this machine, and end with their status."""
    from megalith.launch import launch

    parallel = run.parallel
    assert parallel.nproc is not None
    command = [sys.executable, "-m", "megalith", "pretrain", *words]
    return launch(
        command,
        parallel.nproc,
        stop_grace=parallel.stop_grace,
        max_restarts=parallel.max_restarts,
        signals_wait=True,
    )


def preprocess(words: Sequence[str], started: float) -> int:
    """Turn text (JSON lines, plain text, parquet) into the token files that training reads."""
    from megalith.preprocess import main as preprocess_main

    return preprocess_main(words)


def verify(words: Sequence[str], started: float) -> int:
    """Hold token files and run directories against what was recorded of them, byte for byte."""
    from megalith.verify import main as verify_main

    return verify_main(words)


def generate(words: Sequence[str], started: float) -> int:
    """Continue prompts with a trained model."""
    parser = CommandParser(prog="megalith generate", description=generate.__doc__)
    parser.add_argument("run", help="run directory (what --save named)")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated"
    )
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="[tokens; default 100]")
    parser.add_argument("--temperature", type=float, metavar="X", help="[default 0.8]")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="only the N likeliest tokens [0: all]")
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="X", help="only the likeliest tokens that make up X"
    )
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="[default 1234]")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use [the newest]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(words)
    if options.max_new_tokens < 1:
        raise ValueError(
            f"--max-new-tokens = {options.max_new_tokens}: must be greater than 0. Give a positive number."
        )
    if options.seed < 0:
        raise ValueError(f"--seed = {options.seed}: must be 0 or greater. Give another number.")
    if options.greedy and options.temperature is not None:
        raise ValueError(f"--temperature = {options.temperature}: --greedy draws nothing. Leave one of them out.")
    for prompt in options.prompt:
        if why_no_text(prompt) is not None:
            raise ValueError(f"--prompt = {prompt!a}: is no text in UTF-8. Correct it.")
    temperature = 0.8 if options.temperature is None else options.temperature

    from megalith.evaluate.generate import Sampling
    from megalith.trained import talk

    sampling = Sampling(
        temperature=0.0 if options.greedy else temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    return talk(
        options.run,
        options.prompt,
        sampling,
        max_new_tokens=options.max_new_tokens,
        step=options.step,
        device=options.device,
    )


def evaluate(words: Sequence[str], started: float) -> int:
    """Loss and perplexity of a trained model on its data or on files; a vit's accuracy; what a retriever finds."""
    parser = CommandParser(prog="megalith evaluate", description=evaluate.__doc__)
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
    _add_search_flags(parser)
    _add_zeroshot_flags(parser)
    options = parser.parse_args(words)

    import json

    from megalith.trained import measure, run_of

    task = run_of(options.run).task
    if task in ("ict", "retriever"):
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
    if options.qa_data_dev or options.qa_data_test:
        raise ValueError(f"--qa-data-dev, --qa-data-test: {options.run} holds a {task} model; questions are for an ict")
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
    for name, value in report.items():
        print(f"{name:>14}: {value:,.4f}" if isinstance(value, float) else f"{name:>14}: {printable(str(value))}")
    return 0


def _add_zeroshot_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of zero-shot tasks, Megatron-LM's where it has them."""
    add = parser.add_argument_group("zero-shot tasks of a gpt").add_argument
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
    add("--detokenize", choices=("wikitext", "ptb", "none"), help="tokenization to undo [by the file's name]")


def _evaluate_zeroshot(options: argparse.Namespace) -> int:
    import json

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


def _add_search_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of open-domain question answering, Megatron-LM's where it has them."""
    add = parser.add_argument_group("of a bi-encoder (ict)").add_argument
    for split in ("dev", "test"):
        add(f"--qa-data-{split}", metavar="TSV", help="questions, each with a list of answers")
    add("--evidence-data-path", metavar="TSV", help="the passages [what the run says]")
    add("--embedding-path", metavar="FILE", help="what megalith index made of them [what the run says]")
    add("--faiss-topk-retrievals", type=int, default=100, metavar="N", help="passages found for a question [100]")
    add("--faiss-match", choices=("string", "regex"), default="string", help="answers are words, or patterns [string]")
    add("--faiss-use-gpu", action="store_true", help="accepted; the exact search runs on the GPU with --device cuda")
    add("--search", choices=("torch", "faiss"), default="torch", help="exact products, or FAISS's flat index [torch]")
    add("--retriever-report-topk-accuracies", type=int, nargs="+", metavar="K", help="which accuracies to print")


def index(words: Sequence[str], started: float) -> int:
    """Embed passages with a trained bi-encoder (ict), to be searched by megalith evaluate."""
    from megalith.indexing import main as index_main

    return index_main(words)


def finetune(words: Sequence[str], started: float) -> int:
    """Fine-tune a trained BERT to class pairs of sentences (MNLI, QQP); the flags of pretrain may follow."""
    from megalith.finetune import main as finetune_main

    return finetune_main(words, started=started, pretrain=pretrain)


def convert(words: Sequence[str], started: float) -> int:
    """Turn a Megatron-LM checkpoint into a run directory, or a run directory into a Megatron-LM checkpoint."""
    from megalith.convert import main as convert_main

    return convert_main(words)


def bench(words: Sequence[str], started: float) -> int:
    """Measure how fast a model trains on this machine, with the flags of pretrain and without data."""
    from megalith.bench import main as bench_main

    return bench_main(words, started=started)


def plan(words: Sequence[str], started: float) -> int:
    """Say what a job of any size will need on each rank, before it is queued."""
    from megalith.forecast import main as plan_main

    return plan_main(words)


COMMANDS: dict[str, Callable[[Sequence[str], float], int]] = {
    "pretrain": pretrain,
    "preprocess": preprocess,
    "verify": verify,
    "generate": generate,
    "evaluate": evaluate,
    "index": index,
    "finetune": finetune,
    "convert": convert,
    "bench": bench,
    "plan": plan,
}
