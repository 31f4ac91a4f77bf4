"""A training as a user has it: started, stopped, killed, continued; real processes, files and signals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megalith import train
from megalith.monitor.signals import STOPPED_BY_SIGNAL
from tests.layouts.runs import MODEL, events_of, run_on, steps_of, weights_of

STEPS = ["--train-iters", "20"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The run directory of 20 steps in one go."""
    save = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_on(1, STEPS, save, data) == 0
    return save


def figures(save: Path) -> list[tuple[Any, ...]]:
    """What a run printed of each step that does not depend on the clock; a step done again counts once."""
    steps = {step["step"]: step for step in steps_of(save)}
    names = ("step", "consumed_samples", "losses", "grad_norm", "params_norm", "learning_rate", "skipped")
    return [tuple(json.dumps(steps[number][name]) for name in names) for number in sorted(steps)]


def assert_same(save: Path, other: Path) -> None:
    """Bit for bit: every figure of every step, and all tensors of the newest checkpoint."""
    assert figures(save) == figures(other)
    ours, theirs = weights_of(save), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def command(data: Path, save: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "megalith", "pretrain", *MODEL, "--data-path", str(data), "--save", str(save), *words]


def wait_for_step(process: "subprocess.Popen[bytes]", step: int) -> None:
    """Read the child's JSON lines until it has done a step."""
    assert process.stdout is not None
    for line in process.stdout:
        record = json.loads(line)
        if record["event"] == "step_done" and record["step"] >= step:
            return
    raise AssertionError(f"the run ended before step {step}")


def test_a_stopped_run_goes_on_bit_for_bit(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    assert run_on(1, [*STEPS, "--exit-interval", "13"], tmp_path / "run", data) == 0
    assert len(steps_of(tmp_path / "run")) == 13
    assert run_on(1, STEPS, tmp_path / "run", data) == 0
    assert_same(tmp_path / "run", undisturbed)


def test_a_killed_run_goes_on_bit_for_bit(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    with subprocess.Popen(command(data, tmp_path / "run", *STEPS), stdout=subprocess.PIPE) as process:
        wait_for_step(process, 14)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert run_on(1, STEPS, tmp_path / "run", data) == 0
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_stops_with_status_75(
    number: signal.Signals, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    # Slow enough that the signal arrives before the end, whatever the machine does.
    words = [*STEPS, "--exit-interval", "19"]
    with subprocess.Popen(command(data, tmp_path / "run", *words), stdout=subprocess.PIPE) as process:
        wait_for_step(process, 1)
        process.send_signal(number)
        assert process.stdout is not None
        last = json.loads(process.stdout.readlines()[-1])
        status = process.wait(timeout=60)
    if last["event"] == "run_ended" and last["reason"] == "exit-interval":
        pytest.skip("the run was faster than the signal")
    assert status == 75
    assert (tmp_path / "run" / "checkpoints").is_dir()
    assert run_on(1, STEPS, tmp_path / "run", data) == 0
    assert_same(tmp_path / "run", undisturbed)


def test_a_signal_while_a_run_is_being_started_is_answered_at_once_and_ends_the_start(tmp_path: Path) -> None:
    words = " ".join(MODEL).replace("--tokenizer-type ByteLevelTokenizer", "--corpus python").split()
    words += [*STEPS, "--save", str(tmp_path / "it's a run")]
    with subprocess.Popen(
        [sys.executable, "-m", "megalith", "pretrain", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert any(b"making a corpus" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        said = process.stderr.readline().decode()
        assert process.poll() is None
        log = process.stdout.read().decode()
        assert process.wait(timeout=60) == STOPPED_BY_SIGNAL
    assert said == "megalith: SIGINT: the run ends before its first step; a second signal ends it at once\n"
    assert "stopped by SIGINT before the first step" in log and "step_done" not in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_before_anything_is_imported_ends_the_start(
    ranks: int, number: signal.Signals, tmp_path: Path
) -> None:
    """To all processes of the job, as a terminal sends it: when Python begins in the last rank, or torch in the one."""
    words = [*MODEL, *STEPS, "--mock-data", "--save", str(tmp_path / "run"), *(("--nproc", "2") if ranks > 1 else ())]
    words = [word for word in words if word not in ("--tokenizer-type", "ByteLevelTokenizer")]
    with subprocess.Popen(
        [sys.executable, "-m", "megalith", "pretrain", *words], stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stderr is not None
        while not (len(_ranks_of(process.pid)) == ranks if ranks > 1 else _maps(process.pid, "libtorch_cpu")):
            assert process.poll() is None
            time.sleep(0.002)
        os.killpg(process.pid, number)
        said = process.stderr.read().decode()
        assert process.wait(timeout=60) == STOPPED_BY_SIGNAL
    assert re.fullmatch(rf"megalith: {number.name}: the (run ends before its first step|ranks finish .*)\n", said)
    assert not (tmp_path / "run").exists()


def _ranks_of(pid: int) -> list[str]:
    """The ranks that a launcher has started: between fork and exec a child has its parent's environment."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [child for child in children if b"\0RANK=" in Path(f"/proc/{child}/environ").read_bytes()]


def _maps(pid: int, library: str) -> bool:
    return library in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize(
    ("world_size", "part"),
    [
        (1, "prepare_corpus"),
        (1, "open_data"),
        (2, "resume"),
        *(pytest.param(1, part, marks=pytest.mark.slow) for part in ("build_job", "resume")),
        *(pytest.param(2, part, marks=pytest.mark.slow) for part in ("prepare_corpus", "build_job", "open_data")),
    ],
)
def test_a_signal_in_any_part_of_a_start_ends_it_before_the_first_step(
    world_size: int, part: str, undisturbed: Path, tmp_path: Path, data: Path
) -> None:
    def before(rank: int) -> None:
        work = vars(train)[part]

        def signalled(*arguments: Any, **named: Any) -> Any:
            if rank == world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return work(*arguments, **named)

        vars(train)[part] = signalled

    new = tmp_path / "new"
    assert run_on(world_size, STEPS, new, data, before=before) == STOPPED_BY_SIGNAL
    assert steps_of(new) == [] and not any((new / "checkpoints").iterdir())
    old = Path(shutil.copytree(undisturbed, tmp_path / "old"))
    assert (
        run_on(world_size, ["--train-iters", "21", "--override-lr-scheduler"], old, data, before=before)
        == STOPPED_BY_SIGNAL
    )
    assert len(steps_of(old)) == 20
    assert events_of(old, "line")[-1]["text"] == "stopped by SIGTERM before the first step"


def test_a_finished_run_does_nothing_and_says_so(data: Path, undisturbed: Path) -> None:
    before = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    done = subprocess.run(
        command(data, undisturbed, *STEPS, "--log-format", "reference"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "the run is finished: all 20 steps were taken" in done.stdout
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == before


def test_a_length_below_the_checkpoints_step_is_named(data: Path, undisturbed: Path) -> None:
    shorter = [*STEPS, "--train-iters", "12", "--log-format", "reference"]
    refused = subprocess.run(command(data, undisturbed, *shorter), capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert (
        "total number of iterations is 12 steps (96 samples) on the command line (--train-iters) and 20 steps (160 "
        "samples) in the checkpoint. Make them equal"
    ) in refused.stderr
    words = command(data, undisturbed, *shorter, "--override-lr-scheduler")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "nothing is trained: --train-iters = 12 steps lies below step 20, of which the newest" in done.stdout
    assert "--train-iters 40 --override-lr-scheduler goes on" in done.stdout and "is finished" not in done.stdout


def test_what_is_told_makes_a_run_longer_that_is_counted_in_samples(data: Path, tmp_path: Path) -> None:
    told = re.compile(r"--train-samples (\d+) --override-lr-scheduler")
    flags = ["--train-samples", "16"]
    for length in (32, 64, 64):
        done = subprocess.run(
            command(data, tmp_path, *flags, "--lr-warmup-iters", "0", "--log-format", "rich"),
            capture_output=True,
            text=True,
            timeout=120,
        )
        found = told.search(done.stdout)
        assert done.returncode == 0 and found is not None and int(found[1]) == length, done.stdout + done.stderr
        flags = ["--train-samples", "32", "--override-lr-scheduler"]


def test_two_processes_under_torchrun_give_the_losses_of_one(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    words = command(data, tmp_path / "run", *STEPS)[3:]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launched = subprocess.run(
        [sys.executable, "-m", "megalith", *words[0:1], "--nproc", "2", *words[1:]],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment,
    )
    assert launched.returncode == 0, launched.stderr[-2000:]
    for step, want in zip(steps_of(tmp_path / "run"), steps_of(undisturbed), strict=True):
        assert step["losses"]["lm loss"] == pytest.approx(want["losses"]["lm loss"], rel=1e-5)


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation_changes_no_bit(granularity: str, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    words = [*STEPS, "--recompute-granularity", granularity]
    assert run_on(1, words, tmp_path / "run", data) == 0
    assert_same(tmp_path / "run", undisturbed)


def test_fine_tuning_starts_from_the_weights_at_step_0(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    words = ["--train-iters", "3", "--load", str(undisturbed), "--finetune"]
    assert run_on(1, words, tmp_path / "run", data) == 0
    steps, before = steps_of(tmp_path / "run"), steps_of(undisturbed)
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert steps[0]["losses"]["lm loss"] < before[0]["losses"]["lm loss"] - 0.1
    assert (tmp_path / "run" / "checkpoints" / "step-0000003").is_dir()


def test_loading_without_the_optimizer_keeps_the_step(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    words = ["--train-iters", "22", "--load", str(undisturbed), "--no-load-optim"]
    assert run_on(1, words, tmp_path / "run", data) == 0
    steps = steps_of(tmp_path / "run")
    assert [step["step"] for step in steps] == [21, 22]
    # The schedule begins anew: two steps of warm-up, of which the first has taken one.
    assert [step["learning_rate"] for step in steps] == [5e-3, 1e-2]


def test_what_counts_at_a_first_start_alone_is_said_to_be_overruled_later(data: Path, undisturbed: Path) -> None:
    words = [*STEPS, "--load", f"{undisturbed}/", "--finetune", "--no-load-optim", "--log-format", "reference"]
    done = subprocess.run(command(data, undisturbed, *words), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--finetune and --no-load-optim counted at its first start" in done.stdout
    assert "the run is finished" in done.stdout


def test_a_constant_loss_scale_may_become_a_dynamic_one(data: Path, tmp_path: Path) -> None:
    save, words = tmp_path / "run", ["--fp16", "--train-iters", "4", "--save-interval", "2", "--eval-iters", "0"]
    assert run_on(1, [*words, "--loss-scale", "64", "--exit-interval", "2"], save, data) == 0
    assert run_on(1, [*words, "--initial-loss-scale", "1024"], save, data) == 0
    assert [step["loss_scale"] for step in steps_of(save)] == [64.0, 64.0, 1024.0, 1024.0]


def test_a_run_without_saved_optimizer_goes_on_in_its_directory(data: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    words = ["--train-iters", "4", "--save-interval", "2"]
    assert run_on(1, [*words, "--no-save-optim", "--exit-interval", "2"], save, data) == 0
    done = subprocess.run(command(data, save, *words), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "was saved without its optimizer. With --no-load-optim the run goes on with a new one" in done.stderr
    shutil.copytree(save, tmp_path / "other")
    for folder, word in ((save, "--no-load-optim"), (tmp_path / "other", "--no-save-optim")):
        done = subprocess.run(command(data, folder, *words, word), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "step 2 was saved without its optimizer, whose state begins anew" in done.stdout + done.stderr
        assert [step["step"] for step in steps_of(folder)] == [1, 2, 3, 4]


@pytest.mark.parametrize("loads", [True, False])
def test_a_run_that_is_to_go_on_does_not_begin_anew(loads: bool, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Where its directory is not mounted, for one."""
    lost = tmp_path / "lost"
    words = [*STEPS, "--exit-on-missing-checkpoint", *(("--load", str(lost)) if loads else ())]
    done = subprocess.run(command(data, lost, *words), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    flag = "--load" if loads else "--save"
    assert f"{flag} = {lost}: holds no checkpoint, and --exit-on-missing-checkpoint forbids" in done.stderr
    shutil.copytree(undisturbed, tmp_path / "here")
    assert run_on(1, [*STEPS, "--exit-on-missing-checkpoint"], tmp_path / "here", data) == 0


def test_a_checkpoint_of_another_model_is_refused_with_all_differences(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    words = ["--train-iters", "22", "--load", str(undisturbed), "--num-layers", "2", "--hidden-size", "16"]
    done = subprocess.run(command(data, tmp_path / "run", *words), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "num_layers is 4 in the checkpoint and 2 in this run" in done.stderr
    assert "hidden_size is 32 in the checkpoint and 16 in this run" in done.stderr
    assert "begin a new run with another --save" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_gives_way_to_the_one_before(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    assert run_on(1, STEPS, tmp_path / "run", data) == 0
    shard = tmp_path / "run" / "checkpoints" / "step-0000020" / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = subprocess.run(
        command(data, tmp_path / "run", *STEPS, "--log-format", "reference"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"{shard}" in done.stdout and "going on from step 10 instead" in done.stdout
    assert_same(tmp_path / "run", undisturbed)


def test_no_auto_resume_refuses_to_leave_checkpoints_behind(data: Path, undisturbed: Path) -> None:
    done = subprocess.run(
        command(data, undisturbed, *STEPS, "--no-auto-resume"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "holds checkpoints up to step 20" in done.stderr


def test_the_wall_time_of_a_run_is_accounted_for(undisturbed: Path) -> None:
    records = [json.loads(line) for line in (undisturbed / "log.jsonl").read_text().splitlines()]
    ended = next(record for record in records if record["event"] == "run_ended")
    assert ended["reason"] == "done"
    assert set(ended["spent"]) >= {"startup", "data", "step", "evaluation", "checkpoint"}
    assert all(seconds >= 0 for seconds in ended["spent"].values())


def test_training_by_samples_with_a_ramped_batch(data: Path, tmp_path: Path) -> None:
    words = ["--train-samples", "64", "--lr-warmup-iters", "0", "--rampup-batch-size", "2", "2", "12"]
    assert run_on(1, words, tmp_path / "run", data) == 0
    sizes = [step["global_batch_size"] for step in steps_of(tmp_path / "run")]
    assert sizes[0] == 2 and sizes[-1] == 8 and sizes == sorted(sizes)
    assert steps_of(tmp_path / "run")[-1]["consumed_samples"] == sum(sizes) <= 64
    words = command(data, tmp_path / "run", *words, "--log-format", "reference")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert f"the run is finished: all {len(sizes)} steps were taken; --train-samples {2 * sum(sizes)} " in done.stdout


@pytest.mark.parametrize("batch", [4, 16])
def test_a_run_given_in_samples_takes_them_all_although_its_batches_change(
    batch: int, data: Path, tmp_path: Path
) -> None:
    save, words = tmp_path / "run", ["--train-samples", "80", "--lr-warmup-iters", "0", "--save-interval", "5"]
    assert run_on(1, [*words, "--exit-interval", "5"], save, data) == 0
    assert run_on(1, [*words, "--global-batch-size", str(batch)], save, data) == 0
    assert [step["consumed_samples"] for step in steps_of(save)[5:]] == list(range(40 + batch, 81, batch))


@pytest.mark.parametrize("words", [[], ["--fp16", "--initial-loss-scale", str(2**20)]], ids=["fp32", "fp16"])
def test_without_clipping_a_run_is_one_whose_limit_is_never_reached(
    words: list[str], data: Path, tmp_path: Path
) -> None:
    for limit in ("0", "1e9"):
        assert run_on(1, ["--train-iters", "6", "--clip-grad", limit, *words], tmp_path / limit, data) == 0
    steps, others = steps_of(tmp_path / "0"), steps_of(tmp_path / "1e9")
    assert any(step["skipped"] for step in steps) == bool(words) and not all(step["skipped"] for step in steps)
    for name in ("losses", "skipped", "params_norm"):
        assert [step[name] for step in steps] == [step[name] for step in others]


# bfloat16 keeps 8 bits of a number, float16 11.
@pytest.mark.parametrize(("precision", "within"), [("--bf16", 4e-3), ("--fp16", 5e-4)])
def test_sixteen_bit_trainings_follow_fp32(
    precision: str, within: float, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    words = [*STEPS, precision, "--initial-loss-scale", "1024"]
    assert run_on(1, words, tmp_path / "run", data) == 0
    for step, want in zip(steps_of(tmp_path / "run"), steps_of(undisturbed), strict=True):
        assert not step["skipped"]
        assert step["losses"]["lm loss"] == pytest.approx(want["losses"]["lm loss"], rel=within)
