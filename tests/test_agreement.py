"""Ranks that are not given the same do not start: rank 0 says what differs and where, and all end with status 2."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import megalith.agreement
from megalith import cli
from megalith.agreement import host_name, named_ranks
from megalith.data.indexed import IndexedWriter
from megalith.launch import NOT_STARTED
from tests.faults.disk import Moment, Operation, Wire
from tests.layouts.runs import END_OF_DOCUMENT, MODEL, steps_of, write_data
from tests.ranks import watch_ranks

HOST = host_name()


def silent(rank: int) -> None:
    """What is done on a rank before its command, where nothing is."""


def command_on_ranks(
    folder: Path, words: Callable[[int], Sequence[str]], world_size: int, *, before: Callable[[int], None] = silent
) -> tuple[list[int | None], list[str]]:
    """Run `megalith pretrain` on that many ranks, each with words of its own: statuses, and what each rank said."""

    def on_rank(rank: int) -> int:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        os.dup2(os.open(folder / f"errors-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(2, "w", closefd=False)  # noqa: SIM115
        before(rank)
        status = cli.main(["pretrain", *words(rank)])
        sys.stderr.flush()
        return status

    ended = watch_ranks(on_rank, world_size, timeout=60.0)
    assert not any(end.error for end in ended), ended
    return [end.value for end in ended], [(folder / f"errors-{rank}").read_text() for rank in range(world_size)]


def on_its_node(rank: int) -> None:
    """Let each rank be the first of a node."""
    os.environ["LOCAL_RANK"] = "0"


def words_of(folder: Path, data: Path) -> list[str]:
    return [*MODEL, "--data-path", str(data), "--save", str(folder / "run"), "--train-iters", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--lr", "2e-3"], "--lr = 0.01 on ranks 0, 2 (host {h}) and 0.002 on rank 1 (host {h})"),
        (["--seed", "7"], "--seed = 1234 on ranks 0, 2 (host {h}) and 7 on rank 1 (host {h})"),
        (["--train-iters", "5"], "--train-iters = 4 on ranks 0, 2 (host {h}) and 5 on rank 1 (host {h})"),
        (["--save-interval", "1"], "--save-interval = 10 on ranks 0, 2 (host {h}) and 1 on rank 1 (host {h})"),
        (["--deterministic"], "--deterministic = not given on ranks 0, 2 (host {h}) and given on rank 1 (host {h})"),
        (
            ["--hidden-dropout", "0.5", "--eval-interval", "3"],
            "--hidden-dropout = 0.1 on ranks 0, 2 (host {h}) and 0.5 on rank 1 (host {h}); "
            "--eval-interval = 10 on ranks 0, 2 (host {h}) and 3 on rank 1 (host {h})",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_rank_with_another_setting_is_named_and_none_starts(
    extra: list[str], told: str, data: Path, tmp_path: Path
) -> None:
    words = [*words_of(tmp_path, data), "--global-batch-size", "12"]
    statuses, said = command_on_ranks(tmp_path, lambda rank: [*words, *(extra if rank == 1 else [])], 3)
    assert statuses == [NOT_STARTED] * 3
    rule = "all ranks must be given the same settings. Give every node the same command."
    assert said == [f"megalith: {told.format(h=HOST)}: {rule}\n", "", ""]
    assert not (tmp_path / "run").exists()


def test_a_run_without_save_on_one_rank_is_refused(data: Path, tmp_path: Path) -> None:
    words = words_of(tmp_path, data)
    without = [word for word in words if word not in ("--save", str(tmp_path / "run"))]
    statuses, said = command_on_ranks(tmp_path, lambda rank: without if rank else words, 2)
    assert statuses == [NOT_STARTED] * 2
    assert f"--save = a directory on rank 0 (host {HOST}) and not given on rank 1 (host {HOST}): " in said[0]


def other_data(folder: Path, change: int) -> Path:
    """Token files as `write_data` makes them, but for one token or for the length of one document."""
    folder.mkdir()
    prefix = folder / "bytes_document"
    with IndexedWriter(prefix, np.uint16) as writer:
        for number in range(60):
            writer.add_document([np.append(np.arange(20 + (change if number == 0 else 0)), END_OF_DOCUMENT)])
    return prefix


@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_rank_with_other_data_is_named_and_none_starts(part: str, tmp_path: Path) -> None:
    here, there = other_data(tmp_path / "a", 0), other_data(tmp_path / "b", 1)

    def words(rank: int) -> list[str]:
        own = there if rank else here
        if part == "train":
            return words_of(tmp_path, own)
        return [*words_of(tmp_path, here), "--valid-data-path", str(own)]

    statuses, said = command_on_ranks(tmp_path, words, 2)
    assert statuses == [NOT_STARTED] * 2
    number = 1 if part == "train" else 2
    assert said[0].startswith(f"megalith: data set {number} = idx_sha256 ") and said[1] == ""
    assert f" on rank 0 (host {HOST}) and idx_sha256 " in said[0] and f" on rank 1 (host {HOST}): " in said[0]
    assert said[0].endswith("all ranks must read the same data. Copy it to every node anew, or share it.\n")


def test_the_same_data_may_lie_elsewhere_and_a_node_has_settings_of_its_own(tmp_path: Path) -> None:
    here, there = other_data(tmp_path / "a", 0), other_data(tmp_path / "b", 0)
    own = ["--num-workers", "1", "--tensorboard-dir", str(tmp_path / "board"), "--data-cache-path", str(tmp_path / "b")]

    def words(rank: int) -> list[str]:
        return [*words_of(tmp_path, there if rank else here), "--local_rank", str(rank), *(own if rank else [])]

    statuses, said = command_on_ranks(tmp_path, words, 2)
    assert statuses == [0, 0], said
    assert len(steps_of(tmp_path / "run")) == 4


def test_a_rank_with_another_version_is_named(data: Path, tmp_path: Path) -> None:
    def install(rank: int) -> None:
        if rank == 1:
            setattr(megalith.agreement, "__version__", "9.9")  # noqa: B010 - mypy knows it as a constant

    statuses, said = command_on_ranks(tmp_path, lambda rank: words_of(tmp_path, data), 2, before=install)
    assert statuses == [NOT_STARTED] * 2
    assert f"the version of megalith = {megalith.__version__} on rank 0 (host {HOST}) and 9.9 on rank 1" in said[0]


def test_thousands_of_ranks_are_named_in_a_short_sentence() -> None:
    hosts = [f"node{rank // 8}" for rank in range(4096)]
    assert named_ranks([3], hosts) == "rank 3 (host node0)"
    assert named_ranks(range(8, 16), hosts) == "ranks 8 to 15 (host node1)"
    assert named_ranks([0, 1, 9], hosts) == "ranks 0 to 1, 9 (hosts node0, node1)"
    assert named_ranks(range(0, 4096, 2), hosts) == (
        "ranks 0, 2, 4, 6 and 2044 more (hosts node0, node1, node2, node3 and 508 more)"
    )


def test_nodes_that_do_not_share_the_run_directory_are_named_before_anything_is_trained(
    data: Path, tmp_path: Path
) -> None:
    def words(rank: int) -> list[str]:
        return [*words_of(tmp_path / ("b" if rank == 2 else "a"), data), "--global-batch-size", "12"]

    statuses, said = command_on_ranks(tmp_path, words, 3, before=on_its_node)
    assert statuses == [NOT_STARTED] * 3
    assert said[0] == (
        f"megalith: --save = {tmp_path / 'a' / 'run'}: rank 2 (host {HOST}) does not see what rank 0 (host {HOST}) "
        "wrote there. Name a directory on a file system that all nodes share.\n"
    )
    assert said[1:] == ["", ""]
    for node in ("a", "b"):
        assert list((tmp_path / node / "run" / "checkpoints").iterdir()) == []
        assert not (tmp_path / node / "run" / "log.jsonl").exists()


def test_a_shared_run_directory_may_have_another_path_on_each_node(data: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    statuses, said = command_on_ranks(tmp_path, lambda rank: words_of(tmp_path / "ab"[rank], data), 2)
    assert statuses == [0, 0], said
    assert [path.name for path in (tmp_path / "a" / "run" / "checkpoints").iterdir()] == ["step-0000004"]


def test_a_run_directory_that_another_node_cannot_write_to_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run").write_text("in the way")

    def words(rank: int) -> list[str]:
        return words_of(tmp_path / "ab"[rank], data)

    statuses, said = command_on_ranks(tmp_path, words, 2, before=on_its_node)
    assert statuses == [NOT_STARTED] * 2
    assert said[0].startswith(f"megalith: --save = {tmp_path / 'a' / 'run'}: on rank 1, checkpoints cannot be written")
    assert str(tmp_path / "b" / "run") in said[0] and said[0].endswith(". Choose another directory.\n")
    assert list((tmp_path / "a" / "run" / "checkpoints").iterdir()) == []


def test_a_run_directory_that_another_node_cannot_read_is_named_with_the_error(data: Path, tmp_path: Path) -> None:
    def cannot_read(moment: Moment, operation: Operation) -> None:
        if moment == "before" and operation.name == "read" and "checkpoints" in operation.path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), operation.path)

    def on_rank(rank: int) -> None:
        if rank == 1:
            Wire(cannot_read).install()

    statuses, said = command_on_ranks(tmp_path, lambda rank: words_of(tmp_path, data), 2, before=on_rank)
    assert statuses == [NOT_STARTED] * 2
    assert said[0].startswith(f"megalith: --save = {tmp_path / 'run'}: on rank 1, [Errno 5] Input/output error: '")
    assert said[0].endswith("'. Choose another directory.\n") and str(tmp_path / "run" / "checkpoints") in said[0]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
