"""Megatron-LM's command line, started as a process, says what run.log says: the same lines in the same order.

Two runs share the work. A dry start of the whole command on a corpus with the log's numbers gives every line up to the
first step; a tiny shape under the same command gives the steps. Words and layout must be equal, and so must every
number except times, dates, paths and what a tiny shape changes.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megalith.data.bpe import byte_symbols
from megalith.data.indexed import IndexedWriter

# What compilers and their build tools printed: nothing is compiled when Megalith starts.
COMPILING = re.compile(
    r"make: |> compiling |>>> done with |Detected CUDA files|Emitting ninja|Building extension|Allowing ninja|ninja: "
    r"|Loading extension"
)
# Megatron-LM's words where index maps must be made first: the log's run found them made.
MAPS_MADE = re.compile(
    r" > WARNING: could not find index map| > last epoch number of| > elasped time to build| > building shuffle index"
    r"|    using:|     number of (documents|epochs): |     sequence length: |     total number of samples: "
)
WARNING = "WARNING: "
# What a line is to be equal in, by what stands for the rest.
FREE = [
    (re.compile(r"datetime: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d "), "datetime: WHEN "),
    (re.compile(r"\d+\.\d{6} seconds"), "6-DECIMALS seconds"),
    (re.compile(r"\d+\.\d{3} seconds"), "3-DECIMALS seconds"),
    (re.compile(r"megatron \(seconds\): \d+\.\d{3}$"), "megatron (seconds): 3-DECIMALS"),
    (re.compile(r"(setup): \d+\.\d\d"), r"\1: 2-DECIMALS"),
    (re.compile(r"per iteration \(ms\): \d+\.\d \|"), "per iteration (ms): 1-DECIMAL |"),
    (re.compile(r"[^ ']*/(?=my-gpt2|gpt2-)"), "FOLDER/"),
]
# Reads what a child process used, from a parent too small to be mistaken for it.
MEASURED = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(status)
"""

# The documents of the log's corpus: these have 5 tokens, the others 6.
SHORT = {*range(20), 812, 813, 814, 913, 914, 915}


def write_corpus(folder: Path, token: Callable[[int, int], int]) -> None:
    """1014 documents whose lengths give the log's numbers of epochs; token: its id by document and place."""
    with IndexedWriter(folder / "my-gpt2_text_document", np.uint16) as writer:
        for document in range(1014):
            length = 5 if document in SHORT else 6
            writer.add_document([[token(document, place) for place in range(length)]])


def write_tokenizer(folder: Path, num_merges: int) -> None:
    """A tokenizer in GPT-2's form: 256 bytes, that many merges of two bytes, and the end of a text."""
    symbols = byte_symbols()
    merges = [(first, second) for first in symbols for second in symbols][:num_merges]
    tokens = [*symbols, *(first + second for first, second in merges), "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "gpt2-vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    pairs = "".join(f"{first} {second}\n" for first, second in merges)
    (folder / "gpt2-merges.txt").write_text("#version: 0.2\n" + pairs, encoding="utf-8")


def reference_words(folder: Path, *changes: str) -> list[str]:
    """The command line behind the log, with its files in folder; a later flag wins over an earlier one."""
    return [
        *"--num-layers 48 --hidden-size 1600 --num-attention-heads 25 --micro-batch-size 8".split(),
        *"--global-batch-size 64 --seq-length 1024 --max-position-embeddings 1024 --train-iters 1000".split(),
        *f"--lr-decay-iters 320 --data-path {folder}/my-gpt2_text_document".split(),
        *f"--vocab-file {folder}/gpt2-vocab.json --merge-file {folder}/gpt2-merges.txt".split(),
        *"--data-impl mmap --split 800,100,100 --distributed-backend nccl --lr 0.00015 --min-lr 1.0e-5".split(),
        *"--lr-decay-style cosine --weight-decay 1e-2 --clip-grad 1.0 --lr-warmup-fraction .01".split(),
        *"--checkpoint-activations --log-interval 1 --save-interval 10000 --eval-interval 1000".split(),
        *"--eval-iters 10 --fp16".split(),
        *changes,
    ]


def pretrain(words: Sequence[str], program: Sequence[str] = ("megalith", "pretrain")) -> tuple[list[str], int]:
    """The lines that `python -m PROGRAM WORDS` prints into a pipe, and the most memory it held, in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TZ": "UTC"}
    command = [sys.executable, "-c", MEASURED, sys.executable, "-W", "error", "-m", *program, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    *complaints, peak = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    assert complaints == []
    assert done.stdout.endswith("\n")
    return done.stdout[:-1].split("\n"), 1024 * int(peak.removeprefix("peak "))


def comparable(line: str) -> str:
    """The line with what is free to differ replaced by its form."""
    for pattern, form in FREE:
        line = pattern.sub(form, line)
    return line


def expected(golden: Path) -> list[str]:
    """The log of Megatron-LM's run, without what compilers said."""
    return [line for line in (golden / "run.log").read_text().split("\n")[:-1] if not COMPILING.match(line)]


def split_warnings(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """The lines without our warnings, and the warnings."""
    return [line for line in lines if not line.startswith(WARNING)], [
        line.removeprefix(WARNING) for line in lines if line.startswith(WARNING)
    ]


@pytest.fixture(scope="module")
def dry_start(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], int]:
    """What the whole command line prints when it is to stop before the first step, and its peak memory."""
    folder = tmp_path_factory.mktemp("dry")
    write_corpus(folder, lambda document, place: (131 * document + 17 * place + 7) % 50000)
    write_tokenizer(folder, 50000)
    return pretrain(reference_words(folder, "--exit-before-training"))


def test_every_line_before_the_first_step_is_the_logs(dry_start: tuple[list[str], int], golden: Path) -> None:
    lines, _ = split_warnings(dry_start[0])
    assert lines.pop() == "nothing was trained: --exit-before-training (gpt, 1000 steps)"
    lines = [line for line in lines if not MAPS_MADE.match(line)]
    wanted = expected(golden)
    wanted = wanted[: wanted.index("training ...")]
    assert [comparable(line) for line in lines] == [comparable(line) for line in wanted]


def test_the_index_maps_are_announced_as_megatron_lm_makes_them(dry_start: tuple[list[str], int], golden: Path) -> None:
    cases = json.loads((golden / "gpt_index_maps.json").read_text())["cases"]
    case = next(c for c in cases if c["corpus"] == "F_log1014" and c["name"] == "valid" and "python_stdout" in c)
    wanted = [line for line in case["python_stdout"] if MAPS_MADE.match(line)]
    lines = dry_start[0]
    begin = lines.index("    total number of epochs: 13508") + 1
    end = next(number for number in range(begin, len(lines)) if lines[number].startswith(" > loading doc-idx"))
    seconds = re.compile(r"\(seconds\): \d+\.\d{6}$")
    # What the reference's C++ helper printed is not among the lines of its Python.
    own = [line for line in split_warnings(lines[begin:end])[0] if not line.startswith("    ")]
    assert [seconds.sub("X", line) for line in own] == [seconds.sub("X", line) for line in wanted]
    assert "     number of epochs:          2174" in lines[begin:end]


def test_the_full_shape_starts_within_two_gigabytes(dry_start: tuple[list[str], int]) -> None:
    lines, peak = dry_start
    assert " > number of parameters on (tensor, pipeline) model parallel rank (0, 0): 1557686400" in lines
    assert peak < 2 * 2**30


def test_the_reference_command_is_warned_of_what_its_log_shows(dry_start: tuple[list[str], int]) -> None:
    lines, _ = dry_start
    nothing_saved, overflows, heads, repeated = split_warnings(lines)[1]
    assert nothing_saved.startswith("nothing will be saved: --save was not given")
    assert "4294967296" in overflows and "about 17 steps will be skipped" in overflows
    assert heads.startswith("--num-attention-heads = 25 can be cut over [5, 25]")
    assert repeated.partition("/my-gpt2_text_document ")[2].startswith("is repeated 13,508 times")
    # The first three follow the arguments they speak of, the last the maps.
    assert lines[lines.index("setting number of micro-batches to constant 8") + 1] == WARNING + nothing_saved
    assert lines[lines.index("    total number of epochs: 13508") + 1] == WARNING + repeated
