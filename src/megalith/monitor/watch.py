"""A rank that hangs, or that is gone, ends the job within a bounded time and by name.

A thread of each rank looks at where the rank is, puts that on a board, and looks at the others. It asks no torch
operation and takes no part in the process group, so it can tell when that is stuck. What it cannot do is run while a
rank is stopped or holds the interpreter's lock: then its own beats cease, and the others see that.

Time in which this process did not run (a suspended machine, a stopped job) counts for nobody.
"""

import faulthandler
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import FrameType, TracebackType
from typing import Any, Self

from megalith.launch import HUNG, PEER_LOST, STOPPING, PeerLostError
from megalith.monitor.board import Beat, Board
from megalith.monitor.memory import is_out_of_memory
from megalith.monitor.noted import Held
from megalith.monitor.peers import Peer
from megalith.terminal import say

USUAL_TICK = 0.3  # seconds between two looks
SECONDS_FOR_A_RANK = 0.001  # of a tick, at least: looking at one takes 12 to 22 microseconds of everybody's lock
SECONDS_TO_UNWIND = 0.7  # that a rank gets to notice by itself that another is gone
SECONDS_TO_TELL = 0.1  # and a tick: that the others get to print where they are
MOST_NAMED = 4  # ranks that are lost
STREAM = 2  # the error stream's descriptor: what Python has put in its place may be unusable
OF_TORCH = f"{os.sep}torch{os.sep}distributed{os.sep}"
OF_THREADS = (f"{os.sep}threading.py", f"{os.sep}concurrent{os.sep}futures{os.sep}_base.py")


@dataclass(frozen=True)
class Place:
    """Where a rank is. moves: how often it has gone on; limit: seconds that it may stay there, 0 for any.

    An operation of the disk may take that long, too; steps that go on beside it do not make it any shorter.
    """

    moves: int
    step: int
    phase: str
    limit: float
    held: Held | None = None  # what the disk has not returned from
    waits_for_disk: bool = False  # whether it goes on only after that


class Watch:
    """Watches this rank and the others while entered; a single rank has no board.

    peers: this rank and those whose rows it reads. hang_timeout: for the message. longest_tick: seconds, as `tick_for`
    gives them. end: called with HUNG or PEER_LOST to end this process at once, whatever its main thread does.
    """

    def __init__(
        self,
        rank: int,
        peers: Sequence[Peer],
        board: Board | None,
        *,
        hang_timeout: float,
        longest_tick: float,
        end: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rank, self._board = rank, board
        self._peers = {peer.rank: peer for peer in peers}
        self._is_alone = len(peers) == 1
        self._hang_timeout = hang_timeout
        self._end, self._clock = end, clock
        self._look_at: Callable[[], Place] = lambda: Place(0, 0, "start-up", 0.0)
        self._longest_tick = longest_tick
        self._seconds_to_tell = longest_tick + SECONDS_TO_TELL
        self._tick = min(longest_tick, hang_timeout / 10) if hang_timeout else longest_tick
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="megalith-watch", daemon=True)
        self._main = threading.main_thread().ident
        self._beat = Beat()
        self._idle = 0.0
        self._held: Held | None = None
        self._held_for = 0.0  # seconds
        self._held_told = 0  # the operation's number
        self._silent: dict[int, tuple[int, float]] = {}  # of each rank: its last beat's number, and seconds since
        self._lost_for = 0.0
        self._gone: dict[int, float] = {}  # ranks whose processes have ended, and since when that is known
        self._put(self._beat)

    def follow(self, look_at: Callable[[], Place]) -> None:
        """From now on the rank is where this function says; it is called in the thread."""
        self._look_at = look_at

    def __enter__(self) -> Self:
        # A crash, and the order to abort that `_judge` gives, then show the stack.
        faulthandler.enable(file=STREAM, all_threads=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not threading.current_thread():
            self._thread.join(5.0)
        faulthandler.cancel_dump_traceback_later()
        # Before the others are told: they end for this rank's error, and would be taken for its cause.
        is_told = isinstance(error, RuntimeError) and not is_out_of_memory(error)
        # A launcher that has seen another rank die sends signals to all; this one ends anyway, once it is known why.
        handlers = _deaf() if is_told and self._board is not None else {}
        text = self.lost_soon() if is_told else ""
        speaks = bool(text) and self._speaks(self._beats())
        if self._board is not None:
            self._put(replace(self._beat, left=True, failed=kind is not None, follows=bool(text)))
        self._close()
        if text:
            raise PeerLostError(text if speaks else "") from error
        for number, handler in handlers.items():
            if handler is not None:  # one that was not set from Python cannot be set again from here
                signal.signal(number, handler)

    def _close(self) -> None:
        if self._board is not None:
            self._board.close()

    def lost(self, beats: dict[int, Beat] | None = None) -> str:
        """Who of the others died or failed, in words; nothing if all live or have left in good order.

        beats: what the ranks say, if it was read just now.
        """
        beats = self._beats() if beats is None else beats
        gone, failed = self._lost(beats)
        # Those that ended because of others are named if nobody else is seen from here.
        first = [peer for peer in failed if not beats[peer.rank].follows] or ([] if gone else failed)
        words = [f"{peer} has died" for peer in gone]
        words += [f"{peer} failed: what it printed says why" for peer in first]
        more = f"; and {len(words) - MOST_NAMED} more" if len(words) > MOST_NAMED else ""
        return "; ".join(words[:MOST_NAMED]) + more

    def _speaks(self, beats: dict[int, Beat]) -> bool:
        """Whether no rank on this host has told by now who is lost, as far as is seen from here."""
        told = (rank for rank, beat in beats.items() if rank != self._rank and beat.follows)
        return not any(self._peers[rank].is_here for rank in told) and self._board is not None and self._board.claim()

    def lost_soon(self) -> str:
        """As `lost`; an error of a collective may be here before its cause can be seen."""
        until = self._clock() + SECONDS_TO_UNWIND + self._longest_tick
        while not (text := self.lost()) and self._clock() < until:
            time.sleep(self._longest_tick / 15)
        return text

    def _lost(self, beats: dict[int, Beat]) -> tuple[list[Peer], list[Peer]]:
        others = [peer for peer in self._peers.values() if peer.rank != self._rank]
        failed = [peer for peer in others if peer.rank in beats and beats[peer.rank].failed]
        left = {rank for rank, beat in beats.items() if beat.left}
        gone = [peer for peer in others if peer.rank not in left and self._board_of(peer) and peer.is_gone]
        if gone := [peer for peer in gone if self._is_read_since_gone(peer)]:
            left = {rank for rank, beat in self._beats().items() if beat.left}
        return [peer for peer in gone if peer.rank not in left], failed

    def _is_read_since_gone(self, peer: Peer) -> bool:
        """Whether the last that a rank said before it was gone can be read by now, or has been waited for."""
        assert self._board is not None
        since = self._gone.setdefault(peer.rank, time.monotonic())
        if self._board.read_at() >= since:
            return True
        self._board.refresh()
        return time.monotonic() - since > SECONDS_TO_UNWIND

    def _board_of(self, peer: Peer) -> bool:
        """Whether the rank's last row can be read here: without it nobody knows how it ended."""
        assert self._board is not None or len(self._peers) == 1
        return self._board is not None and (self._board.reads_all or self._rank == 0 or peer.rank == 0)

    def _beats(self) -> dict[int, Beat]:
        if self._board is None:
            return {}
        beats = {rank: Beat.from_row(row) for rank, row in self._board.read().items()}
        return {rank: beat for rank, beat in beats.items() if beat is not None}

    def _put(self, beat: Beat) -> None:
        self._beat = beat
        if self._board is not None:
            self._board.write(beat.to_row())

    def _run(self) -> None:
        before = self._clock()
        # A rank gets its time to unwind and no more, however rare the looks are.
        while not self._over.wait(min(self._tick, USUAL_TICK) if self._lost_for else self._tick):
            now = self._clock()
            elapsed, before = min(now - before, 2 * self._tick), now
            self.look(elapsed)

    def look(self, elapsed: float) -> None:
        """Look at this rank and at the others, so many seconds after the look before."""
        self._look_at_self(elapsed)
        if self._board is not None:
            self._look_at_others(elapsed)
        elif self._beat.limit and self._idle >= self._beat.limit:
            self._judge([self._rank], [])

    def _look_at_self(self, elapsed: float) -> None:
        place = self._look_at()
        self._idle = 0.0 if place.moves != self._beat.moves else self._idle + elapsed
        self._look_at_disk(place, elapsed)
        if place.limit:
            # If even this thread cannot run any more, the interpreter's own watchdog shows what holds the lock. Of
            # several ranks another sees to that and to the end; a single one has nobody else.
            patience = 1.2 * self._tick if self._is_alone else 2 * self._seconds_to_tell + 4 * self._tick
            left = max(place.limit - self._idle, 0.0) + patience
            faulthandler.dump_traceback_later(left, file=STREAM, exit=self._is_alone)
        else:
            faulthandler.cancel_dump_traceback_later()
        self._put(
            Beat(
                beats=self._beat.beats + 1,
                moves=place.moves,
                idle=self._idle,
                step=place.step,
                phase=place.phase,
                limit=place.limit,
                waits=self._idle > 2 * self._tick and waits_for_others(self._main),
            )
        )

    def _look_at_disk(self, place: Place, elapsed: float) -> None:
        """Name an operation that does not return; a rank that must wait for it hangs for as long as it takes."""
        is_same = self._held is not None and place.held is not None and place.held.number == self._held.number
        self._held, self._held_for = place.held, self._held_for + elapsed if is_same else 0.0
        if self._held is None or not place.limit or self._held_for < place.limit:
            return
        # Each step asks for a moment how the save is; who waits for it stands still.
        if place.waits_for_disk and self._idle > 2 * self._tick:
            self._idle = max(self._idle, self._held_for)
        elif self._held_told != self._held.number:
            self._held_told = self._held.number
            limit = f"limit {place.limit:g} s, --hang-timeout = {self._hang_timeout:g}"
            text = f"{self._peers[self._rank]} at step {place.step}: {self._told_of_disk()} ({limit}). The steps go on "
            say(f"{text}until they must wait for it")
            faulthandler.dump_traceback(file=STREAM, all_threads=True)

    def _told_of_disk(self) -> str:
        return f"the {self._held.what} has not returned for {self._held_for:.1f} s" if self._held is not None else ""

    def _look_at_others(self, elapsed: float) -> None:
        assert self._board is not None
        beats = self._beats() | {self._rank: self._beat}
        for rank, beat in beats.items():
            number, seconds = self._silent.get(rank, (-1, 0.0))
            self._silent[rank] = (beat.beats, 0.0 if beat.beats != number else seconds + elapsed)
        silence = {rank: self._silent[rank][1] if self._counts(rank) else 0.0 for rank in beats}
        running = {rank: beat for rank, beat in beats.items() if not beat.left and beat.limit}
        # What a silent rank said last may be of the first step, which may take longer; the others are past that.
        shortest = min((beat.limit for beat in running.values()), default=0.0)
        silent = [rank for rank in running if silence[rank] >= shortest / 2]
        if guilty := next((beat.guilty for rank, beat in beats.items() if rank != self._rank and beat.guilty), ()):
            self._judge(guilty, silent)  # as another rank has found
        if lost := self.lost(beats):
            self._lost_for += min(elapsed, USUAL_TICK)
            if self._lost_for >= SECONDS_TO_UNWIND:
                speaks = self._speaks(beats)
                self._put(replace(self._beat, left=True, failed=True, follows=True))
                if speaks:
                    say(f"rank {self._rank} ends: {lost}")
                self._board.close()
                self._end(PEER_LOST)
            return
        still = {rank: replace(beat, idle=beat.idle + silence[rank]) for rank, beat in running.items()}
        if is_stuck(still) or any(silence[rank] >= shortest for rank in running):
            self._judge(silent or find_guilty(still), silent)

    def _counts(self, rank: int) -> bool:
        """Whether silence is the rank's, not that of a store which answers nobody; such a store is rank 0's."""
        assert self._board is not None
        return rank == 0 or self._board.seconds_unanswered() < 5 * self._longest_tick

    def _judge(self, guilty: Sequence[int], silent: Sequence[int]) -> None:
        """Say who holds the job up, let the others say where they are, and end."""
        faulthandler.cancel_dump_traceback_later()
        beats = self._beats() | {self._rank: self._beat}
        speaker = next(rank for rank in itertools.count() if rank not in silent)
        if self._rank == speaker:
            limit = min((beat.limit for beat in beats.values() if beat.limit and not beat.left), default=0.0)
            for rank in (rank for rank in guilty if rank in beats):
                say(self._described(rank, beats[rank], limit, is_silent=rank in silent))
        self._put(replace(self._beat, guilty=tuple(guilty)))
        if self._rank in guilty:
            self._show_stack()
        # Who is silent can neither say where it is nor end by itself: an abort shows its stack, without the lock.
        here = [self._peers[rank] for rank in silent if self._rank == speaker and self._peers[rank].is_here]
        _send(here, signal.SIGABRT)
        _send(here, signal.SIGCONT)
        time.sleep(self._seconds_to_tell)
        _send(here, signal.SIGKILL)
        self._end(HUNG)

    def _described(self, rank: int, beat: Beat, limit: float, *, is_silent: bool) -> str:
        peer = self._peers[rank]
        seconds = beat.idle + (self._silent[rank][1] if is_silent else 0.0)
        limit = limit if is_silent else beat.limit
        at = "; it was last seen at" if is_silent else " at"
        text = f"{peer} made no progress for {seconds:.1f} s{at} step {beat.step} in {beat.phase}"
        if is_silent and peer.is_stopped:
            text += "; a signal has stopped it"
        elif is_silent:
            text += "; it does not answer: it holds the interpreter's lock, hangs in the kernel, or its host is gone"
        elif beat.waits:
            text += "; it waits for other ranks"
        setting = f"--hang-timeout = {self._hang_timeout:g}" if limit == self._hang_timeout else "at start-up"
        return f"{text} (limit {limit:g} s, {setting}). The job ends"

    def _show_stack(self) -> None:
        if self._held is not None and self._held_for >= self._beat.limit / 2:
            say(f"rank {self._rank}: {self._told_of_disk()}")
        say(f"rank {self._rank} is here, {self._beat.phase}, step {self._beat.step} (the innermost call first):")
        faulthandler.dump_traceback(file=STREAM, all_threads=True)


def _deaf() -> dict[signal.Signals, Any]:
    """Take no notice of signals that ask to stop; what was done about them before. Outside the main thread, nothing."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}


def tick_for(num_ranks: int) -> float:
    """Seconds between two looks at so many ranks: the more there are, the rarer, so that a look costs 2 % at most."""
    return max(USUAL_TICK, SECONDS_FOR_A_RANK * num_ranks)


def _send(peers: Sequence[Peer], number: signal.Signals) -> None:
    for peer in peers:
        if not peer.is_gone:
            with suppress(ProcessLookupError):
                os.kill(peer.pid, number)


def is_stuck(beats: dict[int, Beat]) -> bool:
    """Whether a rank has stood still for too long; one that only waits has not as long as another goes on."""
    late = [beat for beat in beats.values() if beat.idle >= beat.limit]
    return any(not beat.waits for beat in late) or (bool(late) and len(late) == len(beats))


def find_guilty(beats: dict[int, Beat]) -> list[int]:
    """Which of the ranks hold up the others, when one has waited for too long.

    Those that stand still without waiting for others; if all wait, those that have come least far.
    """
    still = [rank for rank, beat in beats.items() if beat.idle >= beat.limit / 2]
    busy = [rank for rank in still if not beats[rank].waits]
    # On a GPU a wait for others is not seen from the host: then all seem busy, and who has come least far tells.
    if busy and len(busy) < len(still):
        return busy
    least = min((beats[rank].step, beats[rank].moves) for rank in still)
    return [rank for rank in still if (beats[rank].step, beats[rank].moves) == least]


def waits_for_others(main: int | None) -> bool:
    """Whether the main thread waits in a collective, or for a thread of this process that does."""
    frames = sys._current_frames()
    # Its own would hold itself, and with it all that the others have at hand, until the garbage collector comes.
    del frames[threading.get_ident()]
    if main not in frames:
        return False
    if OF_TORCH in frames[main].f_code.co_filename:
        return True
    if not frames[main].f_code.co_filename.endswith(OF_THREADS):
        return False
    return any(_in_collective(frame) for ident, frame in frames.items() if ident != main)


def _in_collective(frame: FrameType) -> bool:
    return OF_TORCH in frame.f_code.co_filename
