"""Opening data in turns: what takes long is done by one rank of those that see the same files, and told to the others.

Rank 0 comes first, then one rank of every other host, then all others; each is told what rank 0 and the first rank of
its own host found out. On a shared file system that leaves nothing to look at for all but rank 0; a host with files of
its own looks at them once.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megalith.config import ConfigError
from megalith.data.survey import Survey, nothing
from megalith.host_tree import EVERYONE
from megalith.monitor.peers import this_host
from megalith.ranks import Ranks, RanksError
from megalith.terminal import say

Value = TypeVar("Value")


def in_turns(work: Callable[[Survey], Value], *, moved: Callable[[], None] = nothing) -> Value:
    """What the work gives on this rank. Every rank calls it; each does the work once, in its turn.

    moved: called as the work gets on. An OSError or ValueError of one rank ends the turns on all: that rank raises it,
    the others a ConfigError that says nothing.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work(Survey(moved=moved, say=say))
    # Whether a rank at work hangs is for the watch to find, not for a limit of a collective.
    ranks = Ranks(EVERYONE.patient_tree())
    hosts = ranks.gather(this_host())
    first = hosts.index(hosts[ranks.rank])
    turn = 0 if ranks.rank == 0 else 1 if first == ranks.rank else 2
    told: dict[str, Any] = {}
    results: list[Value] = []
    failed: list[OSError | ValueError] = []

    def take() -> dict[str, Any]:
        survey = Survey(told, moved=moved, say=say)
        try:
            results.append(work(survey))
        except (OSError, ValueError) as error:
            failed.append(error)
            raise
        return {key: value for key, value in survey.findings.items() if key not in told}

    for number in (0, 1, 2) if len(set(hosts)) > 1 else (0, 2):
        try:
            found = ranks.together(take if turn == number else dict)
        except RanksError as error:
            raise (failed[0] if failed else ConfigError(())) from error
        told |= found[0] if number == 0 else found[first]
    return results[0]
