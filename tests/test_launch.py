"""The launcher over real processes: one lost rank ends all, signals reach all, and nothing is left behind.

Most of it needs no torch: the ranks are programs of a few lines.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megalith.launch import HUNG, PEER_LOST
from tests.layouts.runs import MODEL, run_on, steps_of, write_data
from tests.processes import MARK, listeners, marked, seconds_until_gone, shared_memory

# How a rank says that it is ready, and what it knows of itself.
BEGINNING = """
import os, signal, sys, time
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
def ready():
    os.write(1, f"{rank} {os.getpid()}\\n".encode())
def names():
    with open(os.environ["MEETING"]) as file:
        return file.read().split()
# Ranks that begin long after the others would be ended for the others' end.
with open(os.environ["MEETING"], "a") as file:
    file.write(f"{rank} ")
begun = names().count(str(rank))
while any(names().count(str(other)) < begun for other in range(world_size)):
    time.sleep(0.01)
"""


class Launched:
    """A launcher that runs, and its ranks' process numbers once they are ready."""

    def __init__(self, process: "subprocess.Popen[str]", mark: str) -> None:
        self.process, self.mark = process, mark

    def wait_for_ranks(self, count: int) -> dict[int, int]:
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline().split() for _ in range(count)]
        return {int(rank): int(pid) for rank, pid in lines}

    def end(self) -> tuple[int, str]:
        """Its exit status, and what was said on the error stream; nothing of it may be left."""
        _, said = self.process.communicate(timeout=60)
        seconds_until_gone(self.mark)
        return self.process.returncode, said


@contextmanager
def launched(program: str, num_ranks: int = 2, **settings: float | str) -> Iterator[Launched]:
    """The launcher with ranks that run this program."""
    mark = uuid.uuid4().hex
    settings = {"stop_grace": 30.0, **settings}
    words = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    launcher = f"import sys; from megalith.launch import launch; sys.exit(launch(sys.argv[1:], {num_ranks}, {words}))"
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", launcher, sys.executable, "-c", BEGINNING + program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, MARK: mark, "MEETING": os.path.join(folder, "meeting")},
        )
        try:
            yield Launched(process, mark)
        finally:
            for pid in marked(mark):
                os.kill(pid, signal.SIGKILL)
            process.communicate()


SLEEPING = "ready(); time.sleep(60)"
ENDING_AT_A_SIGNAL = """
def end(number, frame):
    os.write(2, f"rank {rank} got {signal.Signals(number).name}\\n".encode())
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, end)
ready()
time.sleep(60)
"""


def test_a_dead_rank_takes_the_job_down_within_two_seconds() -> None:
    before = shared_memory()
    with launched(SLEEPING, 3) as job:
        pids = job.wait_for_ranks(3)
        os.kill(pids[1], signal.SIGKILL)
        began = time.monotonic()
        status, said = job.end()
        seconds = time.monotonic() - began
    print(f"a killed rank took the job down in {seconds:.2f} s (goal 2 s)")
    assert status == 128 + signal.SIGKILL
    assert f"rank 1 (process {pids[1]}) was ended by SIGKILL; the others were ended" in said
    assert seconds < 8.0  # on a busy machine
    assert shared_memory() <= before


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (signal.SIGKILL, "if memory ran out, a smaller --micro-batch-size needs less"),
        (signal.SIGBUS, "a data file that was being read has become shorter, or its disk failed"),
    ],
)
def test_what_a_signal_that_ended_a_rank_may_mean_is_said(number: signal.Signals, hint: str) -> None:
    with launched(f"ready(); os.kill(os.getpid(), {int(number)})", 1) as job:
        status, said = job.end()
    assert status == 128 + number and said.endswith(f"was ended by {number.name}; {hint}\n")


def test_a_killed_launcher_takes_its_ranks_along() -> None:
    before = shared_memory()
    with launched(SLEEPING, 3) as job:
        pids = job.wait_for_ranks(3)
        assert set(pids.values()) < set(marked(job.mark))
        job.process.kill()
        seconds = seconds_until_gone(job.mark)
    print(f"the ranks of a killed launcher were gone after {seconds:.2f} s (goal 2 s)")
    assert seconds < 8.0
    assert shared_memory() <= before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_the_launcher_reaches_every_rank(number: signal.Signals) -> None:
    with launched(ENDING_AT_A_SIGNAL) as job:
        job.wait_for_ranks(2)
        job.process.send_signal(number)
        status, said = job.end()
    told = signal.SIGTERM if number is signal.SIGHUP else number
    assert status == 75
    assert f"rank 0 got {told.name}" in said and f"rank 1 got {told.name}" in said
    assert f"{told.name}: the ranks finish their step, save and end" in said


def test_what_ranks_do_at_a_signal_is_said_as_it_is() -> None:
    with launched(ENDING_AT_A_SIGNAL, effect="end") as job:
        job.wait_for_ranks(2)
        job.process.send_signal(signal.SIGINT)
        _, said = job.end()
    assert "SIGINT: the ranks end; a second signal" in said and "save" not in said


def test_a_terminal_that_goes_away_ends_nothing_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launched(SLEEPING, 2) as job:
            job.wait_for_ranks(2)
            job.process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
            assert job.process.poll() is None
            job.process.terminate()
            _, said = job.end()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "SIGTERM" in said and "SIGHUP" not in said


def test_a_program_of_ours_takes_no_module_from_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "difflib.py").write_text("raise SystemExit(9)\n")
    script = tmp_path / "bin" / "program.py"
    script.parent.mkdir()
    script.write_text(
        "import subprocess, sys\n"
        "from megalith.launch import as_program\n"
        "sys.exit(subprocess.run(as_program('megalith', '--version')).returncode)\n"
    )
    assert subprocess.run([sys.executable, str(script)], cwd=tmp_path, check=False).returncode == 0


def test_ranks_that_do_not_end_are_killed_after_the_grace() -> None:
    deaf = "for n in (15, 2, 10): signal.signal(n, signal.SIG_IGN)\nready(); time.sleep(60)"
    with launched(deaf, stop_grace=1.0) as job:
        job.wait_for_ranks(2)
        began = time.monotonic()
        job.process.terminate()
        status, said = job.end()
        seconds = time.monotonic() - began
    assert status == 128 + signal.SIGKILL and 1.0 <= seconds < 10.0
    assert "ranks 0, 1 did not end within --stop-grace = 1 s; the last commit is whole" in said


def test_a_second_signal_ends_what_does_not_end() -> None:
    deaf = "for n in (15, 2, 10): signal.signal(n, signal.SIG_IGN)\nready(); time.sleep(60)"
    with launched(deaf, stop_grace=60.0) as job:
        job.wait_for_ranks(2)
        job.process.terminate()
        assert job.process.stderr is not None and "SIGTERM" in job.process.stderr.readline()  # once it has been noted
        time.sleep(1.2)
        began = time.monotonic()
        job.process.terminate()
        status, _ = job.end()
    assert status == 128 + signal.SIGKILL and time.monotonic() - began < 10.0


# What each rank does, and what the launcher ends with.
@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(75 if rank else 0)", 75, ""),
        ("sys.exit(2)", 2, ""),
        ("time.sleep(0.3 * rank); sys.exit(77 if rank else 1)", 1, "rank 0 ended with status 1"),
        ("time.sleep(0.3 * (1 - rank)); sys.exit(1 if rank == 0 else 77)", 1, "rank 0 ended with status 1"),
        ("time.sleep(0.2 * rank); sys.exit(78)", HUNG, ""),
        ("rank and time.sleep(60); os.abort()", 128 + signal.SIGABRT, "rank 0"),
        ("sys.exit(77) if rank else time.sleep(60)", PEER_LOST, "rank 1 ended with status 77"),
    ],
)
def test_the_status_is_that_of_the_rank_that_ended_the_job(program: str, status: int, said: str) -> None:
    with launched(program) as job:
        ended = job.end()
    assert ended[0] == status and said in ended[1], ended


def test_lost_ranks_are_started_again_and_not_after_a_signal_to_stop(tmp_path: Path) -> None:
    counted = f"""
with open({str(tmp_path / "starts")!r}, "a") as file:
    file.write(f"{{rank}}")
if rank == 1 and open({str(tmp_path / "starts")!r}).read().count("1") < 3:
    time.sleep(0.2)
    os.kill(os.getpid(), 9)
time.sleep(1.0)
"""
    with launched(counted, max_restarts=2) as job:
        status, said = job.end()
    assert status == 0
    assert "restart 1 of 2" in said and "restart 2 of 2" in said
    assert sorted((tmp_path / "starts").read_text()) == list("000111")
    with launched(SLEEPING, max_restarts=5) as job:
        job.wait_for_ranks(2)
        job.process.terminate()  # of which such ranks die
        status, said = job.end()
    assert status == 128 + signal.SIGTERM and "starting the 2 ranks again" not in said


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def command(data: Path, save: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "megalith", "pretrain", *MODEL, "--data-path", str(data), "--save", str(save), *words]


def wait_for_step(process: "subprocess.Popen[str]", step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        record = json.loads(line)
        if record["event"] == "step_done" and record["step"] >= step:
            return
    raise AssertionError(f"the run ended before step {step}")


@contextmanager
def training(words: list[str], mark: str) -> Iterator["subprocess.Popen[str]"]:
    """The command, begun, once it has taken two steps; its processes are marked."""
    environment = {**os.environ, MARK: mark}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        wait_for_step(process, 2)
        yield process


def test_a_run_on_two_ranks_listens_nowhere_but_on_loopback_and_a_signal_saves_it(tmp_path: Path) -> None:
    data, save, mark = write_data(tmp_path), tmp_path / "run", uuid.uuid4().hex
    before = shared_memory()
    with training(command(data, save, "--train-iters", "100000", "--nproc", "2"), mark) as process:
        pids = marked(mark)
        found = listeners(pids)
        process.terminate()
        _, said = process.communicate(timeout=120)
    print(f"{len(pids)} processes, {len(found)} listening sockets")
    assert len(pids) == 3 and all(listener.is_local for listener in found), found
    assert process.returncode == 75, said
    last = steps_of(save)[-1]["step"]
    assert last >= 2
    assert (save / "checkpoints" / f"step-{last:07d}").is_dir()
    seconds_until_gone(mark)
    assert shared_memory() <= before
    assert not (save / "lease.json").exists()


@pytest.mark.parametrize(
    ("nproc", "rank"),
    [(True, 2), pytest.param(False, 0, marks=pytest.mark.slow), pytest.param(False, 2, marks=pytest.mark.slow)],
    ids=["nproc", "torchrun-first", "torchrun-third"],
)
def test_of_many_ranks_that_end_one_says_for_whose_death(nproc: bool, rank: int, tmp_path: Path) -> None:
    own, mark = command(write_data(tmp_path), tmp_path / "run", "--train-iters", "100000"), uuid.uuid4().hex
    words = [*own, "--nproc", "4"] if nproc else [*TORCHRUN, "--nproc-per-node", "4", "-m", "megalith", *own[3:]]
    with training(words, mark) as process:
        (killed,) = [pid for pid in marked(mark) if f"RANK={rank}".encode() in environment_of(pid)]
        os.kill(killed, signal.SIGKILL)
        _, said = process.communicate(timeout=120)
    ends = re.findall(r"megalith: (?:rank [0-3] ends: )?(rank [0-3] \([^)]+\) (?:has died|failed).*)", said)
    assert len(ends) == 1 and re.fullmatch(rf"rank {rank} \(process {killed} on [^)]+\) has died", ends[0]), said
    if nproc:
        assert process.returncode == 128 + signal.SIGKILL and "Traceback" not in said


# As the interpreter exits, a thread that still runs in C++ may end it by an abort.
THREADS_AT_EXIT = """
import atexit, os, sys
atexit.register(lambda: print("threads:", len(os.listdir("/proc/self/task")), file=sys.stderr))
from megalith.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_rank_that_has_trained_leaves_no_thread_to_the_exit(tmp_path: Path) -> None:
    words = command(write_data(tmp_path), tmp_path / "run", "--train-iters", "4", "--tensor-model-parallel-size", "2")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", THREADS_AT_EXIT, *words[3:]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0 and "threads: 1\n" in said, said


def test_the_listeners_of_a_process_are_found() -> None:
    with socket.create_server(("127.0.0.1", 0)), socket.create_server(("", 0)):
        found = listeners([os.getpid()])
    assert sorted(listener.address for listener in found) == ["0.0.0.0", "127.0.0.1"]
    assert [listener.is_local for listener in sorted(found)] == [False, True]


@pytest.mark.parametrize("nproc", [True, False], ids=["nproc", "torchrun"])
def test_what_all_ranks_refuse_is_said_by_one_of_them(nproc: bool, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    own = command(write_data(tmp_path), tmp_path / "run", "--train-iters", "4", "--load", str(tmp_path / "empty"))
    words = [*own, "--nproc", "2"] if nproc else [*TORCHRUN, "--nproc-per-node", "2", "-m", "megalith", *own[3:]]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    said = [line for line in ended.stderr.splitlines() if "holds no checkpoint" in line]
    assert said == [
        f"megalith: --load = {tmp_path / 'empty'}: holds no checkpoint. Correct the path, or leave it out."
    ], ended.stderr
    assert ended.returncode == (2 if nproc else 1)  # torchrun's own


@pytest.mark.slow
def test_a_worker_of_torchrun_that_is_killed_is_started_again_and_the_run_ends_identical(tmp_path: Path) -> None:
    from tests.test_train import assert_same

    data, mark = write_data(tmp_path), uuid.uuid4().hex
    words = ["--train-iters", "60", "--save-interval", "10", "--deterministic"]
    assert run_on(2, words, tmp_path / "undisturbed", data) == 0
    launcher = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "2", "-m", "megalith"]
    with subprocess.Popen(
        [*launcher, *command(data, tmp_path / "run", *words)[3:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"},
    ) as process:
        wait_for_step(process, 12)
        workers = [pid for pid in marked(mark) if pid != process.pid and b"RANK=1" in environment_of(pid)]
        found = listeners([pid for pid in marked(mark) if b"RANK" in b" ".join(environment_of(pid))])
        os.kill(workers[0], signal.SIGKILL)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert all(listener.is_local for listener in found), found
    starts = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    begun = [record["step"] for record in starts if record["event"] == "training_started"]
    assert len(begun) == 2 and begun[0] == 0 and begun[1] >= 10, begun
    assert_same(tmp_path / "run", tmp_path / "undisturbed")
    seconds_until_gone(mark)


@pytest.mark.slow
def test_two_one_two_ranks_in_turn_give_the_losses_of_one(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    assert run_on(1, ["--train-iters", "18"], tmp_path / "one", data) == 0
    for nproc, exit_interval in ((2, 6), (1, 12), (2, 18)):
        words = ["--train-iters", "18", "--exit-interval", str(exit_interval), "--nproc", str(nproc)]
        done = subprocess.run(command(data, tmp_path / "run", *words), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    found, wanted = steps_of(tmp_path / "run"), steps_of(tmp_path / "one")
    assert [step["step"] for step in found] == [step["step"] for step in wanted]
    for step, want in zip(found, wanted, strict=True):
        assert step["consumed_samples"] == want["consumed_samples"]
        assert step["losses"] == pytest.approx(want["losses"], rel=1e-5)


@pytest.mark.slow
def test_an_elastic_job_goes_on_with_the_hosts_that_are_left(tmp_path: Path) -> None:
    """torchrun --nnodes 1:2 with two agents, of which one is killed: 2 ranks, then 1."""
    data, mark = write_data(tmp_path), uuid.uuid4().hex
    assert run_on(1, ["--train-iters", "40"], tmp_path / "one", data) == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
    agent += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    agent += ["--rdzv-conf", "last_call_timeout=15,keep_alive_interval=1,keep_alive_max_attempt=3", "-m", "megalith"]
    words = command(data, tmp_path / "run", "--train-iters", "40", "--save-interval", "5")[3:]
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}

    def start(name: str) -> "subprocess.Popen[str]":
        with (tmp_path / name).open("w") as out:
            return subprocess.Popen([*agent, *words], stdout=out, stderr=out, text=True, env=environment)

    first = start("first")  # it keeps the rendezvous, for which the first to come opens a port
    deadline = time.monotonic() + 200
    with socket.socket() as asking:
        while asking.connect_ex(("127.0.0.1", port)) != 0:
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "first").read_text()[-3000:]
            time.sleep(0.05)
    second = start("second")
    try:
        log = tmp_path / "run" / "log.jsonl"
        while not log.exists() or len(steps_of(tmp_path / "run")) < 12:
            assert time.monotonic() < deadline, (tmp_path / "first").read_text()[-3000:]
            time.sleep(0.05)
        second.kill()
        status = first.wait(timeout=250)
        assert status == 0, (tmp_path / "first").read_text()[-3000:]
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
        first.wait()
        second.wait()
    records = [json.loads(line) for line in log.read_text().splitlines()]
    sizes = [record["num_devices"] for record in records if record["event"] == "training_started"]
    assert sizes[0] == 2 and sizes[-1] == 1, sizes
    last = {step["step"]: step for step in steps_of(tmp_path / "run")}
    wanted = steps_of(tmp_path / "one")
    assert sorted(last) == [step["step"] for step in wanted]
    for want in wanted:
        assert last[want["step"]]["losses"] == pytest.approx(want["losses"], rel=1e-5)


def environment_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
