"""What the watch is told of a run: where each rank is, and for how long it may stay there."""

import os

from megalith.config import Run
from megalith.derived import start_limit
from megalith.job import Job
from megalith.launch import BOARD_VARIABLE
from megalith.monitor.board import Board, MemoryBoard, StoreBoard
from megalith.monitor.peers import this_host, this_process
from megalith.monitor.watch import Place, Watch, tick_for
from megalith.parallel.mesh import Company, Layout


def open_watch(run: Run, layout: Layout, company: Company) -> Watch:
    """The watch of this rank; of this rank alone if nobody has said who the others are."""
    board: Board | None = None
    tick = tick_for(layout.world_size)
    if BOARD_VARIABLE in os.environ and company.peers:
        board = MemoryBoard(os.environ[BOARD_VARIABLE], layout.rank, layout.world_size)
    elif company.store is not None:
        connection = company.store.clone()  # type: ignore[attr-defined]
        board = StoreBoard(connection, layout.rank, layout.world_size, host=this_host(), interval=tick)
    peers = company.peers if board is not None else (this_process(layout.rank),)
    watch = Watch(layout.rank, peers, board, hang_timeout=run.parallel.hang_timeout, longest_tick=tick)
    watch.follow(lambda: Place(0, 0, "start-up", start_limit(run)))
    return watch


class Places:
    """Where the rank is in a job; the watch calls it from its thread, so it only looks."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self) -> Place:
        job, account = self._job, self._job.ledger.account
        step = job.progress.step
        is_start = job.first_step is None or step == job.first_step
        limit = start_limit(job.run) if is_start else job.run.parallel.hang_timeout
        inside = ", ".join(job.timers.running())
        phase = f"{account} ({inside})" if inside else account
        # Steps go on beside a save until they must wait for its end.
        return Place(job.ledger.moves, step + 1, phase, limit, job.disk.held, waits_for_disk=account == "checkpoint")
