"""Stored index maps: built once, rebuilt when they do not fit, and never wrong, whoever is killed or whatever fails."""

import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megalith.data import index_cache, kept_arrays
from megalith.data.blend import Blend, blend_order
from megalith.data.index_cache import ARRAYS, IndexMapsReport, load_or_build_blend, load_or_build_index_maps
from megalith.data.index_maps import IndexMaps, build_index_maps
from megalith.data.survey import Survey
from megalith.files import DISK, Disk
from tests.data.failing_disk import FailingDisk

FORK = multiprocessing.get_context("fork")
LENGTHS = np.array([5, 1, 9, 14, 2, 7, 31, 3, 12, 6], np.int32)
BASE = "corpus_train_indexmap_50ns_8sl_7s"


def ask(
    directory: Path,
    *,
    lengths: NDArray[np.int32] = LENGTHS,
    documents: range = range(10),
    cache_path: Path | None = None,
    survey: Survey | None = None,
    disk: Disk = DISK,
) -> tuple[IndexMaps, IndexMapsReport]:
    return load_or_build_index_maps(
        directory / "corpus",
        "train",
        documents=documents,
        lengths=lengths,
        num_samples=50,
        sequence_length=8,
        seed=7,
        cache_path=cache_path,
        survey=survey,
        disk=disk,
    )


def expected(lengths: NDArray[np.int32] = LENGTHS, documents: range = range(10)) -> IndexMaps:
    ids = np.array(documents, np.int32)
    return build_index_maps(ids, lengths, num_samples=50, sequence_length=8, seed=7)


def same(maps: IndexMaps, others: IndexMaps) -> bool:
    return all(np.array_equal(getattr(maps, name), getattr(others, name)) for name in ARRAYS)


def saved(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def test_maps_are_built_once_and_then_loaded(tmp_path: Path) -> None:
    maps, report = ask(tmp_path)
    assert report.rebuilt_because == "there were none" and same(maps, expected())
    assert set(report.seconds) == {*ARRAYS, "wait", "load"}
    maps, report = ask(tmp_path)
    assert report.rebuilt_because == "" and same(maps, expected())
    assert set(report.seconds) == {"wait", "load"}
    assert maps.plan == expected().plan and report.num_documents == 10 and report.sequence_length == 8
    assert not maps.doc_idx.flags.writeable


def test_files_have_the_names_and_the_bytes_that_megatron_gives_them(tmp_path: Path) -> None:
    _, report = ask(tmp_path)
    names = {f"{BASE}_{name}.npy" for name in ARRAYS}
    assert {path.name for path in tmp_path.iterdir()} == {*names, f"{BASE}_made_from.json"}
    for name in ARRAYS:
        assert report.paths[name] == tmp_path / f"{BASE}_{name}.npy"
        assert report.paths[name].read_bytes() == saved(getattr(expected(), name))


def test_a_part_without_a_whole_sample_is_stored_too(tmp_path: Path) -> None:
    for reason in ("there were none", ""):
        maps, report = load_or_build_index_maps(
            tmp_path / "corpus", "test", documents=range(1), lengths=LENGTHS, num_samples=0, sequence_length=8, seed=1
        )
        assert report.rebuilt_because == reason
        assert len(maps) == 0 and maps.sample_idx.tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("lengths", "documents"), [(LENGTHS[::-1].copy(), range(10)), (np.roll(LENGTHS, 1), range(10)), (LENGTHS, range(9))]
)
def test_maps_of_other_data_are_rebuilt(tmp_path: Path, lengths: NDArray[np.int32], documents: range) -> None:
    ask(tmp_path)
    maps, report = ask(tmp_path, lengths=lengths, documents=documents)
    assert report.rebuilt_because == "they were made from other data or settings"
    assert same(maps, expected(lengths, documents))


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit of the header": lambda path: flip(path, 20),
    "a flipped bit of the data": lambda path: flip(path, 150),
    "a flipped last bit": lambda path: flip(path, -1),
    "a lost end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "nothing left": lambda path: os.truncate(path, 0),
    "another array": lambda path: np.save(path, np.arange(5)),
    "no file": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_array_is_rebuilt_and_named(tmp_path: Path, name: str, damage: str) -> None:
    _, report = ask(tmp_path)
    DAMAGES[damage](report.paths[name])
    maps, again = ask(tmp_path)
    assert str(report.paths[name]) in again.rebuilt_because
    assert same(maps, expected())
    assert ask(tmp_path)[1].rebuilt_because == ""


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"[" * 60000, b'{"made_from": 1}', b"\xff\xfe", b"null", b"x" * 70000],
    ids=["empty", "cut", "list", "deep", "other", "bytes", "null", "long"],
)
def test_a_record_that_says_nothing_is_not_believed(tmp_path: Path, text: bytes) -> None:
    ask(tmp_path)
    (tmp_path / f"{BASE}_made_from.json").write_bytes(text)
    maps, report = ask(tmp_path)
    assert report.rebuilt_because and same(maps, expected())


@pytest.mark.parametrize("files", [None, [], {}, {"doc_idx": 3}, {"doc_idx": {"size": 1}}])
def test_a_record_without_digests_is_not_believed(tmp_path: Path, files: object) -> None:
    ask(tmp_path)
    path = tmp_path / f"{BASE}_made_from.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": files}))
    maps, report = ask(tmp_path)
    assert "is damaged" in report.rebuilt_because and same(maps, expected())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY no header"])
def test_what_was_recorded_and_is_no_array_is_not_believed(tmp_path: Path, content: bytes) -> None:
    _, report = ask(tmp_path)
    path, record = report.paths["sample_idx"], tmp_path / f"{BASE}_made_from.json"
    path.write_bytes(content)
    said = json.loads(record.read_text())
    said["files"]["sample_idx"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    record.write_text(json.dumps(said))
    maps, report = ask(tmp_path)
    assert "they are no arrays" in report.rebuilt_because and same(maps, expected())


def test_maps_without_a_record_are_rebuilt_with_the_same_bytes(tmp_path: Path) -> None:
    right = expected()
    for name in ARRAYS:
        np.save(tmp_path / f"{BASE}_{name}.npy", getattr(right, name))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    maps, report = ask(tmp_path)
    assert report.rebuilt_because == "nothing says what they were made from" and same(maps, right)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_data_sets_of_one_name_share_a_cache_without_disturbing_each_other(tmp_path: Path) -> None:
    cache = tmp_path / "not yet" / "cache"
    for reason in ("there were none", ""):
        maps, report = ask(tmp_path / "a", cache_path=cache)
        assert report.rebuilt_because == reason and same(maps, expected())
        maps, report = ask(tmp_path / "b", cache_path=cache, documents=range(4))
        assert report.rebuilt_because == reason and same(maps, expected(documents=range(4)))
        assert report.paths["doc_idx"].name == f"{BASE}_doc_idx.npy"


class ReadOnlyDisk(Disk):
    def create(self, path: Path) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_directory_that_cannot_be_written_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be written to .*Read-only.*--data-cache-path"):
        ask(tmp_path, disk=ReadOnlyDisk())
    with pytest.raises(ValueError, match=r"cannot be written to .*No such file.*--data-cache-path"):
        ask(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


class FullDisk(Disk):
    def free_bytes(self, path: Path) -> int:
        return 1000


def test_a_full_disk_is_found_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"index maps need \d+ bytes in .*, 1000 are free") as raised:
        ask(tmp_path, disk=FullDisk())
    assert raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("replacing", [False, True])
def test_whatever_operation_fails_no_wrong_maps_are_left(tmp_path: Path, replacing: bool) -> None:
    counting = FailingDisk()
    ask(tmp_path, disk=counting)
    assert counting.operations > 12
    for operation in range(1, counting.operations + 1):
        directory = tmp_path / str(operation)
        directory.mkdir()
        if replacing:
            ask(directory, documents=range(5))
        with pytest.raises(OSError, match="index maps need"):
            ask(directory, disk=FailingDisk(operation))
        assert not [path for path in directory.iterdir() if path.suffix in (".tmp", ".lock")]
        maps, report = ask(directory)
        # Only the last operation, syncing the directory after the record's rename, leaves a set that is whole.
        assert bool(report.rebuilt_because) == (operation < counting.operations)
        assert same(maps, expected())


class SlowDisk(Disk):
    """Takes its time over every new name, and says so in a file beside."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def rename(self, source: Path, target: Path) -> None:
        (target.parent.parent / "building").touch()
        time.sleep(self.seconds)
        super().rename(source, target)


def ask_and_tell(directory: Path, seconds: float, results: Any) -> None:
    """In a process of its own: ask for the maps, and put down whether they were built and what they are."""
    maps, report = ask(directory, disk=SlowDisk(seconds))
    results.put((report.rebuilt_because, [getattr(maps, name).tolist() for name in ARRAYS]))


def test_of_many_processes_one_builds(tmp_path: Path) -> None:
    results = FORK.Queue()
    (tmp_path / "data").mkdir()
    processes = [FORK.Process(target=ask_and_tell, args=(tmp_path / "data", 0.02, results)) for _ in range(6)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=20) for _ in processes]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert sorted(reason for reason, _ in outcomes) == ["", "", "", "", "", "there were none"]
    right = [getattr(expected(), name).tolist() for name in ARRAYS]
    assert all(arrays == right for _, arrays in outcomes)
    assert not [path for path in (tmp_path / "data").iterdir() if path.suffix in (".tmp", ".lock")]


def start_builder(tmp_path: Path, seconds: float) -> Any:
    """A process that is in the middle of building."""
    directory = tmp_path / "data"
    directory.mkdir()
    builder = FORK.Process(target=ask_and_tell, args=(directory, seconds, FORK.Queue()))
    builder.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "building").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return builder


def test_a_killed_builder_is_replaced_and_its_remains_removed(tmp_path: Path) -> None:
    builder = start_builder(tmp_path, seconds=60)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join(20)
    remains = {path.suffix for path in (tmp_path / "data").iterdir()}
    assert remains == {".tmp", ".lock"}
    maps, report = ask(tmp_path / "data")
    assert report.rebuilt_because and same(maps, expected())
    assert {path.suffix for path in (tmp_path / "data").iterdir()} == {".npy", ".json"}


def test_a_builder_is_named_and_waited_for_as_long_as_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_arrays, "SECONDS_UNTIL_TOLD", 0.1)
    builder = start_builder(tmp_path, seconds=60)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 2:  # it can be ended: the lock is free then, whatever its file says
            builder.kill()
            builder.join(20)

    maps, report = ask(tmp_path / "data", survey=Survey(say=say))
    assert f"'process {builder.pid} on " in said[0] and "is building index maps; waited for it for 0 s" in said[0]
    assert report.rebuilt_because and same(maps, expected())


def test_who_waits_looks_ever_less_often_and_is_not_taken_for_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build of 2,000 s, by a clock that only the pauses move; the watch of the start allows 1,800."""
    now, pauses, moves = [0.0], list[float](), list[float]()

    def sleep(seconds: float) -> None:
        now[0] += seconds
        pauses.append(seconds)
        if now[0] > 2000:
            os.close(holder)

    monkeypatch.setattr(kept_arrays, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    said: list[str] = []
    holder = os.open(tmp_path / f"{BASE}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(holder, fcntl.LOCK_EX)
    survey = Survey(moved=lambda: moves.append(now[0]), say=said.append)
    maps, report = ask(tmp_path, survey=survey)
    assert report.rebuilt_because and same(maps, expected()) and report.seconds["wait"] > 2000
    assert pauses[:6] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6] and len(pauses) < 1100
    assert max(np.diff([0.0, *moves])) < 2.1
    assert len(said) == 6


def test_a_build_moves_on_with_every_array(tmp_path: Path) -> None:
    moves: list[set[str]] = []
    survey = Survey(moved=lambda: moves.append({path.suffix for path in tmp_path.iterdir()}))
    ask(tmp_path, survey=survey)
    # While the lock lies there and the record, written last, does not.
    assert sum(".lock" in there and ".json" not in there for there in moves) == len(ARRAYS)


def wait_for_another_date(path: Path) -> None:
    """Until a file that is changed now bears another date than this one: a file system's clock may tick 100 times a
    second."""
    beside = path.with_name("beside")
    while beside.write_bytes(b"") or beside.stat().st_mtime_ns <= path.stat().st_ctime_ns:
        time.sleep(0.001)
    beside.unlink()


def test_what_a_survey_knows_is_not_read_again_unless_it_has_changed(tmp_path: Path) -> None:
    read: list[str] = []

    class Noting(Disk):
        def read(self, descriptor: int, buffer: memoryview, offset: int) -> int:
            read.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            return super().read(descriptor, buffer, offset)

    first = Survey()
    _, built = ask(tmp_path, survey=first)
    told = json.loads(json.dumps(first.findings))
    maps, report = ask(tmp_path, survey=Survey(told), disk=Noting())
    assert not read and same(maps, expected())
    # It was built, if not here: whoever speaks for the job says so.
    assert report.rebuilt_because == built.rebuilt_because == "there were none"
    assert {name: report.seconds[name] for name in ARRAYS} == {name: built.seconds[name] for name in ARRAYS}
    wait_for_another_date(report.paths["sample_idx"])
    flip(report.paths["sample_idx"], 150)
    maps, report = ask(tmp_path, survey=Survey(told), disk=Noting())
    assert set(read) == {str(path) for path in report.paths.values()} and same(maps, expected())
    assert "sample_idx.npy is damaged" in report.rebuilt_because


def test_a_process_that_waited_says_how_long(tmp_path: Path) -> None:
    builder = start_builder(tmp_path, seconds=0.1)
    maps, report = ask(tmp_path / "data")
    builder.join(20)
    assert report.rebuilt_because == "" and report.seconds["wait"] > 0.1
    assert same(maps, expected())


def test_without_locks_everyone_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert same(ask(tmp_path)[0], expected())
    assert ask(tmp_path)[1].rebuilt_because == ""


def test_another_fault_of_the_lock_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"):
        ask(tmp_path)


def test_a_lock_whose_file_was_removed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, its last owner may have removed it."""
    real = fcntl.flock
    removed: list[bool] = []

    def remove_first(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(True)
            (tmp_path / f"{BASE}.lock").unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with kept_arrays._lock(tmp_path / f"{BASE}.lock", "index maps") as owned:
        assert not owned
    with kept_arrays._lock(tmp_path / f"{BASE}.lock", "index maps") as owned:
        assert owned


def blend_in(folder: Path, weights: list[float], size: int, *, cache_path: Path | None = None) -> Blend:
    return load_or_build_blend(folder / "corpus", weights, size, cache_path=cache_path, survey=Survey())


def test_a_large_blend_is_kept_by_all_that_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "FEWEST_KEPT", 50)
    asked = [([0.1, 0.9], 60), ([0.1, 0.9], 61), ([0.3, 0.7], 60), ([0.9, 0.1], 60), ([0.1, 0.9], 49)]
    for kept in (0, 4):
        assert len(list(tmp_path.glob("*_made_from.json"))) == kept
        for weights, size in asked:
            found, right = blend_in(tmp_path, weights, size), blend_order(weights, size)
            for name in ("datasets", "samples", "taken"):
                mine, theirs = getattr(found, name), getattr(right, name)
                assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
            assert found.samples.flags.writeable == (size < 50)
    damaged = next(tmp_path.glob("*60ns*_samples.npy"))
    flip(damaged, 200)
    for weights, size in asked:
        assert np.array_equal(blend_in(tmp_path, weights, size).samples, blend_order(weights, size).samples)
    blend_in(tmp_path / "elsewhere", [0.1, 0.9], 60, cache_path=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*/*_made_from.json"))) == 1
    with pytest.raises(ValueError, match=r"blends cannot be written to .* give --data-cache-path"):
        blend_in(tmp_path / "nowhere", [0.1, 0.9], 60)
    blend_in(tmp_path / "nowhere", [0.1, 0.9], 49)
