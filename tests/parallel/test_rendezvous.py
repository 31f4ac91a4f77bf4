"""Ranks that do not find each other: a sentence within the stated seconds; and a store that only this host reaches."""

import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from megalith.parallel.rendezvous import call_roll, on_one_host, open_store
from tests.processes import listeners
from tests.ranks import run_ranks, watch_ranks


@pytest.fixture
def port() -> Iterator[int]:
    """A port that is free, in all likelihood, once asked for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = server.getsockname()[1]
    yield int(found)


def test_a_port_that_is_taken_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        began = time.monotonic()
        with pytest.raises(
            ValueError, match=r"MASTER_PORT = \d+: rank 0 cannot listen there \(Address already in use\)"
        ):
            open_store(environment, rank=0, world_size=2, seconds=60)
        assert time.monotonic() - began < 5


def test_an_address_that_nobody_knows_is_told() -> None:
    environment = {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "6000"}
    for rank in (0, 1):
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"MASTER_ADDR = no-such-host\.invalid"):
            open_store(environment, rank=rank, world_size=2, seconds=2)
        assert time.monotonic() - began < 20


@pytest.mark.parametrize("address", ["a" * 300, "two words..x"])
def test_an_address_that_is_none_is_told(address: str) -> None:
    with pytest.raises(ValueError, match=f"MASTER_ADDR = {address}: is no name of a host. Name the host of rank 0"):
        open_store({"MASTER_ADDR": address}, rank=0, world_size=2, seconds=1)


def test_a_rank_0_that_does_not_come_is_told_after_the_seconds(port: int) -> None:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"rank 1 found no rank 0 there within 1 s"):
        open_store(environment, rank=1, world_size=2, seconds=1)
    assert 0.5 < time.monotonic() - began < 15


def test_the_ranks_that_do_not_come_are_named(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "store"), 4)
    store.set("megalith/present/2", '[1, "host", 2]')
    began = time.monotonic()
    with pytest.raises(ValueError, match="--join-timeout = 1: ranks 1, 3 of 4 did not come within that many seconds"):
        call_roll(store, 0, 4, seconds=1)
    assert 0.9 < time.monotonic() - began < 15


def test_no_port_is_a_fault_of_the_setting() -> None:
    for value in ("0", "65536", "ssh", "-1", "", "²", "٣٣٣٣", "1" * 5000):
        with pytest.raises(ValueError, match=f"MASTER_PORT = {value}: must be a number"):
            open_store({"MASTER_PORT": value}, rank=0, world_size=2, seconds=1)


@pytest.mark.parametrize("address", [socket.gethostname(), "127.0.1.1"], ids=["name", "another-loopback"])
def test_the_store_of_one_host_is_reached_by_loopback_only(address: str, port: int) -> None:
    """127.0.1.1 is what a host's name stands for on many a system."""
    environment = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}

    def on_rank(rank: int) -> list[tuple[str, bool]]:
        store = open_store(environment, rank=rank, world_size=2, seconds=30)
        found = [(listener.address, listener.is_local) for listener in listeners([os.getpid()])]
        if rank:
            store.set("found", "")
            return []
        store.wait(["found"], timedelta(seconds=30))  # or the store would go before the other has found it
        return found

    ends = watch_ranks(on_rank, 2)
    assert not ends[0].error and not ends[1].error, ends
    assert ends[0].value and all(is_local for _, is_local in ends[0].value), ends[0].value


def test_a_start_does_not_see_what_the_one_before_left_in_torchruns_store(port: int) -> None:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    first = open_store({**environment, "TORCHELASTIC_RESTART_COUNT": "0"}, rank=0, world_size=2, seconds=10)
    first.set("megalith/present/1", "of a rank that has died")
    torchrun = {**environment, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    same, second = (
        open_store({**torchrun, "TORCHELASTIC_RESTART_COUNT": count}, rank=0, world_size=2, seconds=10)
        for count in ("0", "1")
    )
    assert same.check(["megalith/present/1"]) and not second.check(["megalith/present/1"])
    copies = [store.clone() for store in (same, second)]  # type: ignore[attr-defined]
    assert [copy.check(["megalith/present/1"]) for copy in copies] == [True, False]
    with pytest.raises(ValueError, match="rank 1 of 2 did not come"):
        call_roll(second, 0, 2, seconds=0.5)


def test_which_environments_say_that_all_ranks_are_here() -> None:
    assert on_one_host({"MEGALITH_STORE": "/proc/self/fd/3"}, 8)
    assert on_one_host({"MASTER_ADDR": "127.0.0.1"}, 8)
    assert on_one_host({"MASTER_ADDR": "node7", "LOCAL_WORLD_SIZE": "8"}, 8)
    assert on_one_host({"MASTER_ADDR": "node7", "SLURM_STEP_NUM_NODES": "1"}, 8)
    assert not on_one_host({"MASTER_ADDR": "node7", "LOCAL_WORLD_SIZE": "4"}, 8)
    assert not on_one_host({"MASTER_ADDR": "node7", "LOCAL_WORLD_SIZE": "all"}, 8)
    assert not on_one_host({"MASTER_ADDR": "node7", "SLURM_NNODES": "2"}, 8)
    assert not on_one_host({"MASTER_ADDR": "node7"}, 8)


def test_rank_0_knows_all_others_and_they_know_rank_0(port: int) -> None:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def on_rank(rank: int) -> list[tuple[int, int]]:
        store = open_store(environment, rank=rank, world_size=3, seconds=20)
        peers = call_roll(store, rank, 3, seconds=20, whole=rank == 0)
        dist.barrier()
        del store  # rank 0's, which the others may still ask
        return [(peer.rank, peer.pid) for peer in peers]

    all_three, second, third = run_ranks(on_rank, 3)
    assert [rank for rank, _ in all_three] == [0, 1, 2]
    assert second == all_three[:2] and third == [all_three[0], all_three[2]]


def test_another_rank_than_0_names_the_missing_too(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "store"), 4)
    store.set("megalith/present/0", '[1, "host", 2]')
    with pytest.raises(ValueError, match="ranks 2, 3 of 4 did not come"):
        call_roll(store, 1, 4, seconds=0.5, whole=False)
    for rank in (2, 3):
        store.set(f"megalith/present/{rank}", '[1, "host", 2]')
    with pytest.raises(ValueError, match="rank 0 of 4 did not come"):
        call_roll(store, 1, 4, seconds=0.5, whole=False)
    assert [peer.rank for peer in call_roll(store, 0, 4, seconds=0.5)] == [0, 1, 2, 3]
    assert [peer.rank for peer in call_roll(store, 1, 4, seconds=0.5)] == [0, 1, 2, 3]
