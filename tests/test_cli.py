"""What a newcomer meets first: the commands, and a sentence for each mistake."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalith.cli import ALONE, COMMANDS, OUT_OF_MEMORY, main
from megalith.data.indexed import IndexedWriter
from megalith.launch import SECONDS_TO_TELL
from tests.layouts.runs import run_on, write_data
from tests.processes import permissions_hold

# Root has its privileges again once it executes a program, so the program gives them up.
WITHOUT_PRIVILEGES = """
import sys
from megalith.cli import main
from tests.processes import give_up_privileges
give_up_privileges()
sys.exit(main())
"""

NO_TORCH = """
class Asking:
    def find_spec(self, name, path=None, target=None):
        assert name != "torch"

"""

# As C code of numpy's and torch's does at times, the import loses the exception that Ctrl-C is in Python.
LOSES_INTERRUPTION = """
import signal
import sys
from contextlib import suppress
from megalith.cli import main

class Losing:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Losing())
sys.exit(main(["bench", "--num-layers", "0"]))
"""


def megalith(*words: str, cwd: Path | None = None, unprivileged: bool = False) -> "subprocess.CompletedProcess[str]":
    """The command, ended. unprivileged: permissions hold for it, even if it is root's."""
    program = ["-c", WITHOUT_PRIVILEGES] if unprivileged else ["-m", "megalith"]
    return subprocess.run([sys.executable, *program, *words], capture_output=True, text=True, timeout=120, cwd=cwd)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_on(1, ["--train-iters", "3"], folder / "run", write_data(folder)) == 0
    return folder / "run"


def test_too_little_memory_for_torch_itself_is_said(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (200 << 20, 200 << 20))

    words = [sys.executable, "-m", "megalith", "pretrain", "--preset", "quickstart", "--save", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, preexec_fn=limit)
    assert done.returncode == OUT_OF_MEMORY and "megalith: out of memory: " in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ALONE)
def test_what_one_process_does_is_done_by_rank_0_alone(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def work(words: Sequence[str], started: float) -> int:
        done.append(os.environ["RANK"])
        return 5

    monkeypatch.setitem(COMMANDS, command, work)
    statuses, notes = [], []
    for rank, local in ((0, 0), (1, 1), (2, 0), (3, 1)):  # two nodes
        for name, value in (("RANK", rank), ("WORLD_SIZE", 4), ("LOCAL_RANK", local)):
            monkeypatch.setenv(name, str(value))
        statuses.append(main([command]))
        notes.append(capsys.readouterr().err)
    assert (done, statuses) == (["0"], [5, 0, 0, 0])
    text = f"note: megalith {command} is one process: rank 0 of 4 does it, the others do nothing (RANK = %d). Start"
    assert notes == [f"{text % 0} it without torchrun.\n", "", f"{text % 2} it without torchrun.\n", ""]


def test_what_one_process_does_is_done_by_a_script_of_slurms_without_a_word(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8"), ("SLURM_LOCALID", "0")):
        monkeypatch.setenv(name, value)
    assert main(["verify", str(trained)]) == 0
    said = capsys.readouterr()
    assert "checkpoint" in said.out and not said.err


def test_torchrun_gives_one_answer(trained: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megalith"]
    words = ["generate", str(trained), "--greedy", "--max-new-tokens", "2", "--prompt", "ab", "--device", "cpu"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
    alone = megalith(*words)
    assert done.returncode == alone.returncode == 0, done.stderr
    assert done.stdout == alone.stdout and done.stderr.count("is one process: rank 0 of 2") == 1


@pytest.mark.parametrize("torchrun", [True, False], ids=["torchrun", "else"])
@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", "--num-layer", "3"],
        ["pretrain", "--preset", "quickstart", "--global-batch-size", "9"],
        ["bench", "--num-layer", "3"],
        ["bench", "--steps", "0"],
        ["bench", "vit", "--profile"],
        ["bench", "--preset", "quickstart", "--global-batch-size", "9"],
        ["finetune", "nowhere", "--task", "QQP", "--train-data", "a", "--valid-data", "b"],
        ["index", "nowhere", "--bath"],
    ],
    ids=lambda words: f"{words[0]} {words[1]}",
)
def test_a_mistake_is_said_by_one_rank_of_a_node_and_none_ends_before(
    words: list[str], torchrun: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("megalith.launch.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
        monkeypatch.setattr("megalith.cli.end_with_parent", lambda: None)
    for place, lines, waits in (("0", 1, 0), ("1", 0, int(torchrun))):
        monkeypatch.setenv("LOCAL_RANK", place)
        assert main(words) == 2
        said = capsys.readouterr().err
        assert (len(said.splitlines()), waited.count(SECONDS_TO_TELL)) == (lines, waits), said


def test_without_words_the_commands_are_listed() -> None:
    done = megalith()
    assert done.returncode == 2
    for command in ("pretrain", "preprocess", "generate", "evaluate", "convert"):
        assert command in done.stdout
    assert megalith("--help").returncode == 0


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_what_nobody_reads_ends_without_a_traceback(word: str) -> None:
    done = subprocess.Popen(
        [sys.executable, "-m", "megalith", word], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert done.stdout is not None
    done.stdout.close()
    assert (done.communicate()[1], done.returncode) == ("", 141)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretain"], "pretain is not a command. Did you mean pretrain?\n"),
        (["bert"], "bert is not a command. Did you mean megalith pretrain bert?\n"),
        (["xyzzy"], "xyzzy is not a command. megalith --help lists them.\n"),
        (["--local-rank=0", "pretrain"], "--local-rank=0 is not a command. Did you mean torchrun, or the module "),
        (["generate", "run", "--promt", "x"], "unrecognized arguments: --promt x. Did you mean --prompt?\n"),
        (["pretrain", "--num-layer", "3"], "--num-layer: is not a known flag. Did you mean --num-layers?"),
        (["pretrain", "gptt"], "gptt: is neither a task"),
        (["pretrain", "--preset", "quickstrat"], "Did you mean quickstart?"),
        (["pretrain", "none.toml"], "none.toml: cannot be read (No such file or directory)"),
        (["pretrain", "--preset", "gpt2-small", "--data-path", "x"], "--vocab-file: is required by GPT2BPETokenizer"),
        (["generate", "nowhere"], "nowhere: is not a run directory"),
        (
            ["generate", "run", "--temprature", "1"],
            "unrecognized arguments: --temprature 1. Did you mean --temperature?",
        ),
        (["generate", "run", "--max-new-tokens", "-3"], "--max-new-tokens = -3: must be greater than 0"),
        (["generate", "run", "--seed", "-5"], "--seed = -5: must be 0 or greater"),
        (["generate", "run", "--greedy", "--temperature", "0.5"], "--temperature = 0.5: --greedy draws nothing"),
        (["generate", "run", "--greedy", "--top-p", "0.5"], "--top-p = 0.5: --greedy draws nothing"),
        (["generate", "run", "--prompt", "a\udcff"], "--prompt = 'a\\udcff': is no text in UTF-8"),
        (["evaluate", "nowhere", "--split", "valid"], "nowhere: is not a run directory"),
        (["preprocess", "--inptu", "x"], "Did you mean --input?"),
    ],
)
def test_a_mistake_is_one_sentence_on_standard_error_and_status_2(words: list[str], said: str, tmp_path: Path) -> None:
    done = megalith(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "locale", "said"),
    [
        (b"e7\xff\xfe", {}, "e7\\udcff\\udcfe: is not valid UTF-8. Rename the file or directory."),
        (
            "caf\u00e9".encode(),
            {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            "caf\\udcc3\\udca9: cannot be read in this locale. Set PYTHONUTF8=1, or a locale of UTF-8 such as C.UTF-8.",
        ),
    ],
)
@pytest.mark.parametrize(
    ("words", "flag"),
    [(["pretrain", "--mock-data", "--save"], "--save = "), (["convert", "--from", "megatron", "x", "--to"], "")],
)
def test_a_directory_that_no_run_file_can_name_is_refused(
    words: list[str], flag: str, name: bytes, locale: dict[str, str], said: str, tmp_path: Path
) -> None:
    command = [os.fsencode(word) for word in (sys.executable, "-m", "megalith", *words)]
    done = subprocess.run(
        [*command, name], capture_output=True, timeout=120, cwd=tmp_path, env={**os.environ, **locale}
    )
    assert done.returncode == 2 and done.stderr.decode().splitlines() == [f"megalith: {flag}{said}"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["verify", "pretrain", "convert"])
def test_what_the_system_refuses_is_told_by_path_reason_and_remedy(command: str, tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    if not permissions_hold(tmp_path / "trial"):
        pytest.skip("permissions stop no process here, not even one without capabilities")
    file = Path(f"{write_data(tmp_path)}.bin")
    words = ["verify", str(file.with_suffix(""))]
    if command == "pretrain":
        sizes = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --max-position-embeddings 8"
        others = "--micro-batch-size 1 --lr 1e-3 --train-iters 1 --eval-iters 0 --tokenizer-type ByteLevelTokenizer"
        words = [command, *sizes.split(), *others.split(), "--data-path", str(file.with_suffix(""))]
    if command == "convert":
        file = tmp_path / "latest_checkpointed_iteration.txt"
        file.write_text("3")
        words = [command, "--from", "megatron", str(tmp_path), "--to", str(tmp_path / "run")]
    file.chmod(0)
    done = megalith(*words, unprivileged=True)
    said = f"megalith: {file}: Permission denied. Correct its permissions, or name another."
    assert done.returncode == 2 and done.stderr.splitlines() == [said]


def test_a_file_that_may_not_grow_is_told_by_its_own_name(trained: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megalith", "convert", "--to", "megatron", str(trained), str(tmp_path / "out")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "/.model" not in line
    assert line.endswith(": File too large. Raise the limit on the size of files (ulimit -f), or choose another place.")


def test_missing_data_is_named_with_what_lies_near(tmp_path: Path) -> None:
    prefix = write_data(tmp_path)
    words = ["--tokenizer-type", "ByteLevelTokenizer", "--num-layers", "1", "--hidden-size", "8"]
    words += ["--num-attention-heads", "1", "--seq-length", "8", "--max-position-embeddings", "8", "--lr", "1"]
    words += ["--micro-batch-size", "1", "--train-iters", "1", "--log-format", "rich"]
    done = megalith("pretrain", *words, "--data-path", str(prefix).replace("bytes", "bites"))
    assert done.returncode == 2
    assert "bites_document" in done.stderr and "bytes_document" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_data_is_told_with_the_faults_of_settings(tmp_path: Path) -> None:
    prefix = str(write_data(tmp_path))
    words = ["--tokenizer-type", "ByteLevelTokenizer", "--num-layers", "1", "--hidden-size", "9", "--lr", "1"]
    words += ["--num-attention-heads", "2", "--seq-length", "8", "--max-position-embeddings", "8"]
    words += ["--micro-batch-size", "1", "--train-iters", "1", "--data-path", "0.5", prefix, "0.5", "gone"]
    done = megalith("pretrain", *words)
    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert len(said) == 2
    assert "--hidden-size = 9: is not divisible" in said[0]
    assert "--data-path: no token file with the prefix gone: gone.bin and gone.idx not found" in said[1]


def test_generate_continues_one_prompt_or_several(trained: Path) -> None:
    one = megalith("generate", str(trained), "--prompt", "ab", "--max-new-tokens", "4", "--greedy")
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("ab")
    several = megalith("generate", str(trained), "--prompt", "ab", "--prompt", "c", "--max-new-tokens", "4", "--greedy")
    assert several.stdout.startswith("--- 1 ---\n" + one.stdout)
    assert "--- 2 ---\nc" in several.stdout
    assert one.stderr == several.stderr == ""


def test_text_ends_where_the_model_does_and_that_is_said(trained: Path) -> None:
    words = ["generate", str(trained), "--greedy", "--max-new-tokens", "5000"]
    full = "stopped at the 16 tokens that the model can hold (max_position_embeddings)\n"
    done = megalith(*words, "--prompt", "ab")
    assert (done.returncode, done.stderr) == (0, full)
    done = megalith(*words, "--prompt", "ab", "--prompt", "abc")
    assert (done.returncode, done.stderr) == (0, f"prompt 1: {full}prompt 2: {full}")
    done = megalith(*words, "--prompt", "x" * 16)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("megalith: prompt 1 has 16 tokens: the model can hold 16 (max_position_embeddings)")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["generate", "RUN", "--prompt", "x"], id="generate"),
        pytest.param(["evaluate", "RUN", "--split", "train"], id="evaluate", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_one_sentence_and_status_2(
    words: list[str], trained: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    words = [str(run) if word == "RUN" else word for word in words]

    def refused(*more: str, unprivileged: bool = False) -> str:
        done = megalith(*words, *more, unprivileged=unprivileged)
        assert done.returncode == 2 and done.stdout == "", done
        (line,) = done.stderr.splitlines()
        return line

    folder = run / "checkpoints"
    for step in ("21", "-1"):
        assert refused("--step", step) == f"megalith: {folder} has no checkpoint of step {step}; it has [3]"
    if permissions_hold(tmp_path):
        folder.chmod(0)
        said = refused(unprivileged=True)
        folder.chmod(0o755)
        assert said == f"megalith: {folder} cannot be read (Permission denied): correct its permissions"
    shard = next(folder.glob("*/*.safetensors"))
    os.truncate(shard, 1000)
    assert refused().startswith(
        f"megalith: no checkpoint in {folder} can be used: step-0000003: rank 0: {shard} has 1000"
    )


def test_evaluate_gives_loss_and_perplexity_of_a_split_and_of_files(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = megalith("evaluate", str(trained), "--split", "train", "--json")
    assert split.returncode == 0, split.stderr
    report = json.loads(split.stdout)
    assert report["step"] == 3 and report["tokens"] > 100 and 1 < report["perplexity"] < 1e4
    text = tmp_path / "text.txt"
    text.write_text("some text to be measured\n" * 4)
    done = megalith("evaluate", str(trained), "--file", str(text), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 100  # 25 bytes a line, an end of document, the first is not predicted
    prefix = write_data(tmp_path)
    for name in (str(prefix), f"{prefix}.bin"):
        assert main(["evaluate", str(trained), "--file", name, "--json", "--device", "cpu"]) == 0
    lost = [json.loads(line)["loss"] for line in capsys.readouterr().out.splitlines()]
    assert lost[0] == lost[1]
    assert main(["evaluate", str(trained), "--file", str(prefix), "--file", str(text), "--device", "cpu"]) == 2
    assert "Give files of one kind" in capsys.readouterr().err
    assert main(["evaluate", str(trained), "--file", str(text), str(text), "--device", "cpu"]) == 0
    assert f"data: {text}, {text}\n" in capsys.readouterr().out
    gone = megalith("evaluate", str(trained), "--file", str(tmp_path / "other.txt"))
    assert gone.returncode == 2
    assert gone.stderr.startswith(f"megalith: --file {tmp_path / 'other.txt'}: ")
    empty = megalith("evaluate", str(trained), "--split", "test")
    assert empty.returncode == 2
    assert "has no documents" in empty.stderr


def test_evaluate_takes_a_data_set_with_a_weight_for_the_one_that_it_is(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    settings = (run / "run.toml").read_text()
    prefix = re.search(r'data_path = \["(.*)"\]', settings)
    assert prefix is not None
    words = ["evaluate", str(run), "--split", "train", "--json", "--device", "cpu"]
    assert main(words) == 0
    alone = json.loads(capsys.readouterr().out)
    (run / "run.toml").write_text(settings.replace(f'["{prefix[1]}"]', f'["2.5", "{prefix[1]}"]'))
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == alone


def test_evaluate_measures_each_data_set_of_a_blend_and_their_mean_by_weight(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    settings = (run / "run.toml").read_text()
    prefix = re.search(r'data_path = \["(.*)"\]', settings)
    assert prefix is not None
    with IndexedWriter(tmp_path / "other", np.uint16) as writer:
        for start in range(9):
            writer.add_document([np.arange(40) * 5 % 256 + start])
    with IndexedWriter(tmp_path / "one", np.uint16) as writer:
        writer.add_document([np.arange(40)])
    words = ["evaluate", str(run), "--split", "valid", "--device", "cpu"]

    def measured(*data_path: str) -> Any:
        listed = ", ".join(f'"{word}"' for word in data_path)
        (run / "run.toml").write_text(
            re.sub(r"split = .*\n", "", settings).replace(f'["{prefix[1]}"]', f'[{listed}]\nsplit = "70,30,0"')
        )
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    first, second = measured(prefix[1]), measured(str(tmp_path / "other"))
    # A set of one document has none for validation, and one without weight is not in the blend.
    blend = ("1", prefix[1], "3", str(tmp_path / "other"), "9", str(tmp_path / "one"), "0", str(tmp_path / "gone"))
    both = measured(*blend)
    figures = ("tokens", "loss", "perplexity")
    assert [[part[name] for name in figures] for part in both["data_sets"]] == [
        [alone[name] for name in figures] for alone in (first, second)
    ]
    assert [part["share"] for part in both["data_sets"]] == [0.25, 0.75]
    assert both["loss"] == pytest.approx(0.25 * first["loss"] + 0.75 * second["loss"], rel=1e-12)
    assert both["perplexity"] == pytest.approx(np.exp(both["loss"]), rel=1e-12)
    assert both["tokens"] == first["tokens"] + second["tokens"]
    assert main(words) == 0
    assert capsys.readouterr().out.count("loss: ") == 3


def test_an_answer_that_goes_nowhere_is_no_success(trained: Path) -> None:
    command = [sys.executable, "-m", "megalith", "evaluate", str(trained), "--split", "train", "--json"]
    for where, said in ((">&-", "standard output is closed"), (">/dev/full", "cannot be written to (No space left")):
        done = subprocess.run(
            ["bash", "-c", f'"$@" {where}', "bash", *command],
            capture_output=True,
            text=True,
            timeout=120,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("megalith: standard output ") and said in line


@pytest.mark.parametrize("words", ["verify", "generate --prompt a --max-new-tokens 2", "plan --preset gpt2-small"])
def test_an_answer_that_is_printed_at_once_and_goes_nowhere_is_no_success(words: str, trained: Path) -> None:
    name, *rest = words.split()
    command = [sys.executable, "-m", "megalith", name, *([] if name == "plan" else [str(trained)]), *rest]
    for unbuffered in ("", "1"):
        with open("/dev/full", "w") as full:
            environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, env=environment)
        assert done.returncode == 2, done
        assert done.stderr.splitlines() == [
            "megalith: standard output cannot be written to (No space left on device): the answer is lost"
        ]


def test_a_model_that_is_looked_at_loses_no_steps(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    newest = run / "checkpoints" / "step-0000009"
    newest.mkdir()
    done = megalith("generate", str(run), "--prompt", "a", "--max-new-tokens", "1")
    assert done.returncode == 0
    damaged, instead = done.stderr.splitlines()
    assert damaged.startswith(f"warning: {newest} is damaged and was not used: ")
    assert instead == "warning: step 3 is used instead"


def test_the_kinds_of_models_that_can_be_evaluated_are_named(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('task = "bert"\n')
    done = megalith("evaluate", str(tmp_path))
    assert done.returncode == 2
    assert "holds a bert model; those of gpt, vit, classify, ict and retriever can be evaluated" in done.stderr


@pytest.mark.parametrize("command", ["generate run --prompt a", "evaluate run", "evaluate run --file text"])
@pytest.mark.parametrize("task", ["gpt", "vit"])
def test_what_was_trained_on_made_up_data_is_not_taken_for_damaged(
    task: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").write_text(f'task = "{task}"\nmock_data = true\n')
    assert main(command.split()) == 2
    said = "run: was trained with --mock-data" if task == "gpt" or "evaluate" in command else "only a gpt continues"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--valid-data", "text"], "--valid-data: nothing reads it without --task. Add --task WIKITEXT103 or LAMBADA"),
        (["--strict-lambada", "--file", "text"], "--strict-lambada: nothing reads it without --task"),
        (["--task", "LAMBADA", "--valid-data", "text", "--split", "test"], "Leave --split and --file out"),
        (["--embedding-path", "vectors", "--search", "faiss"], "--embedding-path, --search: run holds a gpt model"),
    ],
)
def test_what_an_evaluation_would_not_read_is_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").write_text('task = "gpt"\n')
    assert main(["evaluate", "run", *words]) == 2
    assert said in capsys.readouterr().err


def test_zero_shot_tasks_print_the_lines_of_megatron(trained: Path, tmp_path: Path) -> None:
    text = tmp_path / "wikitext.tokens"
    text.write_text(" = Title = \n It 's a text , with 10 @,@ 000 words . \n" * 3)
    words = ["evaluate", str(trained), "--task", "WIKITEXT103", "--valid-data", str(text), "--overlapping-eval", "4"]
    done = megalith(*words)
    assert done.returncode == 0, done.stderr
    form, rule, line, _ = done.stdout.splitlines()
    assert form.endswith("wikitext.tokens is read with the tokenization of wikitext undone")
    assert line.startswith(" validation results on WIKITEXT103 | avg loss: ") and len(rule) == len(line) + 1
    report = json.loads(megalith(*words, "--json").stdout)
    assert report["detokenized"] == "wikitext" and f"ppl: {report['perplexity']:.4E}" in line
    passages = tmp_path / "lambada.jsonl"
    # A byte order mark in front; in a text what some take for the end of a line.
    passages.write_text('\ufeff{"text": "one \u2028 two three"}\n{"text": "four five six"}\n', encoding="utf-8")
    words = ["evaluate", str(trained), "--task", "LAMBADA", "--strict-lambada", "--valid-data", str(passages)]
    done = megalith(*words)
    assert done.returncode == 0, done.stderr
    assert "| total examples: 2.0000E+00 | avg accuracy: " in done.stdout
    passages.write_text('{"text": "one two three"}\n{"txt": "four"}\n')
    done = megalith(*words)
    assert done.returncode == 2 and "lambada.jsonl, line 2: has no key text" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("words", ["--help", "--no-such-flag 3"])
def test_help_and_a_wrong_flag_are_answered_before_torch_is_imported(command: str, words: str) -> None:
    needed = {"finetune": "run --task MNLI --train-data a --valid-data b", "convert": "--from megatron a --to b"}
    given = [command, *([] if words == "--help" else needed.get(command, "run").split()), *words.split()]
    program = f"import sys; from megalith.cli import main; sys.meta_path.insert(0, Asking()); sys.exit(main({given}))"
    done = subprocess.run([sys.executable, "-c", NO_TORCH + program], capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if words == "--help" else 2), done.stderr
    assert "Traceback" not in done.stderr
    assert f"megalith {command}" in done.stdout if words == "--help" else "no-such-flag" in done.stderr


def test_an_interruption_while_torch_is_imported_is_not_lost() -> None:
    done = subprocess.run([sys.executable, "-c", LOSES_INTERRUPTION], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "megalith: interrupted\n")


@pytest.mark.parametrize("command", ["pretrain", "preprocess"])
def test_a_list_of_flags_fits_a_narrow_terminal(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = {}
    for columns in ("80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        with contextlib.suppress(SystemExit):
            main([command, "--help"])
        # What cannot be broken: usage and the longest names of flags and choices.
        lines = [line for line in capsys.readouterr().out.splitlines() if "  " in line.strip()]
        widths[columns] = max(map(len, lines))
    assert widths["80"] <= 80
    assert 100 < widths["200"] <= 120
