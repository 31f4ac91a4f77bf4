"""What a look at 4,096 ranks costs, counted: rows, files, requests and comparisons. There are no such ranks here."""

import faulthandler
import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

import megalith.monitor.peers
from megalith.launch import PEER_LOST
from megalith.monitor.board import Beat, StoreBoard, absent
from megalith.monitor.pace import Slow, slow_ranks
from megalith.monitor.peers import Peer, this_host, this_process
from megalith.monitor.watch import Place, Watch, tick_for
from megalith.parallel.rendezvous import COMPLETE, call_roll

MANY = 4096
ON_A_HOST = 8


class Store:
    """Stands in for torch's: counts what it is asked."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self.held = dict(keys)
        self.requests: list[tuple[str, int]] = []  # what, and of how many keys

    def set(self, key: str, value: str) -> None:
        self.requests.append(("set", 1))
        self.held[key] = value

    def check(self, keys: Sequence[str]) -> bool:
        self.requests.append(("check", len(keys)))
        return all(key in self.held for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        self.requests.append(("wait", len(keys)))
        if not all(key in self.held for key in keys):
            raise RuntimeError("timed out")

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        self.requests.append(("multi_get", len(keys)))
        return [self.held[key].encode() for key in keys]


class Rows:
    """A board on which all ranks have written."""

    reads_all = False

    def __init__(self, rows: dict[int, bytes]) -> None:
        self.rows = rows

    def write(self, row: bytes) -> None:
        pass

    def read(self) -> dict[int, bytes]:
        return self.rows

    def seconds_unanswered(self) -> float:
        return 0.0

    def read_at(self) -> float:
        return time.monotonic()

    def refresh(self) -> None:
        pass

    def claim(self) -> bool:
        return True

    def close(self) -> None:
        pass


def made_up(*, gone: int | None = None) -> list[Peer]:
    """Peers of which the first host's are this process under several numbers, and one has died, if so wanted."""
    mine = this_process(0)
    here = [replace(mine, rank=rank) for rank in range(ON_A_HOST)]
    others = [Peer(rank, 1, f"node{rank // ON_A_HOST}", 1) for rank in range(ON_A_HOST, MANY)]
    return [replace(peer, pid=2**22 + 1) if peer.rank == gone else peer for peer in [*here, *others]]


@pytest.fixture(autouse=True)
def no_watchdog() -> Iterator[None]:
    """Each look winds up the interpreter's watchdog, whose thread a fork would wait for in vain."""
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are opened in search of peers."""
    paths: list[str] = []

    def opening(path: Any, *how: Any, **named: Any) -> Any:
        paths.append(str(path))
        return open(path, *how, **named)

    this_host.cache_clear()
    monkeypatch.setattr(megalith.monitor.peers, "open", opening, raising=False)
    return paths


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The rows that are taken apart."""
    rows: list[bytes] = []
    from_row = Beat.from_row

    def reading(row: bytes) -> Beat | None:
        rows.append(row)
        return from_row(row)

    monkeypatch.setattr(Beat, "from_row", reading)
    return rows


def test_a_look_reads_each_row_once_and_opens_files_of_this_host_only(opened: list[str], read: list[bytes]) -> None:
    board = Rows({rank: Beat(beats=1, limit=600.0).to_row() for rank in range(MANY)})
    watch = Watch(0, made_up(), board, hang_timeout=600.0, longest_tick=tick_for(MANY))
    watch.follow(lambda: Place(1, 1, "step", 600.0))
    assert opened.count("/proc/sys/kernel/random/boot_id") == 1
    for _ in range(3):
        opened.clear()
        read.clear()
        watch.look(tick_for(MANY))
        assert len(read) == MANY
        assert len(opened) == ON_A_HOST - 1 and not any("boot_id" in path for path in opened)


def test_a_lost_rank_is_found_among_4096_and_the_others_get_their_time_to_unwind() -> None:
    statuses: list[int] = []
    board = Rows({rank: Beat(beats=1, limit=600.0).to_row() for rank in range(MANY)})
    tick = tick_for(MANY)
    watch = Watch(0, made_up(gone=5), board, hang_timeout=600.0, longest_tick=tick, end=statuses.append)
    watch.follow(lambda: Place(1, 1, "step", 600.0))
    assert watch.lost().startswith("rank 5 (process 4194305 on ") and watch.lost().endswith(" has died")
    watch.look(tick)
    assert not statuses  # however long ago the look before was
    for _ in range(2):
        watch.look(0.3)
    assert statuses == [PEER_LOST]


def test_looks_are_the_rarer_the_more_ranks_there_are() -> None:
    assert tick_for(1) == tick_for(300) == 0.3
    assert tick_for(MANY) == 4.096


def test_a_board_asks_the_store_three_times_for_all_rows() -> None:
    store = Store({f"megalith/beat/{rank}": Beat(beats=rank).to_row().decode() for rank in range(MANY)})
    board = StoreBoard(store, 0, MANY, host="host0", interval=60.0)
    board.close()
    assert store.requests == [("set", 1), ("check", MANY), ("multi_get", MANY)]
    row = Beat.from_row(board.read()[MANY - 1])
    assert row is not None and row.beats == MANY - 1


def card(rank: int) -> str:
    return f'[{rank + 100}, "host{rank // ON_A_HOST}", 7]'


def test_a_roll_call_asks_a_few_times_and_only_rank_0_asks_for_all() -> None:
    store = Store({f"megalith/present/{rank}": card(rank) for rank in range(1, MANY)})
    peers = call_roll(store, 0, MANY, seconds=1)  # type: ignore[arg-type]
    assert store.requests == [("set", 1), ("wait", MANY), ("set", 1), ("multi_get", MANY)]
    assert [peer.rank for peer in peers] == list(range(MANY)) and peers[9] == Peer(9, 109, "host1", 7)
    store.requests.clear()
    pair = call_roll(store, 4000, MANY, seconds=1, whole=False)  # type: ignore[arg-type]
    assert store.requests == [("set", 1), ("wait", 1), ("multi_get", 2)]
    assert pair == [peers[0], this_process(4000)]


def test_the_few_that_did_not_come_are_named_after_few_requests() -> None:
    missing = {17, 18, 4000}
    present = {f"megalith/present/{rank}": card(rank) for rank in range(MANY) if rank not in missing}
    for rank in (0, 9):
        store = Store(present)
        with pytest.raises(ValueError, match="ranks 17, 18, 4000 of 4096 did not come"):
            call_roll(store, rank, MANY, seconds=1, whole=rank == 0)  # type: ignore[arg-type]
        assert COMPLETE not in store.held
        assert len(store.requests) <= 2 + 2 * len(missing) * math.log2(MANY)
    everything: Any = Store({})
    assert absent(everything, ["a", "b", "c"]) == {"a", "b", "c"} and absent(everything, []) == set()


def plain(seconds: Mapping[int, float], groups: Sequence[Sequence[int]], *, ratio: float) -> list[Slow]:
    """`slow_ranks` by its definition."""
    found = []
    for group in groups:
        for rank in group:
            others = [seconds[other] for other in group if other != rank]
            median = statistics.median(others) if others else 0.0
            if median > 0 and seconds[rank] > ratio * median:
                found.append(Slow(rank, seconds[rank] / median))
    return found


def test_slow_ranks_are_those_of_the_definition_to_the_bit() -> None:
    numbers = random.Random(0)
    for _ in range(2000):
        count = numbers.randint(1, 9)
        # Few different values, so that many are equal, and some are zero.
        seconds = {rank: numbers.choice((0.0, 0.1, 0.3, numbers.random())) for rank in range(count)}
        cut = numbers.randint(0, count)
        groups = [list(range(cut)), numbers.sample(range(cut, count), count - cut)]
        ratio = numbers.choice((0.5, 1.0, 1.5))
        assert slow_ranks(seconds, groups, ratio=ratio) == plain(seconds, groups, ratio=ratio)


class Compared(float):
    """Seconds that count how often they are compared."""

    times = 0

    def __lt__(self, other: float) -> bool:
        Compared.times += 1
        return float(self) < float(other)

    def __gt__(self, other: float) -> bool:
        Compared.times += 1
        return float(self) > float(other)


def test_slow_ranks_are_found_with_one_sort() -> None:
    numbers = random.Random(0)
    seconds = {rank: Compared(numbers.uniform(0.9, 1.1)) for rank in range(MANY)}
    seconds[77] = Compared(3.0)
    Compared.times = 0
    (slow,) = slow_ranks(seconds, [range(MANY)], ratio=1.5)
    assert slow.rank == 77
    assert Compared.times <= MANY * (math.log2(MANY) + 2)
