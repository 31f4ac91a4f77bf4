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
import torch

from megalith.data.bpe import byte_symbols
from megalith.data.indexed import IndexedWriter
from megalith.layers.products import has_instructions_for

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
    warnings = split_warnings(lines)[1]
    of_processor = [text for text in warnings if text.startswith("--fp16: this processor has no instructions")]
    nothing_saved, overflows, heads, repeated = (text for text in warnings if text not in of_processor)
    is_slow = not torch.cuda.is_available() and not has_instructions_for(torch.float16)
    assert len(of_processor) == is_slow
    assert nothing_saved.startswith("nothing will be saved: --save was not given")
    assert "4294967296" in overflows and "about 17 steps will be skipped" in overflows
    assert heads.startswith("--num-attention-heads = 25 can be cut over [5, 25]")
    assert repeated.partition("/my-gpt2_text_document ")[2].startswith("is repeated 13,508 times")
    # The first three follow the arguments they speak of, the last the maps.
    assert lines[lines.index("setting number of micro-batches to constant 8") + 1] == WARNING + nothing_saved
    assert lines[lines.index("    total number of epochs: 13508") + 1] == WARNING + repeated


TINY = (
    *"--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 2 --max-position-embeddings 2".split(),
    # Wider starting weights, at which gradients overflow about as often as in the log's run.
    *"--init-method-std 0.1".split(),
    # All samples are alike and there is no dropout: then the loss tells of the weights alone.
    *"--hidden-dropout 0 --attention-dropout 0".split(),
)
ITERATION = re.compile(
    r" iteration +(?P<step>\d+)/ +(?P<last>\d+) \| consumed samples: +(?P<consumed>\d+) \| elapsed time per iteration "
    r"\(ms\): \d+\.\d \| learning rate: (?P<rate>\d\.\d{3}E[+-]\d\d) \| global batch size: +(?P<batch>\d+) \|"
    r"( lm loss: (?P<loss>\d\.\d{6}E[+-]\d\d) \|)? loss scale: (?P<scale>\d+\.0) \|"
    r"( grad norm: (?P<norm>\d+\.\d{3}) \|)? number of skipped iterations: +(?P<skipped>\d) \| "
    r"number of nan iterations: +(?P<nan>\d) \|"
)
# Timers of steps that move no weights, and what an update adds. Copies between two sets of weights are not made here,
# and a single stage has no second copy of the table to reduce.
TIMERS = ["forward-compute", "backward-compute", "backward-params-all-reduce", "optimizer-unscale-and-check-inf"]
TIMERS += ["optimizer-clip-main-grad", "optimizer", "batch-generator"]
NOT_HERE = {"backward-embedding-all-reduce", "optimizer-copy-to-main-grad", "optimizer-copy-main-to-model-params"}


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the log's corpus, of one token, and a small tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    write_corpus(folder, lambda document, place: 7)
    write_tokenizer(folder, 1)
    return folder


@pytest.fixture(scope="module")
def tiny_run(tiny_data: Path) -> list[str]:
    """What 24 steps of a tiny shape print under the same command."""
    lines = pretrain(reference_words(tiny_data, *TINY, "--exit-interval", "24"))[0]
    # What 1000 steps without --save risk is told where they would take hours, which this machine may or may not need.
    return [line for line in lines if "a kill would cost" not in line]


def after(lines: Sequence[str], line: str) -> list[str]:
    return list(lines[list(lines).index(line) + 1 :])


def iterations(lines: Sequence[str]) -> list[dict[str, str]]:
    """The fields of the iteration lines."""
    fields = [ITERATION.fullmatch(line) for line in lines if line.startswith(" iteration")]
    assert all(fields)
    return [found.groupdict() for found in fields if found]


def timer_names(line: str) -> list[str]:
    title, *timers = line.split(" | ")
    assert title == "time (ms)"
    assert all(re.fullmatch(r"[a-z-]+: \d+\.\d\d", timer) for timer in timers)
    return [timer.split(": ")[0] for timer in timers]


def kinds(lines: Sequence[str]) -> list[str]:
    """What each line of training is, one letter for a line: (s)kipped, (u)pdated, (m)emory, (t)imers, (d)ate."""
    words = {" iteration": "u", "time (ms) | ": "t", "[Rank 0] (after ": "m", "[": "d"}
    letters = []
    for line in lines:
        letter = next(letter for start, letter in words.items() if line.startswith(start))
        letters.append("s" if letter == "u" and "skipped iterations:   1" in line else letter)
    return letters


def test_the_lines_of_training_come_in_the_logs_order(tiny_run: list[str], golden: Path) -> None:
    for lines, ends in ((after(expected(golden), "training ..."), 0), (after(tiny_run, "training ..."), 1)):
        assert re.fullmatch("d(st)+umt([su]t)*" + "d" * ends, "".join(kinds(lines)))
    assert re.fullmatch(r"\[exiting program at iteration 24\] datetime: [-\d]+ [\d:]+ ", tiny_run[-1])


def test_each_step_counts_as_in_the_log(tiny_run: list[str], golden: Path) -> None:
    counted = ("step", "last", "consumed", "batch", "nan")
    ours, logged = iterations(tiny_run), iterations(expected(golden))
    assert len(ours) == len(logged) == 24
    assert [[fields[name] for name in counted] for fields in ours] == [
        [fields[name] for name in counted] for fields in logged
    ]


def test_the_loss_scale_halves_at_each_overflow_but_the_first(tiny_run: list[str], golden: Path) -> None:
    for lines in (tiny_run, expected(golden)):
        scale, tolerated = 2.0**32, 2
        for fields in iterations(lines):
            if fields["skipped"] == "1":
                tolerated -= 1
                scale = scale / 2 if tolerated <= 0 else scale
            assert float(fields["scale"]) == scale
            assert (fields["loss"] is None) == (fields["norm"] is None) == (fields["skipped"] == "1")


def test_the_learning_rate_waits_for_the_first_update_and_is_the_next_steps(tiny_run: list[str], golden: Path) -> None:
    ours, logged = iterations(tiny_run), iterations(expected(golden))
    for fields in (ours, logged):
        first = next(number for number, step in enumerate(fields) if step["skipped"] == "0")
        assert {step["rate"] for step in fields[:first]} == {"0.000E+00"}
    rates = [step["rate"] for step in logged if step["skipped"] == "0"]
    assert rates[:4] == ["4.687E-05", "9.375E-05", "1.406E-04", "1.500E-04"]
    assert [step["rate"] for step in ours if step["skipped"] == "0"][: len(rates)] == rates


def test_the_first_two_updates_see_the_same_weights(tiny_run: list[str]) -> None:
    # The first has rate 0. All samples are alike, so the same weights have the same loss, to the last digit.
    first, second, third = [step["loss"] for step in iterations(tiny_run) if step["skipped"] == "0"][:3]
    assert first == second
    assert float(third) < float(second)


def test_the_memory_line_follows_the_first_update(tiny_run: list[str], golden: Path) -> None:
    pattern = re.compile(
        r"\[Rank 0\] \(after (\d+) iterations\) memory \(MB\) \| allocated: \d+\.\d+ \| max allocated: \d+\.\d+ "
        r"\| reserved: \d+\.\d+ \| max reserved: \d+\.\d+"
    )
    for lines in (tiny_run, expected(golden)):
        first = next(step["step"] for step in iterations(lines) if step["skipped"] == "0")
        (line,) = [line for line in lines if line.startswith("[Rank ")]
        found = pattern.fullmatch(line)
        assert found is not None and found[1] == first


def test_the_timers_are_the_logs_where_their_work_exists(tiny_run: list[str], golden: Path) -> None:
    ours, logged = (after(lines, "training ...") for lines in (tiny_run, expected(golden)))
    updates = [timer_names(lines[kinds(lines).index("m") + 1]) for lines in (ours, logged)]
    assert updates[0] == TIMERS == [name for name in updates[1] if name not in NOT_HERE]
    skips = [timer_names(lines[2]) for lines in (ours, logged)]
    assert skips[0] == [name for name in TIMERS if name != "optimizer-clip-main-grad"]
    assert skips[0] == [name for name in skips[1] if name not in NOT_HERE]


@pytest.fixture(scope="module")
def saved_runs(tiny_data: Path) -> list[list[str]]:
    """What a tiny run of two steps prints, one that goes on to a third, and one to a fourth as JSON."""
    changes = [
        *TINY,
        "--initial-loss-scale",
        "1024",
        "--eval-interval",
        "2",
        "--eval-iters",
        "2",
        "--save-interval",
        "1",
    ]
    runs = []
    for number, more in enumerate(([], [], ["--log-format", "json"]), 2):
        words = reference_words(
            tiny_data, *changes, "--save", f"{tiny_data}/saved", "--train-iters", str(number), *more
        )
        # The second under the name of Megatron-LM's program.
        runs.append(pretrain(words, ["megalith.pretrain_gpt"] if number == 3 else ["megalith", "pretrain"])[0])
    return runs


def test_the_end_of_a_run_reads_as_megatron_lms(saved_runs: list[list[str]], tiny_data: Path) -> None:
    number = r"\d\.\d{6}E[+-]\d\d"
    text = re.compile(rf" validation loss at (.*) \| lm loss value: {number} \| lm loss PPL: {number} \| ")
    lines = after(saved_runs[0], "training ...")
    found = [(place, text.fullmatch(line)) for place, line in enumerate(lines) if line.startswith(" validation loss")]
    assert [match and match[1] for _, match in found] == [
        "iteration 2",
        "the end of training for val data",
        "the end of training for test data",
    ]
    for place, match in found:
        assert match is not None
        assert lines[place - 1] == lines[place + 1] == "-" * (len(match[0]) + 1)
    done = next(place for place, line in enumerate(lines) if line.startswith("[after training is done] datetime: "))
    assert found[0][0] < done < found[1][0]
    assert lines[found[2][0] - 3 : found[2][0] - 1] == ["Evaluating iter 1/2", "Evaluating iter 2/2"]
    for step in (1, 2):
        begun = lines.index(f"saving checkpoint at iteration {step:7d} to {tiny_data}/saved")
        written = lines.index(f"  successfully saved checkpoint at iteration {step:7d} to {tiny_data}/saved")
        assert begun < written
        assert re.fullmatch(r"time \(ms\) \| save-checkpoint: \d+\.\d\d", lines[written + 1])


def test_a_run_that_goes_on_says_what_it_loads(saved_runs: list[list[str]], tiny_data: Path) -> None:
    lines = after(saved_runs[1], "> learning rate decay style: cosine")
    assert lines[:6] == [
        f" loading checkpoint from {tiny_data}/saved at iteration 2",
        " > using checkpoint value 0.00015 for learning rate",
        " > using checkpoint value 1e-05 for minimum learning rate",
        " > using checkpoint value 204.8 for warmup iterations",
        " > using checkpoint value 20480 for total number of iterations",
        " > using checkpoint value cosine for decay style",
    ]
    assert re.fullmatch(r" checkpoint version \S+", lines[6])
    assert lines[7] == f"  successfully loaded checkpoint from {tiny_data}/saved at iteration 2"
    assert re.fullmatch(r"time \(ms\) \| load-checkpoint: \d+\.\d\d", lines[8])
    (step,) = iterations(lines)
    assert (step["step"], step["consumed"], step["rate"]) == ("3", "192", "1.406E-04")


def test_a_run_asked_for_json_prints_one_object_a_line(saved_runs: list[list[str]]) -> None:
    records = [json.loads(line) for line in saved_runs[2]]
    assert all(set(record) >= {"event", "time"} for record in records)
    (started,) = [record for record in records if record["event"] == "run_started"]
    assert len(started["arguments"]) == 139
    (step,) = [record for record in records if record["event"] == "interval_done"]
    assert (step["step"], step["consumed_samples"], step["num_skipped"]) == (4, 256, 0)
    assert records[0]["event"] == "run_started"
    (ended,) = [record for record in records if record["event"] == "run_ended"]
    assert ended["reason"] == "done"


def test_two_ranks_of_a_model_speak_with_one_voice(tiny_data: Path) -> None:
    changes = "--initial-loss-scale 1024 --exit-interval 1 --tensor-model-parallel-size 2 --nproc 2".split()
    lines, _ = pretrain(reference_words(tiny_data, *TINY, *changes))
    assert lines[0].startswith("using world size: 2, data-parallel-size: 1, tensor-model-parallel size: 2, ")
    assert f"  rank {'.' * 44} 0" in lines and f"  world_size {'.' * 38} 2" in lines
    seeds = next(line for line in lines if line.startswith("> initializing model parallel cuda seeds"))
    assert "global rank 0, model parallel rank 0, and data parallel rank 0" in seeds
    counts = [line for line in lines if line.startswith(" > number of parameters on ")]
    assert [line.partition(" rank ")[2][:6] for line in counts] == ["(0, 0)", "(1, 0)"]
    memory = [line for line in lines if " memory (MB) | allocated: " in line]
    assert [line.partition("]")[0] for line in memory] == ["[Rank 0", "[Rank 1"]
    assert len(iterations(lines)) == 1
