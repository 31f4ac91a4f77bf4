"""How ranks find each other before there is a process group: a store that all reach, and a roll call.

On one host nothing listens beyond loopback. Ranks of `--nproc` share anonymous memory and have no store on the network;
otherwise rank 0 keeps the store behind a socket bound here, for torch would bind one to every interface. Under torchrun
the store is the agent's, and so is its port.
"""

import json
import os
import re
import socket
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from megalith.launch import STORE_VARIABLE
from megalith.monitor.board import absent
from megalith.monitor.peers import Peer, this_process

DEFAULT_ADDRESS, DEFAULT_PORT = "127.0.0.1", 6000
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_CARD = 4096  # bytes of what a rank says of itself
BACKLOG = 2048  # connections that may wait
COMPLETE = "megalith/complete"  # what rank 0 sets once all are there
# Beside whom a command waits that stands in a batch script without srun.
BY_SLURM = ". SLURM_NTASKS says how many there are: start them with srun, or unset it for a run of one process"


def on_one_host(environment: Mapping[str, str], world_size: int) -> bool:
    """Whether all ranks are known to run on this machine."""
    if STORE_VARIABLE in environment or environment.get("MASTER_ADDR") in LOOPBACK:
        return True
    local = environment.get("LOCAL_WORLD_SIZE")
    if local is not None:
        return local == str(world_size)
    return environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES")) == "1"


def open_store(environment: Mapping[str, str], *, rank: int, world_size: int, seconds: float) -> Store:
    """The store through which the ranks of a job meet.

    Raises ValueError, naming address and port, if rank 0 cannot open it or is not found there within these seconds.
    """
    if STORE_VARIABLE in environment:
        return FileStore(environment[STORE_VARIABLE], world_size)
    host, port = environment.get("MASTER_ADDR", DEFAULT_ADDRESS), _port(environment)
    limit = timedelta(seconds=seconds)
    is_of_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps = rank == 0 and not is_of_agent
    # torchrun's store outlives a start: what the ranks before have left there must not be taken for the present.
    attempt = f"megalith/attempt-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    # On one host loopback, on which rank 0 listens then: the host's name may stand for another (127.0.1.1, say).
    address = DEFAULT_ADDRESS if on_one_host(environment, world_size) and not is_of_agent else host
    listener = _listen(address, port, host=host) if keeps else None
    try:
        if listener is None:
            store = TCPStore(address, port, world_size, is_master=False, timeout=limit, wait_for_workers=False)
        else:
            store = TCPStore(
                address,
                port,
                world_size,
                is_master=True,
                timeout=limit,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        return PrefixStore(attempt, store)
    except dist.DistError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"MASTER_ADDR = {host}, MASTER_PORT = {port}: rank {rank} found no rank 0 there within {seconds:g} s "
            f"({reason}). Correct the address, or see why rank 0 did not start"
        ) from error


def _port(environment: Mapping[str, str]) -> int:
    value = environment.get("MASTER_PORT", str(DEFAULT_PORT))
    if re.fullmatch("[0-9]{1,5}", value) is None or not 0 < int(value) < 65536:
        raise ValueError(f"MASTER_PORT = {value}: must be a number from 1 to 65535")
    return int(value)


def _listen(address: str, port: int, *, host: str) -> socket.socket:
    """A socket that listens there. host: what a user has named."""
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no name of a host"
        raise ValueError(f"MASTER_ADDR = {host}: {reason}. Name the host of rank 0") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"MASTER_ADDR = {host}, MASTER_PORT = {port}: rank 0 cannot listen there ({error.strerror}). "
            "Choose another port, or name the host of rank 0"
        ) from error
    return listener


def call_roll(store: Store, rank: int, world_size: int, *, seconds: float, whole: bool = True) -> list[Peer]:
    """The ranks as processes, once all are there: all of them, or rank 0 and this one if not whole.

    Rank 0 asks for all and tells the others, so what is asked of the store grows with the ranks and not with their
    square. Raises ValueError that names the missing if not all are there within these seconds.
    """
    mine, limit = this_process(rank), timedelta(seconds=seconds)
    keys = [f"megalith/present/{number}" for number in range(world_size)]
    wanted = range(world_size) if whole else sorted({0, rank})
    try:
        store.set(keys[rank], json.dumps([mine.pid, mine.host, mine.started]))
        store.wait(keys if rank == 0 else [COMPLETE], limit)
        if rank == 0:
            store.set(COMPLETE, "")
        cards = store.multi_get([keys[number] for number in wanted])
        return [_member(number, card) for number, card in zip(wanted, cards, strict=True)]
    except RuntimeError as error:
        missing = _absent(store, keys)
        names = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
        by_slurm = "" if "WORLD_SIZE" in os.environ or "SLURM_NTASKS" not in os.environ else BY_SLURM
        raise ValueError(
            f"--join-timeout = {seconds:g}: {names} of {world_size} did not come within that many seconds. See what "
            f"they printed and whether they were started, or raise it{by_slurm}"
        ) from error


def _absent(store: Store, keys: list[str]) -> list[int]:
    """The ranks that have not said that they are there; rank 0 if the store went with it."""
    try:
        missing = absent(store, keys)
        return [number for number, key in enumerate(keys) if key in missing] or [0]
    except RuntimeError:
        return [0]


def _member(rank: int, card: bytes) -> Peer:
    pid, host, started = json.loads(card[:LARGEST_CARD])
    return Peer(rank, int(pid), str(host), int(started))
