"""What only a GPU does, beside a device that is not there: the CPU's losses, no tensor elsewhere, one wait a step."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
SOURCE = Path(__file__).parent / "device.cpp"
MODEL = """
    --mock-data --vocab-size 512 --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64
    --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3
""".split()

SIXTEEN = "--hidden-dropout 0 --attention-dropout 0 --fp16 --initial-loss-scale 1024"
LLAMA = """
    --normalization RMSNorm --disable-bias-linear --swiglu --position-embedding-type rope
    --group-query-attention --num-query-groups 2 --reset-position-ids
"""
QWEN = f"{LLAMA} --add-qkv-bias --qk-layernorm"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="a torch with CUDA answers for its devices itself"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands in for a CUDA device, compiled for this torch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    made = tmp_path_factory.mktemp("library") / "device.so"
    include = [f"-I{folder / 'include' / path}" for path in ("", "torch/csrc/api/include")]
    link = [f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder / 'lib'}"]
    command = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", *include, str(SOURCE), "-o", str(made), *link]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return made


def run(library: Path, device: str, words: list[str], *, folder: Path, ranks: int = 1) -> tuple[list[float], str]:
    """Every loss that is told, of steps and evaluations in order; and what the first rank says on stderr."""
    module = ["tests.stand_in", str(library)] if device == "cuda" else ["megalith"]
    command = [sys.executable, "-m", *module, "pretrain", *words, "--device", device, "--log-format", "json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        told = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"} if ranks > 1 else {}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env={**environment, **told}, cwd=folder, **pipes))  # type: ignore[call-overload]
    try:
        ended = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, ended[-1][1][-3000:]
    # One rank speaks for all, the one that has the losses.
    records = [json.loads(line) for said, _ in ended for line in said.splitlines() if line.startswith("{")]
    return [loss for record in records for loss in (record.get("losses") or {}).values()], ended[0][1]


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ("", 1),
        (SIXTEEN, 1),
        (f"{SIXTEEN} --checkpoint-activations", 1),
        (f"{SIXTEEN} --pipeline-model-parallel-size 2", 2),
        (f"{SIXTEEN} --data-parallel-sharding optimizer --global-batch-size 8", 2),
        ("--checkpoint-activations --optimizer-state-dtype int8 --log-num-zeros-in-grad --log-params-norm", 1),
        ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
        ("--context-parallel-size 2", 2),
        ("--context-parallel-size 2 --context-exchange all-to-all", 2),
        ("--pipeline-model-parallel-size 2 --pipeline-schedule zero-bubble", 2),
        ("--data-parallel-sharding optimizer", 2),
        ("--data-parallel-sharding parameters", 2),
        (LLAMA, 1),
        (f"{LLAMA} --bf16 --hidden-dropout 0 --attention-dropout 0", 1),
        (f"{LLAMA} --tensor-model-parallel-size 2 --sequence-parallel", 2),
        (f"{LLAMA} --context-parallel-size 2 --context-exchange all-to-all", 2),
        (f"{QWEN} --bf16 --hidden-dropout 0 --attention-dropout 0", 1),
        (f"{QWEN} --tensor-model-parallel-size 2", 2),
        ("--qk-layernorm --bf16 --hidden-dropout 0 --attention-dropout 0", 1),
    ],
)
def test_a_gpt_has_the_cpus_losses(words: str, ranks: int, library: Path, tmp_path: Path) -> None:
    all_words = [*MODEL, "--train-iters", "4", "--log-interval", "1", "--eval-iters", "1", *words.split()]
    expected, _ = run(library, "cpu", all_words, folder=tmp_path, ranks=ranks)
    found, _ = run(library, "cuda", all_words, folder=tmp_path, ranks=ranks)
    assert len(expected) >= 6
    assert found == pytest.approx(expected, rel=1e-4)


# bert, t5 and ict mask their padding by FlexAttention on a GPU.
@pytest.mark.parametrize(
    "preset", ["quickstart", "quickstart-llama", "quickstart-bert", "quickstart-t5", "quickstart-ict", "quickstart-vit"]
)
def test_a_preset_has_the_cpus_losses(preset: str, library: Path, tmp_path: Path) -> None:
    words = f"--preset {preset} --num-layers 2 --train-iters 4 --eval-iters 1 --log-interval 1".split()
    expected, _ = run(library, "cpu", [*words, "--save", "cpu"], folder=tmp_path)
    found, _ = run(library, "cuda", [*words, "--save", "cuda"], folder=tmp_path)
    assert len(expected) >= 6
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_saved_from_the_device_and_goes_on_there(ranks: int, library: Path, tmp_path: Path) -> None:
    words = [*MODEL, "--log-interval", "1", "--eval-iters", "0", "--lr-decay-iters", "6", "--save-interval", "2"]
    words += "--train-iters 6 --check-replicas 2 --check-compute 3".split() if ranks > 1 else ["--train-iters", "6"]
    expected, _ = run(library, "cpu", [*words, "--save", "whole"], folder=tmp_path, ranks=ranks)
    first, _ = run(library, "cuda", [*words, "--exit-interval", "4", "--save", "cut"], folder=tmp_path, ranks=ranks)
    last, _ = run(library, "cuda", [*words, "--save", "cut"], folder=tmp_path, ranks=ranks)
    assert len(first) < len(expected) and len(last) < len(expected)
    assert [*first, *last] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ("", 1),
        (LLAMA, 1),
        (QWEN, 1),
        ("--context-parallel-size 2", 2),
        ("--context-parallel-size 2 --reset-attention-mask --attention-dropout 0", 2),
        ("--context-parallel-size 2 --context-exchange all-to-all", 2),
    ],
)
def test_a_step_waits_for_the_device_once(words: str, ranks: int, library: Path, tmp_path: Path) -> None:
    all_words = [*MODEL, "--log-interval", "100", "--eval-iters", "0", "--lr-decay-iters", "9", *words.split()]
    waits = []
    for steps in (3, 9):
        _, said = run(library, "cuda", [*all_words, "--train-iters", str(steps)], folder=tmp_path, ranks=ranks)
        (told,) = re.findall(r"^waits: (\d+)$", said, re.MULTILINE)
        waits.append(int(told))
    assert waits[1] - waits[0] == 6


def test_tensors_of_both_devices_fail_as_on_a_real_one(library: Path) -> None:
    program = f"""
import ctypes; ctypes.CDLL({str(library)!r})
from tests.stand_in import tensors
import torch
with tensors.stand_in():
    here = torch.ones(3, device="cuda").requires_grad_()
    (here * 2).sum().backward()
    assert here.is_cuda and here.grad.tolist() == [2.0] * 3
    try:
        here + torch.ones(3)
    except RuntimeError as error:
        print(error)
    print((here.cpu() + torch.ones(3)).device, float(here.sum() * torch.tensor(2.0)))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    mixed, apart = ended.stdout.splitlines()
    assert mixed.startswith("Expected all tensors to be on the same device")
    assert apart == "cpu 6.0"


def test_a_group_of_devices_takes_nothing_of_the_host_as_nccls(library: Path) -> None:
    program = f"""
import ctypes; ctypes.CDLL({str(library)!r})
from tests.stand_in import tensors
import torch, torch.distributed as dist
with tensors.stand_in():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(3, device="cuda"))
    dist.all_reduce(torch.ones(3), group=dist.new_group([0], backend="gloo"))
    for group in (None, dist.new_group([0])):
        try:
            dist.all_reduce(torch.ones(3), group=group)
        except RuntimeError as error:
            print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.splitlines() == ["No backend type associated with device type cpu: all_reduce"] * 2
