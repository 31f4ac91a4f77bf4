"""A lone process trains, goes on, talks and prepares data without what Linux has beside other systems of its kind."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TAKEN_AWAY = """
import builtins, errno, fcntl, io, os, resource, select, signal, socket, sys, time
sys.platform = "freebsd14"
for module, names in {
    os: "memfd_create sched_getaffinity sched_setaffinity posix_fadvise posix_fallocate pipe2 eventfd pidfd_open "
    "copy_file_range splice getrandom O_DIRECT O_TMPFILE O_PATH listxattr setxattr getxattr removexattr fdatasync",
    time: "CLOCK_BOOTTIME CLOCK_MONOTONIC_COARSE CLOCK_TAI",
    signal: "sigtimedwait sigwaitinfo SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT SIGPOLL SIGCLD",
    select: "epoll",
    socket: "SO_PEERCRED SOCK_CLOEXEC SOCK_NONBLOCK AF_NETLINK MSG_NOSIGNAL TCP_USER_TIMEOUT",
    fcntl: "F_OFD_SETLK F_OFD_SETLKW F_OFD_GETLK F_ADD_SEALS F_GET_SEALS F_SETPIPE_SZ F_GETPIPE_SZ",
    resource: "prlimit RUSAGE_THREAD",
}.items():
    for name in names.split():
        module.__dict__.pop(name, None)

def without_proc(function):
    def call(path, *args, **kwargs):
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
        return function(path, *args, **kwargs)
    return call

builtins.open = io.open = without_proc(open)
os.open, os.readlink, os.stat = without_proc(os.open), without_proc(os.readlink), without_proc(os.stat)
"""
MODEL = (
    "--mock-data --vocab-size 300 --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 "
    "--max-position-embeddings 16 --micro-batch-size 2 --lr 1e-3 --eval-iters 1 --save-interval 2 --log-interval 1"
).split()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "sitecustomize.py").write_text(TAKEN_AWAY)
    # By which sysconfig would look for a file of that other system.
    data = sysconfig._get_sysconfigdata_name()  # type: ignore[attr-defined]
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    return {**os.environ, "PYTHONPATH": path, "_PYTHON_SYSCONFIGDATA_NAME": data, "OMP_NUM_THREADS": "1"}


def megalith(environment: dict[str, str], *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "megalith", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_run_is_made_and_goes_on(environment: dict[str, str], tmp_path: Path) -> None:
    for steps in ("2", "3"):
        words = [*MODEL, "--train-iters", steps, "--override-lr-scheduler", "--save", str(tmp_path / "run")]
        done = megalith(environment, "pretrain", *words)
        assert done.returncode == 0, done.stderr
        assert f"iteration        {steps}/       {steps}" in done.stdout
    done = megalith(environment, "verify", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout


def test_text_is_prepared_by_several_workers(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n\ntwo\n\nthree\n")
    words = "--text-documents paragraph --tokenizer-type ByteLevelTokenizer --workers 2".split()
    out = ["--output-prefix", str(tmp_path / "out")]
    done = megalith(environment, "preprocess", "--input", str(tmp_path / "in.txt"), *out, *words)
    assert done.returncode == 0, done.stderr
    assert "3 documents" in done.stdout


def test_ranks_are_left_to_torchrun(environment: dict[str, str], tmp_path: Path) -> None:
    done = megalith(environment, "pretrain", *MODEL, "--train-iters", "2", "--nproc", "2")
    assert done.returncode == 2
    assert done.stderr.startswith("megalith: --nproc = 2: starts ranks by what Linux alone has.")
    assert "torchrun --nproc-per-node 2 -m megalith" in done.stderr
