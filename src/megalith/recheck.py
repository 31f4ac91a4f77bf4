"""Whether the ranks compute the same when they compute the same again.

A bit that flips in an activation or a gradient spreads to all replicas alike, so no comparison of weights sees it. But
a step's passes are a function of weights and samples: taken twice they give the same bits, or some rank erred. A third
time tells a chance event, after which two of three agree, from a device that computes wrongly. What is counted once in
a step (samples, updates, the loss scale, the pace of ranks) is not counted again.
"""

import hashlib
import time
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from megalith.guard import COMPUTES_WRONGLY, MOST_NAMES
from megalith.job import Job
from megalith.monitor.peers import this_process
from megalith.monitor.troubles import ErringRank, PassesCompared
from megalith.optim.local import local_part
from megalith.parallel.apply import Laid
from megalith.parallel.journal import JOURNAL, Finding, Note, compare
from megalith.parallel.reduce import Sharded, gradient_of
from megalith.parallel.step import Batch, Timers
from megalith.passes import run_microbatches
from megalith.ranks import Ranks

REMEMBERED_CHECKS = 100  # of which a rank may err in one, in a start of the run
NOBODY = -1  # has erred, if what ranks exchanged differs and nothing before


def is_due(job: Job) -> bool:
    """Whether the passes of the step that begins are to be compared."""
    every = job.run.parallel.check_compute
    return every > 0 and (job.progress.step + 1) % every == 0


def compares_gradients(device: torch.device) -> bool:
    """Whether a backward pass gives the same bits again: on a CPU, or where PyTorch was told to see to it.

    Usual kernels of GPUs add some gradients in the order in which they come.
    """
    return device.type == "cpu" or torch.are_deterministic_algorithms_enabled()


def tell_what_is_compared(job: Job) -> None:
    """Say at the start if less than everything is compared."""
    if job.run.parallel.check_compute and not compares_gradients(job.device):
        job.log.line(
            "note: --check-compute compares forward passes only: usual GPU kernels do not add gradients in the same "
            "order twice. With --deterministic gradients are compared, too."
        )


def take_checked_passes(job: Job, microbatches: Sequence[Batch], *, scale: float) -> dict[str, Tensor] | None:
    """As `passes.take_passes`, but taken until two times agree on all ranks; None if the run must stop instead.

    The gradients are those of the last time, which is one of the two that agree.
    """
    passes = [_noted(job, microbatches, scale=scale, timers=job.pace.around(job.timers))]
    began, losses = time.perf_counter(), passes[0][0]
    with job.ledger.spend("check"):
        agreeing: tuple[int, int] | None = None
        while agreeing is None and len(passes) < 3:
            job.ledger.move()
            job.seen.clear()
            passes.append(_noted(job, microbatches, scale=scale, timers=job.untimed))
            losses = passes[-1][0]
            agreeing = _agreeing([notes for _, notes in passes])
        if len(passes) == 2:
            job.log.report(PassesCompared(job.progress.step + 1, time.perf_counter() - began, "alike", (), ""))
            return losses
        erring = _erring(job, [notes for _, notes in passes], agreeing)
        persistent = _report(job, erring, agreeing, seconds=time.perf_counter() - began)
    if persistent:
        job.stop = COMPUTES_WRONGLY
        return None
    return losses


def _noted(
    job: Job, microbatches: Sequence[Batch], *, scale: float, timers: Timers
) -> tuple[dict[str, Tensor], list[Note]]:
    """The losses of a step, and what this rank noted on the way; the gradients as of `take_passes`, in place."""
    with_gradients = compares_gradients(job.device)
    job.laid.clear_gradients()
    with JOURNAL.kept(with_gradients=with_gradients):
        losses = run_microbatches(job, microbatches, scale=scale, backward=True, timers=timers)
        for name, loss in losses.items():
            JOURNAL.received(loss, f"the {name}")
        if with_gradients:
            _note_own_gradients(job.laid)
            with timers("backward-params-all-reduce"):
                job.laid.finish_gradients()
            if job.layout.world_size > 1:
                for name, held in job.laid.trained.held.items():
                    JOURNAL.received(local_part(gradient_of(held.parameter)), f"gradient.{name}")
        notes = JOURNAL.read()
    if not with_gradients:
        with timers("backward-params-all-reduce"):
            job.laid.finish_gradients()
    return losses, notes


def _note_own_gradients(laid: Laid) -> None:
    """What lies here of the gradients before replicas are summed; what FSDP2 has summed by now, others took part in."""
    note = JOURNAL.received if isinstance(laid.reduction, Sharded) else JOURNAL.made
    for part in laid.parts.values():
        for name, parameter in part.named_parameters():
            if parameter.grad is not None:
                note(local_part(parameter.grad), f"gradient.{name}")


def _agreeing(passes: Sequence[Sequence[Note]]) -> tuple[int, int] | None:
    """The numbers of two passes in which every rank noted the same; the same answer on all ranks."""
    folded = [hashlib.sha256(repr(notes).encode()).hexdigest() for notes in passes]
    tables = Ranks().gather(folded)
    alike = (pair for pair in combinations(range(len(passes)), 2) if all(t[pair[0]] == t[pair[1]] for t in tables))
    return next(alike, None)


def _erring(job: Job, passes: Sequence[Sequence[Note]], agreeing: tuple[int, int] | None) -> tuple[ErringRank, ...]:
    """The ranks that made something else of the same; the same answer on all ranks."""
    pairs = list(combinations(range(3), 2))
    if agreeing is not None:
        (odd,) = set(range(3)) - set(agreeing)
        pairs = [(odd, agreeing[1])]
    found = [finding for a, b in pairs if (finding := compare(passes[a], passes[b])) is not None]
    own = [finding for finding in found if finding.is_own]
    odd_passes = [1, 2, 3] if agreeing is None else [odd + 1]
    here = this_process(job.layout.rank).host.split()[0]
    said = Ranks().gather([here, _device(job.device), _names(own)])
    return tuple(
        ErringRank(rank, host, device, tuple(odd_passes), tuple(names))
        for rank, (host, device, names) in enumerate(said)
        if names
    )


def _names(findings: Sequence[Finding]) -> list[str]:
    return list(dict.fromkeys(name for finding in findings for name in finding.names))


def _device(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _report(job: Job, erring: tuple[ErringRank, ...], agreeing: Any, *, seconds: float) -> bool:
    """Tell what was found; whether it is more than chance: no two passes agree, or the same rank erred before."""
    step = job.progress.step + 1
    ranks = tuple(erred.rank for erred in erring) or (NOBODY,)
    oldest = step - REMEMBERED_CHECKS * job.run.parallel.check_compute
    before = sorted(rank for rank in ranks if job.erred.get(rank, oldest - 1) >= oldest)
    job.erred.update(dict.fromkeys(ranks, step))
    persistent = agreeing is None or bool(before)
    text = f"step {step}: its passes were taken three times, and "
    text += "all three differ" if agreeing is None else "two of the three agree"
    text += "".join(f"; {_told(erred)}" for erred in erring)
    if not erring:
        text += "; no rank made something else of the same: what ranks exchanged differs"
    if before and agreeing is not None:
        who = "which" if before == [NOBODY] else f"rank {', '.join(map(str, before))}"
        text += f"; {who} did so before, in the last {REMEMBERED_CHECKS} checks"
    text += "; the run ends, nothing of it is saved" if persistent else "; what two agree on is used"
    verdict = "persistent" if persistent else "transient"
    job.log.report(PassesCompared(step, seconds, verdict, erring, text))
    return persistent


def _told(erred: ErringRank) -> str:
    more = len(erred.tensors) - MOST_NAMES
    what = ", ".join(erred.tensors[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
    times = f" in pass {erred.passes[0]}" if len(erred.passes) == 1 else ""
    return f"rank {erred.rank} ({erred.host}, {erred.device}) erred{times}: {what}"
