"""Saving in the background: what is saved is the moment of the call, and no failure is lost."""

import errno
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import megalith.checkpoint.saver as saver_module
from megalith.checkpoint.directory import CheckpointError, list_checkpoints
from megalith.checkpoint.pieces import Piece, whole
from megalith.checkpoint.saver import AsyncSaver
from megalith.checkpoint.store import load_latest, save
from megalith.checkpoint.writers import Plan
from megalith.files import Disk
from tests.checkpoint.runs import assert_equal, empty, load_newest, pieces_of, tensors_at
from tests.disks import HookedDisk, Moment, failing_disk
from tests.ranks import run_ranks


def state_at(step: int) -> dict[str, int]:
    return {"consumed_samples": 8 * step}


class Gate:
    """Holds a disk's first file until it is opened."""

    def __init__(self) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.disk = HookedDisk(self._hook)

    def _hook(self, moment: Moment, operation: str, path: Path) -> None:
        if operation == "create":
            self.reached.set()
            assert self.opened.wait(20)


def test_the_moment_of_the_call_is_saved_whatever_changes_afterwards(tmp_path: Path) -> None:
    gate = Gate()
    saver = AsyncSaver(tmp_path, disk=gate.disk)
    tensors, state = tensors_at(1), state_at(1)
    saver.save(1, pieces_of(tensors), state)
    assert gate.reached.wait(20)
    for tensor in tensors.values():
        tensor.zero_()
    state["consumed_samples"] = -1
    assert saver.poll() == [] and load_newest(tmp_path) is None
    gate.opened.set()
    (saved,) = saver.wait()
    assert saved.step == 1 and saved.num_bytes == 792 and 0 < saved.seconds < 60
    assert saved.path == tmp_path / "checkpoints" / "step-0000001"
    assert load_newest(tmp_path) is not None
    assert saver.wait() == saver.poll() == []
    saver.close()


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    gate = Gate()
    saver = AsyncSaver(tmp_path, disk=gate.disk)
    saver.save(1, pieces_of(tensors_at(1)), state_at(1))
    threading.Timer(0.2, gate.opened.set).start()
    stall = saver.save(2, pieces_of(tensors_at(2)), state_at(2))
    assert stall > 0.1
    assert [found.step for found in list_checkpoints(tmp_path)][:1] == [1]
    assert [saved.step for saved in saver.wait()] == [1, 2]
    loaded = load_newest(tmp_path)
    assert loaded is not None and loaded.index.step == 2
    saver.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_copy_has_the_bits_of_its_source_whatever_its_layout(dtype: torch.dtype) -> None:
    whole = torch.arange(60).view(3, 4, 5).to(dtype)
    for source in (whole, whole.transpose(0, 2), whole[:, 1:3], whole[1, 2, 3], whole[:0], whole[0].t()):
        target = torch.empty(source.shape, dtype=dtype)
        saver_module.copy_alone(target, source)
        assert torch.equal(target, source)


def test_with_overlap_only_the_update_waits_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()
    saver = AsyncSaver(tmp_path)
    original = saver_module.copy_alone

    def slow_copy(target: Tensor, source: Tensor) -> None:
        started.set()
        assert go_on.wait(20)
        original(target, source)

    monkeypatch.setattr(saver_module, "copy_alone", slow_copy)
    tensors = tensors_at(1)
    saver.save(1, pieces_of(tensors), state_at(1), overlap=True)
    assert started.wait(20)
    threading.Timer(0.2, go_on.set).start()
    assert 0.1 < saver.before_update() < 60
    for tensor in tensors.values():
        tensor.zero_()
    assert saver.before_update() == 0.0
    monkeypatch.undo()
    saver.wait()
    assert load_newest(tmp_path) is not None
    saver.close()


def test_a_failure_is_raised_once_and_the_next_save_succeeds(tmp_path: Path) -> None:
    class Filling(Disk):
        full = True

        def write(self, descriptor: int, data: memoryview) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(descriptor, data)

    disk = Filling()
    saver = AsyncSaver(tmp_path, disk=disk)
    pieces = pieces_of(tensors_at(1))
    saver.save(1, pieces, state_at(1))
    deadline = time.monotonic() + 20
    with pytest.raises(CheckpointError, match=r"step-0000001 was not written: rank 0: .*No space left"):
        while time.monotonic() < deadline:
            assert saver.poll() == []
    assert saver.poll() == []
    saver.save(2, pieces, state_at(2))
    with pytest.raises(CheckpointError, match="step-0000002 was not written"):
        saver.save(3, pieces, state_at(3))
    disk.full = False
    saver.save(1, pieces, state_at(1))
    assert [saved.step for saved in saver.wait()] == [1]
    assert load_newest(tmp_path) is not None
    saver.close()


def test_old_checkpoints_go_and_what_hinders_that_is_told(tmp_path: Path) -> None:
    saver = AsyncSaver(tmp_path, keep_last=2, keep_every=4)
    deleted: list[int] = []
    for step in range(1, 8):
        saver.save(step, pieces_of(tensors_at(step)), state_at(step))
        (saved,) = saver.wait()
        assert saved.warning == ""
        deleted += saved.deleted
    assert deleted == [1, 2, 3, 5]
    saver.close()

    class KeepsDirectories(Disk):
        def remove_directory(self, path: Path) -> None:
            raise OSError(errno.EIO, "Input/output error", str(path))

    saver = AsyncSaver(tmp_path, keep_last=1, disk=KeepsDirectories())
    saver.save(8, pieces_of(tensors_at(8)), state_at(8))
    (saved,) = saver.wait()
    assert "are kept" in saved.warning and "Input/output error" in saved.warning
    loaded = load_newest(tmp_path)
    assert loaded is not None and loaded.index.step == 8
    saver.close()


class Narrow(Disk):
    """A disk that is full while more than two checkpoints lie on it, as its writes say, or as it says before them."""

    def __init__(self, run: Path, *, says_so: bool) -> None:
        self._run, self._says_so = run, says_so

    def _is_full(self) -> bool:
        return len(list_checkpoints(self._run)) > 2

    def write(self, descriptor: int, data: memoryview) -> int:
        if self._is_full():
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(descriptor, data)

    def free_bytes(self, path: Path) -> int:
        return 10 if self._says_so and self._is_full() else super().free_bytes(path)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("says_so", [False, True])
def test_what_retention_leaves_out_makes_room_for_a_save(says_so: bool, world_size: int, tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step, pieces_of(tensors_at(step)), state_at(step))

    def on_rank(rank: int) -> list[int]:
        saver = AsyncSaver(tmp_path, keep_last=2, disk=Narrow(tmp_path, says_so=says_so))
        saver.save(5, pieces_of(tensors_at(5)), state_at(5))
        (saved,) = saver.wait()
        saver.close()
        assert saved.warning == ""
        return list(saved.deleted)

    assert run_ranks(on_rank, world_size) == [[1, 2, 3]] * world_size
    loaded = load_newest(tmp_path)
    assert loaded is not None and loaded.index.step == 5
    assert [found.step for found in list_checkpoints(tmp_path)] == [4, 5]


def test_an_error_that_is_no_want_of_room_costs_no_old_checkpoint(tmp_path: Path) -> None:
    class Broken(Disk):
        def write(self, descriptor: int, data: memoryview) -> int:
            raise OSError(errno.EIO, "Input/output error")

    for step in range(1, 5):
        save(tmp_path, step, pieces_of(tensors_at(step)), state_at(step))
    saver = AsyncSaver(tmp_path, keep_last=2, disk=Broken())
    saver.save(5, pieces_of(tensors_at(5)), state_at(5))
    with pytest.raises(CheckpointError, match="Input/output error"):
        saver.wait()
    saver.close()
    assert [found.step for found in list_checkpoints(tmp_path)] == [1, 2, 3, 4]


def test_nothing_makes_room_that_retention_keeps_or_before_the_newest_verifies(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step, pieces_of(tensors_at(step)), state_at(step))
    for keep_last in (4, None, 2):
        if keep_last == 2:
            (tmp_path / "checkpoints" / "step-0000004" / "rank-00000.safetensors").write_bytes(b"damaged")
        saver = AsyncSaver(tmp_path, keep_last=keep_last, disk=Narrow(tmp_path, says_so=False))
        saver.save(5, pieces_of(tensors_at(5)), state_at(5))
        with pytest.raises(CheckpointError, match=r"step-0000005 was not written.*No space left"):
            saver.wait()
        saver.close()
        assert [found.step for found in list_checkpoints(tmp_path)] == [1, 2, 3, 4]


def test_other_pieces_need_another_saver(tmp_path: Path) -> None:
    saver = AsyncSaver(tmp_path)
    saver.save(1, {"w": whole(torch.zeros(4))}, {})
    with pytest.raises(ValueError, match="make a new saver"):
        saver.save(2, {"w": whole(torch.zeros(5))}, {})
    with pytest.raises(ValueError, match="state of the checkpoint"):
        saver.save(2, {"w": whole(torch.zeros(4))}, {"loss": float("nan")})
    saver.close()


def test_only_what_a_rank_writes_is_read_and_only_when_it_is_saved(tmp_path: Path) -> None:
    names = [f"exp_avg.layers.{number}" for number in range(6)]

    def on_rank(rank: int) -> tuple[list[str], list[str], int]:
        reads: list[str] = []

        def read(name: str) -> Tensor:
            reads.append(name)
            return torch.full((3,), float(names.index(name)))

        # Both ranks hold all of it.
        outline = torch.empty(3, device="meta")
        pieces = {name: Piece(outline, (3,), (0,), partial(read, name)) for name in names}
        saver = AsyncSaver(tmp_path)
        saver.room(pieces)
        before = list(reads)
        saver.save(1, pieces, {})
        (saved,) = saver.wait()
        saver.close()
        return before, reads, saved.num_bytes

    (first, of_first, num_bytes), (second, of_second, _) = run_ranks(on_rank, 2)
    assert first == second == [] and num_bytes == 6 * 12
    assert sorted(of_first + of_second) == names and len(of_first) == len(of_second)
    tensors = {name: torch.zeros(3) for name in names}
    assert load_latest(tmp_path, {name: whole(tensor) for name, tensor in tensors.items()}) is not None
    assert [float(tensors[name][2]) for name in names] == [0, 1, 2, 3, 4, 5]


def test_ranks_save_while_the_training_speaks(tmp_path: Path) -> None:
    def on_rank(rank: int) -> int:
        saver = AsyncSaver(tmp_path, keep_last=2)
        total = torch.zeros(1000)
        tensors = empty()
        for step in range(1, 21):
            for name, value in tensors_at(step).items():
                tensors[name].copy_(value)
            saver.save(step, pieces_of(tensors, rank, 2), state_at(step), overlap=step % 2 == 0)
            # Collectives of the training, at the same time as those of the saver.
            value = torch.full((1000,), float(rank + step))
            dist.all_reduce(value)
            total += value
            saver.before_update()
        saver.wait()
        saver.close()
        return int(total[0])

    assert run_ranks(on_rank, 2) == [sum(2 * step + 1 for step in range(1, 21))] * 2
    assert [found.step for found in list_checkpoints(tmp_path)] == [19, 20]
    loaded = load_newest(tmp_path)
    assert loaded is not None and not loaded.refused


def test_all_ranks_learn_of_one_ranks_failure(tmp_path: Path) -> None:
    def on_rank(rank: int) -> str:
        saver = AsyncSaver(tmp_path, disk=failing_disk(1) if rank else Disk())
        saver.save(1, pieces_of(tensors_at(1), rank, 2), state_at(1))
        with pytest.raises(CheckpointError) as raised:
            saver.wait()
        saver.save(2, pieces_of(tensors_at(2), rank, 2), state_at(2))
        assert len(saver.wait()) == 1
        saver.close()
        return str(raised.value)

    first, second = run_ranks(on_rank, 2)
    assert first == second and "rank 1: [Errno 5] Input/output error" in first
    loaded = load_newest(tmp_path)
    assert loaded is not None and loaded.index.step == 2


def test_memory_is_one_copy_of_what_a_rank_writes(tmp_path: Path) -> None:
    saver = AsyncSaver(tmp_path)
    tensors = {"w": torch.randn(256, 256), "v": torch.randn(7).double()}
    copies = []
    for step in range(3):
        saver.save(step, {name: whole(tensor) for name, tensor in tensors.items()}, {})
        assert saver._host is not None
        copies.append({name: tensor.data_ptr() for name, tensor in saver._host.tensors.items()})
        assert len({tensor.untyped_storage().data_ptr() for tensor in saver._host.tensors.values()}) == 1
    assert copies[0] == copies[1] == copies[2]
    saver.close()


def test_the_copy_is_one_buffer_without_gaps_beyond_its_alignment() -> None:
    sources = {
        "odd": torch.randn(7, 3).double(),
        "half": torch.randn(33).bfloat16(),
        "count": torch.tensor(5),
        "turned": torch.randn(4, 6).t(),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
    }
    buffer, tensors = saver_module.in_one_buffer(sources)
    num_bytes = sum(source.numel() * source.element_size() for source in sources.values())
    assert num_bytes <= buffer.numel() < num_bytes + 64 * len(sources)
    for name, source in sources.items():
        assert tensors[name].untyped_storage().data_ptr() == buffer.data_ptr()
        assert tensors[name].data_ptr() % 64 == 0
        assert (tensors[name].dtype, tensors[name].shape) == (source.dtype, source.shape)
        saver_module.copy_alone(tensors[name], source)
    assert all(torch.equal(tensors[name], source) for name, source in sources.items())
    assert saver_module.in_one_buffer({})[0].numel() == 0


def test_pinned_memory_is_given_back_with_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        def __init__(self, status: int) -> None:
            self.status = status
            self.registered: dict[int, int] = {}

        def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:  # noqa: N802
            if not self.status:
                self.registered[pointer] = size
            return self.status

        def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802
            del self.registered[pointer]
            return 0

    buffer = torch.empty(100, dtype=torch.uint8)
    for status, expected in ((0, {buffer.data_ptr(): 100}), (2, {})):
        runtime = Runtime(status)
        monkeypatch.setattr(torch.cuda, "cudart", lambda runtime=runtime: runtime)
        host = saver_module.HostCopy(Plan((), 0, {}), {})
        host._pin(buffer)
        assert runtime.registered == expected
        del host
        assert not runtime.registered


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_a_cuda_device_holds_at_the_call_is_saved(tmp_path: Path) -> None:
    saver = AsyncSaver(tmp_path)
    size = 64 << 20
    tensor, factor = torch.zeros(size, device="cuda"), torch.randn(4096, 4096, device="cuda")
    for step in (1, 2):
        for _ in range(20):
            factor = torch.nn.functional.normalize(factor @ factor)
        tensor.fill_(float(step))
        pieces = {"w": Piece(tensor, (size,), (0,))}
        stall = saver.save(step, pieces, {}, overlap=True)
        waited = saver.before_update()
        tensor.zero_()
        (saved,) = saver.wait()
        assert saver._host is not None and saver._host.tensors["w"].is_pinned()
        print(f"256 MiB: save {stall:.4f} s, before_update {waited:.4f} s, written after {saved.seconds:.2f} s")
        read = torch.zeros(size, device="cuda")
        load_latest(tmp_path, {"w": whole(read)})
        assert bool((read == step).all())
    saver.close()


def test_a_loaded_checkpoint_is_what_a_plain_save_writes(tmp_path: Path) -> None:
    saver = AsyncSaver(tmp_path)
    saver.save(5, pieces_of(tensors_at(5)), state_at(5), notes={"host": "here"})
    saver.wait()
    tensors = empty()
    loaded = load_latest(tmp_path, pieces_of(tensors))
    assert loaded is not None and loaded.index.notes == {"host": "here"}
    assert_equal(tensors, tensors_at(5))
    saver.close()
