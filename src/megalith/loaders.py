"""The data of a run: opened, announced, and dealt to this replica."""

from bisect import bisect_right

from megalith.data.loader import BatchSource, Loader
from megalith.data.order import CyclicOrder, OnceOrder, Order, RoundOrder, SingleOrder, sample_counts
from megalith.derived import dataloader_type
from megalith.job import Job, told_length
from megalith.monitor import lines
from megalith.monitor.events import DatasetsBuilt, PlaceReached, TargetsSet, TimersReported, Warned
from megalith.monitor.timers import SETUP_TIMERS
from megalith.optim.batch_size import consumed_after


def open_data(job: Job) -> None:
    """Open the data of every part that the run asks samples of; in place."""
    run = job.run
    with job.timers("train/valid/test-data-iterators-setup"):
        counts = sample_counts(
            train_iters=job.last_step,
            train_samples=run.train.train_samples,
            eval_interval=run.evaluate.eval_interval,
            eval_iters=run.evaluate.eval_iters,
            global_batch_size=job.batch_sizes.global_batch_size,
        )
        targets = {"train": counts.train, "valid": counts.valid, "test": counts.test}
        job.log.line(lines.building_datasets(), detail=True)
        job.log.report(TargetsSet(train=counts.train, validation=counts.valid, test=counts.test))
        job.log.line(lines.building_datasets(job.task.title), detail=True)
        if run.data.mock_data:
            assert job.task.build_mock is not None, "check_tasks.py saw to it"
            parts = job.task.build_mock(run, job.vocab_size, targets)
        else:
            parts = job.task.build_parts(
                run,
                job.tokenizer,
                vocab_size=job.vocab_size,
                targets=targets,
                report=job.log.report,
                moved=job.ledger.move,
            )
        job.log.report(DatasetsBuilt(job.task.title))
        job.loaders = {name: make_loader(job, name, source) for name, source in parts.items()}
        if "train" in parts and dataloader_type(run) == "single":
            _check_enough(job, len(parts["train"]))
        if "valid" in parts and job.task.validates_all:
            _tell_what_is_measured(job, len(parts["valid"]))
    job.log.report(PlaceReached("after dataloaders are built"))
    job.log.line(lines.setup_done(), detail=True)
    job.log.report(TimersReported(job.timers.elapsed(SETUP_TIMERS)))


def make_loader(job: Job, name: str, source: BatchSource) -> Loader:
    """What reads this replica's share of a part."""
    total = len(source)
    order: Order
    if name != "train" and job.task.validates_all:
        order = OnceOrder(total)
    elif name != "train":
        # Evaluations go round: how many there will be is not known when a run is continued with more steps.
        order = RoundOrder(total)
    elif dataloader_type(job.run) == "cyclic":
        order = CyclicOrder(total)
    else:
        order = SingleOrder(total)
    assert job.run.optimizer.micro_batch_size is not None
    return Loader(
        source,
        order,
        micro_batch_size=job.run.optimizer.micro_batch_size,
        replica=job.layout.place("data"),
        data_parallel=job.layout.data,
        pinned=job.device.type == "cuda",
    )


def _tell_what_is_measured(job: Job, total: int) -> None:
    """Warn if validations do not measure all samples of a task that could."""
    size, batches = job.batch_sizes.global_batch_size, job.run.evaluate.eval_iters
    if size * batches < total:
        text = f"--eval-iters = {batches}: validations measure the first {size * batches:,} of {total:,} samples"
        job.log.report(Warned(f"{text}. --eval-iters {-(-total // size)} measures all."))


def _check_enough(job: Job, total: int) -> None:
    """Raise ValueError if the steps still to come ask for more samples than the data set of the run has."""
    consumed, steps = job.progress.consumed_train_samples, job.last_step - job.progress.step
    if consumed_after(job.batch_sizes, consumed, steps) <= total:
        return
    enough = bisect_right(range(steps + 1), total, key=lambda count: consumed_after(job.batch_sizes, consumed, count))
    before = ", or keep the --global-batch-size of before" if consumed else ""
    raise ValueError(
        f"{told_length(job)}: {consumed:,} samples were taken in {job.progress.step:,} steps, and the "
        f"data set ends after {total:,}, in step {job.progress.step + max(1, enough):,}. Give fewer steps, or "
        f"--dataloader-type cyclic{before}"
    )
