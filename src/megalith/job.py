"""What a run works with, built in the order in which it is announced; nothing here takes a step."""

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from megalith.agreement import require_same_data
from megalith.compiling import decide
from megalith.config import Run
from megalith.continuity import data_of
from megalith.data.loader import Loader
from megalith.data.tokenizer import Tokenizer, padded_vocab_size
from megalith.datasets import open_tokenizer
from megalith.derived import (
    collective_timeout,
    compute_dtype,
    global_batch_size,
    num_layers,
    recompute_granularity,
    reference_arguments,
    tokenizer_type,
)
from megalith.layers.feedforward import GATED
from megalith.models.shape import activation_of, key_heads, shape_of
from megalith.monitor import lines
from megalith.monitor.events import (
    Initialized,
    ModelBuilt,
    PlaceReached,
    RankParameters,
    RanksStarted,
    RunStarted,
    ScalarsOpened,
    ScheduleBuilt,
    TokenizerBuilt,
    Warned,
)
from megalith.monitor.flops import datasheet_flops
from megalith.monitor.interval import Interval
from megalith.monitor.ledger import Ledger, LedgerFile
from megalith.monitor.log import RunLog, choose_format
from megalith.monitor.noted import NotedDisk
from megalith.monitor.pace import Pace
from megalith.monitor.peers import seconds_of_life
from megalith.monitor.scalars import Scalars
from megalith.monitor.spikes import Spikes
from megalith.monitor.timers import Timers
from megalith.notices import notes, overridden, padding_warning, warnings_of
from megalith.optim.batch_size import ConstantBatch, RampedBatch, make_batch_sizes, steps_for_samples
from megalith.optim.finite import BadSteps
from megalith.optim.groups import build_optimizer
from megalith.optim.loss_scale import LossScale, make_loss_scale
from megalith.optim.schedule import Schedule, make_schedule
from megalith.parallel.apply import TIED, Laid, Sizes, lay_out
from megalith.parallel.mesh import Groups, Layout, make_groups
from megalith.parallel.seen import SeenLosses
from megalith.ranks import Ranks
from megalith.task import Task
from megalith.task_rows import TASK_ROWS

MOCK_VOCABULARY = 50257  # GPT-2's, for made-up tokens


@dataclass
class Progress:
    """All that changes from step to step, beside the weights and the optimizer's state."""

    step: int = 0  # optimizer steps, skipped ones included
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    owes: str | None = None  # which evaluation is still to be made at this step (evaluations.OWED)
    schedule_samples: int = 0  # of steps that were not skipped: what the learning rate counts
    loss_scale: LossScale | None = None
    skipped_steps: int = 0
    bad_steps: BadSteps = field(default_factory=BadSteps)
    spikes: Spikes = field(default_factory=lambda: Spikes(window=2, threshold=0.0))


@dataclass
class Job:
    """Everything that a run works with."""

    run: Run
    task: Task
    layout: Layout
    groups: Groups
    device: torch.device
    started: float  # when the program began, by time.monotonic
    log: RunLog
    timers: Timers
    ledger: Ledger
    disk: NotedDisk  # by which the run saves
    tokenizer: Tokenizer | None  # None for a task that reads no text
    vocab_size: int  # padded; 0 without a tokenizer
    data: list[dict[str, Any]]  # what tells the data from other data
    laid: Laid
    seen: SeenLosses
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    batch_sizes: ConstantBatch | RampedBatch
    last_step: int
    progress: Progress
    interval: Interval
    pace: Pace
    stop: str | None = None  # what went so wrong in a step that the run must stop after it
    erred: dict[int, int] = field(default_factory=dict)  # by rank, the last step in which it computed wrongly
    memory_reported: bool = False
    risk_told: bool = False  # what a kill would cost
    first_step: int | None = None  # the step from which this start goes on; None before the training
    # Step and mean losses of each evaluation on the validation data in this start.
    validations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    # Nothing is measured of an evaluation: the timers line speaks of steps.
    untimed: Timers = field(default_factory=Timers)
    loaders: dict[str, Loader] = field(default_factory=dict)  # by part of the data
    book: LedgerFile | None = None  # on the rank that keeps the ledger in the run directory


def open_log(run: Run, layout: Layout, stream: TextIO | None = None) -> RunLog:
    """The log of a run; only the last rank speaks, as in Megatron-LM, for the last stage knows the loss.

    stream: None for standard output.
    What exits before training owns no run directory and writes nothing there.
    """
    speaks = layout.rank == layout.world_size - 1
    writes = speaks and not run.train.exit_before_training
    folder = Path(run.checkpoint.save) if run.checkpoint.save is not None else None
    scalars = Scalars(Path(to), run.monitor) if writes and (to := scalars_folder(run)) is not None else None
    stream = stream or sys.stdout
    return RunLog(
        choose_format(run.monitor.log_format, stream),
        stream,
        jsonl_path=folder / "log.jsonl" if folder is not None and writes else None,
        scalars=scalars,
        is_printing_rank=speaks,
    )


def scalars_folder(run: Run) -> str | None:
    """Where TensorBoard's files go: --tensorboard-dir, or a folder of the run directory."""
    if run.monitor.tensorboard_dir is not None or run.checkpoint.save is None:
        return run.monitor.tensorboard_dir
    return str(Path(run.checkpoint.save) / "tensorboard")


def timers_of(run: Run, device: torch.device, log: RunLog) -> Timers:
    """Timers of each step wait for the device, or they would measure how fast it is given work."""
    waits = device.type == "cuda" and run.monitor.log_interval == 1
    if waits:
        log.line("--log-interval 1: timers wait for the device, so steps are a little longer than with 2 or more")
    return Timers(torch.cuda.synchronize if waits else None)


def build_job(run: Run, layout: Layout, device: torch.device, log: RunLog, *, started: float) -> Job:
    """Build and announce everything up to the first step, but load no checkpoint and open no data.

    Raises ValueError, naming what is wrong, for whatever of the user's is found missing or unfit.
    """
    task = task_of(run)
    ledger = Ledger(age=seconds_of_life())
    timers = timers_of(run, device, log)
    batch_sizes = make_batch_sizes(run.optimizer, data_parallel=layout.data)
    announce_start(run, layout, device.type, batch_sizes, log)
    tokenizer, vocab_size = announce_tokenizer(run, task, log)
    require_rows(run, vocab_size, layout)
    data = data_of(run, task, tokenizer, vocab_size, log)
    require_same_data(data, tokenizer)
    if (folder := scalars_folder(run)) is not None:
        log.report(ScalarsOpened(folder))
    log.line(lines.initializing_distributed(), detail=True)
    shard_size = run.parallel.data_parallel_shard_size
    groups = make_groups(layout, timeout=collective_timeout(run), shard_size=shard_size)
    announce_ranks(run, layout, log, started=started)

    log.line(lines.building_model(task.title), detail=True)
    last_step, peak = steps_of(run, batch_sizes), peak_flops(device, compute_dtype(run))
    flops = task.step_flops(run, vocab_size, batch_sizes.global_batch_size) / layout.world_size
    compiled, why = decide(run, device_type=device.type, peak_flops=peak, step_flops=flops, num_steps=last_step)
    if why is not None:
        log.line(why)
    with timers("model-and-optimizer-setup"):
        laid, seen = lay_out_model(run, task, layout, groups, device, vocab_size=vocab_size, compiled=compiled)
        optimizer = build_optimizer(laid.trained, run.optimizer, same_on_every_cut=run.parallel.deterministic)
    log.report(model_built(task, laid, layout))
    schedule = make_schedule(
        run.optimizer,
        global_batch_size=global_batch_size(run, layout.data),
        train_iters=run.train.train_iters,
        train_samples=run.train.train_samples,
    )
    if run.train.train_iters is None:
        log.line(f"setting training iterations to {last_step}", detail=True)
    log.report(ScheduleBuilt(schedule.style))
    return Job(
        run=run,
        task=task,
        layout=layout,
        groups=groups,
        device=device,
        started=started,
        log=log,
        timers=timers,
        ledger=ledger,
        disk=(disk := NotedDisk(ledger)),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        data=data,
        laid=laid,
        seen=seen,
        optimizer=optimizer,
        schedule=schedule,
        batch_sizes=batch_sizes,
        last_step=last_step,
        progress=Progress(
            loss_scale=make_loss_scale(run.optimizer),
            spikes=Spikes(window=run.optimizer.spike_window, threshold=run.optimizer.spike_threshold),
        ),
        pace=Pace(device, is_measured=layout.world_size > 1 and run.monitor.slow_rank_ratio > 0),
        book=LedgerFile(save, disk=disk) if (save := run.checkpoint.save) is not None and layout.rank == 0 else None,
        interval=Interval(time.perf_counter(), last_step=last_step, num_devices=layout.world_size, peak_flops=peak),
    )


def require_rows(run: Run, vocab_size: int, layout: Layout) -> None:
    """Raise ValueError if a tensor rank would hold no row of the vocabulary."""
    if vocab_size and (layout.tensor - 1) * -(-vocab_size // layout.tensor) >= vocab_size:
        raise ValueError(
            f"--make-vocab-size-divisible-by = {run.model.make_vocab_size_divisible_by}: the {vocab_size} rows of the "
            f"vocabulary leave a tensor rank without any. Give {layout.tensor} or a multiple of it."
        )


def lay_out_model(
    run: Run, task: Task, layout: Layout, groups: Groups, device: torch.device, *, vocab_size: int, compiled: bool
) -> tuple[Laid, SeenLosses]:
    """This rank's parts of the model with their first weights, and what sees the losses that they give."""
    dtype: torch.dtype = getattr(torch, compute_dtype(run))
    seen = SeenLosses(task.run_part)
    laid = lay_out(
        task.build_part(run, vocab_size, dtype),
        seen,
        model_sizes(run, task, vocab_size, dtype),
        run.parallel,
        layout,
        groups,
        device=device,
        seed=None if run.train.exit_before_training else run.train.seed,
        recompute=recompute_granularity(run),
        compiled=compiled,
        compute_dtype=dtype,
        is_tied=task.is_tied(run),
    )
    return laid, seen


def task_of(run: Run) -> Task:
    """The row of the run's task. Raises ValueError for a task that has none yet."""
    if run.task not in TASK_ROWS:
        raise ValueError(f"the task {run.task} cannot be trained yet: use {', '.join(TASK_ROWS)}")
    return TASK_ROWS[run.task]


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Floating-point operations per second of one device by its maker's data sheet; None where there is none."""
    return datasheet_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def model_sizes(run: Run, task: Task, vocab_size: int, dtype: torch.dtype) -> Sizes:
    """What the layout needs to know; costs are floating-point operations, in those of a layer."""
    shape, tokens = shape_of(run.model), task.num_places(run)
    heads, keys = shape.num_heads * shape.head_width, key_heads(run.model) * shape.head_width
    inner = (3 if activation_of(run.model) in GATED else 2) * shape.inner
    layer = 4 * shape.width * (heads + keys) + 2 * shape.width * inner + 4 * tokens * heads
    return Sizes(
        num_layers=num_layers(run),
        width=shape.width,
        first_cost=0.0,  # looking up is no work next to a layer's
        last_cost=2 * shape.width * vocab_size / layer,
        stream_dtype=torch.float32 if run.model.fp32_residual_connection else dtype,
        num_losses=len(task.losses(run)),
        tokens=tokens,
        entering=task.entering,
    )


def model_built(task: Task, laid: Laid, layout: Layout) -> ModelBuilt:
    """How many parameters there are, and on each rank of the model, in Megatron-LM's order."""
    counts = [0] * (layout.pipeline * layout.tensor)
    counts[layout.place("pipeline") * layout.tensor + layout.place("tensor")] = laid.num_parameters
    # The last stage's copy of a tied table is not another parameter.
    copies = set() if layout.is_first_stage or not laid.has_tied_copy else {TIED}
    of_stages = [0] * layout.pipeline
    of_stages[layout.place("pipeline")] = sum(
        math.prod(held.whole) for name, held in laid.trained.held.items() if name not in copies
    )
    found = Ranks().largest([*counts, *of_stages])
    counts, of_stages = found[: len(counts)], found[len(counts) :]
    ranks = [
        RankParameters(tensor, stage, counts[stage * layout.tensor + tensor])
        for stage in range(layout.pipeline)
        for tensor in range(layout.tensor)
    ]
    return ModelBuilt(task.title, sum(of_stages), tuple(ranks))


def announce_start(
    run: Run, layout: Layout, device_type: str, batch_sizes: ConstantBatch | RampedBatch, log: RunLog
) -> None:
    """Say how many ranks there are, every setting, and what deserves a note."""
    ramp = run.optimizer.rampup_batch_size
    remarks = overridden(run)
    if run.optimizer.global_batch_size is None:
        remarks.append(f"setting global batch size to {batch_sizes.global_batch_size}")
    if run.optimizer.bf16:
        remarks.append("accumulate and all-reduce gradients in fp32 for bfloat16 data type.")
    log.report(
        RunStarted(
            arguments=reference_arguments(run, layout),
            world_size=layout.world_size,
            data_parallel_size=layout.data,
            tensor_parallel_size=layout.tensor,
            pipeline_parallel_size=layout.pipeline,
            dtype=compute_dtype(run),
            num_microbatches=batch_sizes.num_microbatches(0),
            global_batch_size=batch_sizes.global_batch_size,
            rampup_batch_size=None if ramp is None else (int(ramp[0]), int(ramp[1]), int(ramp[2])),
            remarks=tuple(remarks),
        )
    )
    for line in notes(run):
        log.line(line)
    for text in warnings_of(run, num_steps=steps_of(run, batch_sizes), device_type=device_type):
        log.report(Warned(text))


def steps_of(run: Run, batch_sizes: ConstantBatch | RampedBatch) -> int:
    """How many optimizer steps the run takes in all."""
    return run.train.train_iters or steps_for_samples(run.train.train_samples or 0, batch_sizes)


def told_length(job: Job) -> str:
    """The flag that says how long the run is, with its value, and the steps that make it up."""
    samples = job.run.train.train_samples
    flag = "--train-iters" if samples is None else f"--train-samples = {samples}"
    return f"{flag} = {job.last_step} steps"


def announce_ranks(run: Run, layout: Layout, log: RunLog, *, started: float) -> None:
    """Say that the ranks stand. The seeds are Megatron-LM's of rank 0; ours come from --seed alone, on any layout."""
    seed = run.train.seed
    log.report(
        RanksStarted(
            tensor_parallel_size=layout.tensor,
            pipeline_parallel_size=layout.pipeline,
            seed=run.train.seed,
            rank=0,
            model_parallel_rank=0,
            data_parallel_rank=0,
            model_parallel_seed=seed + 2718,
            data_parallel_seed=seed,
        )
    )
    log.report(Initialized(time.monotonic() - started))
    log.report(PlaceReached("after megatron is initialized"))


def announce_tokenizer(run: Run, task: Task, log: RunLog) -> tuple[Tokenizer | None, int]:
    """The tokenizer and the size of the padded vocabulary, announced; made-up tokens need only the size."""
    if not task.has_tokenizer:
        return None, 0
    if run.data.mock_data:
        size = MOCK_VOCABULARY if run.data.vocab_size is None else run.data.vocab_size
        return None, padded_vocab_size(size, run.model.make_vocab_size_divisible_by, 1)
    log.line(lines.building_tokenizer(tokenizer_type(run)), detail=True)
    tokenizer = open_tokenizer(run)
    # Padded alike for every layout, so that a checkpoint and the loss do not depend on one.
    vocab_size = padded_vocab_size(tokenizer.vocab_size, run.model.make_vocab_size_divisible_by, 1)
    log.report(TokenizerBuilt(tokenizer.name, tokenizer.vocab_size, vocab_size))
    if text := padding_warning(run, tokenizer.vocab_size, vocab_size):
        log.report(Warned(text))
    return tokenizer, vocab_size
