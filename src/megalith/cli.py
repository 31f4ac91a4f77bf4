"""The command `megalith` and its subcommands. What a user got wrong is said in a sentence each, without a traceback.

Nothing heavy is imported before it is known that the words make sense.
"""

import difflib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, TextIO, cast

from megalith.descriptors import allow_most_descriptors, descriptor_remedy, open_standard_streams
from megalith.launch import (
    PEER_LOST,
    LeftToAnotherError,
    PeerLostError,
    end_with_parent,
    handled,
    heard,
    one_of_a_node_tells,
    ranks_in,
    speaks_for_all,
)
from megalith.spinning import spin_shortly
from megalith.terminal import Answer, printable, say

if TYPE_CHECKING:
    from megalith.config import Run

FAULT = 2  # exit status of a command that could not start
ANSWERING = ("verify", "generate", "evaluate", "bench", "plan")  # commands of which nothing is left but what they print
ALONE = ("preprocess", "verify", "generate", "evaluate", "convert", "plan")  # commands that one process does
# What to do, by the number of an error of the system that nobody has met nearer to where it arose.
REMEDIES = {
    errno.EACCES: "Correct its permissions, or name another",
    errno.EPERM: "Correct its permissions, or name another",
    errno.EDQUOT: "Make room",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or choose another place",
    errno.EIO: "See to the disk",
    errno.EISDIR: "Name a file",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ENOENT: "Correct the path",
    errno.ENOSPC: "Make room",
    errno.ENOTDIR: "Correct the path",
    errno.EROFS: "Choose another place",
}
INTERRUPTED = 130  # by Ctrl-C; what shells call a process that SIGINT has ended
OUT_OF_MEMORY = 79  # of one that got no more memory, on the host or on a device
WHOLE = "checkpoints that were saved are whole; the same command goes on from the newest"
# What to know then, by command.
AFTER_OUT_OF_MEMORY = {"pretrain": WHOLE, "finetune": WHOLE, "bench": "a smaller --micro-batch-size needs less"}


def main(words: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the exit status."""
    started = time.monotonic()
    closed = open_standard_streams()
    allow_most_descriptors()
    # Nothing that is written can be changed by everybody, whatever the umask was.
    os.umask(os.umask(0o022) | 0o002)
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        return _say(usage(), 0 if words else FAULT)
    if words[0] == "--version":
        from megalith import __version__

        return _say(f"megalith {__version__}", 0)
    command = COMMANDS.get(words[0])
    if command is None:
        print(f"megalith: {printable(words[0])} is not a command. {_meant(words[0])}", file=sys.stderr)
        return FAULT
    spin_shortly()
    try:
        if words[0] in ALONE and not _is_first(words[0]):
            return 0
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
        return INTERRUPTED
    except BrokenPipeError:
        return _without_reader()
    except LeftToAnotherError:
        return FAULT
    except PeerLostError as error:
        if text := str(error):  # else another rank says it
            print(f"megalith: rank {os.environ.get('RANK', '0')} ends: {printable(text)}", file=sys.stderr)
        return PEER_LOST
    except (MemoryError, RuntimeError, ImportError) as error:
        if descriptor_remedy(str(error)) is not None:
            return _tell(error)
        if not isinstance(error, MemoryError):  # then there is no room for a module
            from megalith.monitor.memory import is_out_of_memory

            if not is_out_of_memory(error):
                from megalith.checkpoint.directory import CheckpointError

                if isinstance(error, CheckpointError):
                    return _tell(error)
                raise
        said = str(error).splitlines() or ["no more can be had"]
        print(f"megalith: out of memory: {printable(said[0])}", file=sys.stderr)
        if then := AFTER_OUT_OF_MEMORY.get(words[0]):
            print(f"megalith: {then}", file=sys.stderr)
        return OUT_OF_MEMORY
    except (ValueError, OSError) as error:
        return _tell(error)


@contextmanager
def _importing() -> Iterator[None]:
    """While entered, Ctrl-C ends the process at once: raised while a library is imported, it may be lost there, or
    come out as another error.
    """

    def end(number: int, frame: object) -> None:
        say("interrupted")
        os._exit(INTERRUPTED)

    takes_over = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with handled([signal.SIGINT] if takes_over else [], end):
        yield


@contextmanager
def _removing_what_is_half_written() -> Iterator[None]:
    """While entered, SIGTERM and SIGHUP end the process as Ctrl-C does: not before its temporary files are gone."""

    def end(number: int, frame: object) -> None:
        say(f"ended by {signal.Signals(number).name}")
        raise SystemExit(128 + number)

    with handled([number for number in heard() if number in (signal.SIGTERM, signal.SIGHUP)], end):
        yield


def _is_first(command: str) -> bool:
    """Whether this process is to do what one process does alone: rank 0; said on each node where there are others."""
    rank, world_size, local_rank = ranks_in(os.environ)
    # What SLURM tells of ranks a script of sbatch hears too, which has none beside it.
    if world_size > 1 and local_rank == 0 and "WORLD_SIZE" in os.environ:
        print(
            f"note: megalith {command} is one process: rank 0 of {world_size} does it, the others do nothing (RANK = "
            f"{rank}). Start it without torchrun.",
            file=sys.stderr,
        )
    return rank == 0


def _say(text: str, status: int) -> int:
    """Print the text; give the status, or that of an output whose reader went away."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        return _without_reader()
    return status


def _without_reader() -> int:
    """The exit status where the reader of our output went away; a second write at exit does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _tell(error: Exception) -> int:
    """Say what a user can correct, a line for each fault; give the exit status."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        from megalith.files import name_at_the_end

        # Of a rename that failed the second name is what was to be written, the first one a temporary file's.
        path = error.filename2 or error.filename
        said = "an operation of the system failed" if path is None else name_at_the_end(os.fsdecode(path))
        text = f"{said}: {error.strerror}"
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
    from megalith.elsewhere import COMMANDS_ELSEWHERE

    if word in TASKS:
        return f"Did you mean megalith pretrain {word}?"
    if meant := COMMANDS_ELSEWHERE.get(word.split("=")[0]):
        return f"Did you mean {meant}?"
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
    rank, world_size, _ = ranks_in(os.environ)
    with one_of_a_node_tells():
        run = read_command_line(words)
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

        with one_of_a_node_tells():
            if faults := [*check(run, world_size), *file_faults(run), *moved_run_files(words, run)]:
                raise ConfigError(faults)

        from megalith.train import train

        return train(run, started=started)


def start_ranks(words: Sequence[str], run: "Run") -> int:
    """Start that many processes on this machine, and end with their status."""
    from megalith.launch import as_program, launch

    parallel = run.parallel
    assert parallel.nproc is not None
    command = as_program("megalith", "pretrain", *words)
    return launch(
        command,
        parallel.nproc,
        stop_grace=parallel.stop_grace,
        max_restarts=parallel.max_restarts,
        signals_wait=True,
    )


def preprocess(words: Sequence[str], started: float) -> int:
    """Turn text (JSON lines, plain text, parquet) into the token files that training reads."""
    with _importing():
        from megalith.preprocess import main as preprocess_main

    with _removing_what_is_half_written():
        return preprocess_main(words)


def verify(words: Sequence[str], started: float) -> int:
    """Hold token files and run directories against what was recorded of them, byte for byte."""
    from megalith.asked import asked_of_verify

    options = asked_of_verify(words)
    with _importing():
        from megalith.verify import verify_all

    return verify_all(options.path, vocab_size=options.vocab_size, as_json=options.json)


def generate(words: Sequence[str], started: float) -> int:
    """Continue prompts with a trained model."""
    with _importing():
        from megalith.generating import main as generate_main

    return generate_main(words)


def evaluate(words: Sequence[str], started: float) -> int:
    """Loss and perplexity of a trained model on its data or on files; a vit's accuracy; what a retriever finds."""
    with _importing():
        from megalith.measuring import main as evaluate_main

    return evaluate_main(words)


def index(words: Sequence[str], started: float) -> int:
    """Embed passages with a trained bi-encoder (ict), to be searched by megalith evaluate."""
    from megalith.asked import asked_of_index

    with one_of_a_node_tells():
        options = asked_of_index(words)
    with _importing():
        from megalith.indexing import main as index_main

    return index_main(options, words)


def finetune(words: Sequence[str], started: float) -> int:
    """Fine-tune a trained BERT to class pairs of sentences, or an ict to answer questions; with pretrain's flags."""
    from megalith.asked import asked_of_finetune

    with one_of_a_node_tells():
        asked = asked_of_finetune(words)
    with _importing():
        from megalith.finetune import pretrain_words

    with one_of_a_node_tells():
        begun = pretrain_words(asked)
    return pretrain(begun, started)


def convert(words: Sequence[str], started: float) -> int:
    """Turn a checkpoint of Megatron-LM or Hugging Face into a run directory, or a run directory into one."""
    with _importing():
        from megalith.convert import main as convert_main

    with _removing_what_is_half_written():
        return convert_main(words)


def bench(words: Sequence[str], started: float) -> int:
    """Measure how fast a model trains on this machine, with the flags of pretrain and without data."""
    from megalith.asked import asked_of_bench

    with one_of_a_node_tells():
        asked = asked_of_bench(words)
    with _importing():
        from megalith.bench import main as bench_main

    return bench_main(asked, words, started=started)


def plan(words: Sequence[str], started: float) -> int:
    """Say what a job of any size will need on each rank, before it is queued."""
    from megalith.asked import asked_of_plan

    asked = asked_of_plan(words)
    with _importing():
        from megalith.forecast import main as plan_main

    return plan_main(asked)


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
