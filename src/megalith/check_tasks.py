"""What a task needs of a run beside what all need: every fault at once."""

from collections.abc import Callable, Iterator

from megalith.config import Fault, Run, flag_of


def task_faults(run: Run) -> list[Fault]:
    """Every fault of the settings of the run's task."""
    rules = RULES.get(run.task)
    return [*_layouts(run), *(() if rules is None else rules(run))]


def _layouts(run: Run) -> Iterator[Fault]:
    """Layouts that only a causal decoder has."""
    size = run.parallel.context_parallel_size
    if run.task != "gpt" and size > 1:
        rule = f"cuts the sequence of a gpt over ranks; {run.task} has no such layout"
        yield Fault(flag_of("context_parallel_size"), size, rule, "Leave it out; use tensor or data parallelism")


# What is checked for one task alone.
RULES: dict[str, Callable[[Run], Iterator[Fault]]] = {}
