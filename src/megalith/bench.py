"""`megalith bench`: how fast a model trains on this machine, and what it needs; with made-up tokens, so without data.

What runs is pretrain's own step, told and watched as there, into a log that nobody reads. After the warm-up every step
is timed by itself, from one synchronization of the device to the next; where the time goes is measured in further
steps, since timers that synchronize cost time.
"""

import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TextIO

import torch

from megalith import __version__
from megalith.agreement import refuse, require_same_settings
from megalith.allocator import keep_freed_memory
from megalith.asked import Asked
from megalith.check import check
from megalith.check_tasks import MOCKED
from megalith.config import ConfigError, Run, known_settings
from megalith.derived import collective_timeout, compute_dtype, given_length, global_batch_size
from megalith.guard import COMPUTES_WRONGLY
from megalith.job import Job, build_job, open_log
from megalith.keeper import Keeper
from megalith.launch import as_program, launch, one_of_a_node_tells, ranks_in
from megalith.loaders import open_data
from megalith.monitor.flops import TERA
from megalith.monitor.memory import memory_use
from megalith.monitor.outlet import plain
from megalith.monitor.timers import STEP_TIMERS, Timers
from megalith.notices import USUAL_LOSS_SCALE
from megalith.parallel.mesh import Layout, choose_device, joined, make_layout
from megalith.plan.ceiling import measure_matmul_flops
from megalith.planned import kept_tokenizer, vocabulary_of
from megalith.ranks import Ranks
from megalith.room import refuse_what_cannot_fit
from megalith.task_rows import TASK_ROWS
from megalith.train import take_step, take_told_step
from megalith.watching import Places, open_watch

# What the timers of a step are called in the split; the optimizer's contains those of its parts.
SPLIT = {
    "batch-generator": "data",
    "forward-compute": "forward",
    "backward-compute": "backward",
    "forward-backward": "forward and backward",
    "backward-params-all-reduce": "reduction",
    "optimizer": "optimizer",
}
SPLIT_STEPS = 3
# What a measurement need not be told.
LEARNING_RATE = 1e-4
# Settings that nothing looks at while steps are measured, beside those that are replaced.
UNUSED_PARTS = ("checkpoint", "evaluate")
UNUSED = (
    *("max_restarts", "max_bad_steps", "check_replicas", "on_replica_fault", "exit_duration_in_mins"),
    *("slow_save_ratio", "profile_step_start", "profile_step_end", "profile_dir"),
    *("tensorboard_queue_size", "log_timers_to_tensorboard", "log_batch_size_to_tensorboard"),
    *("log_learning_rate_to_tensorboard", "log_loss_scale_to_tensorboard", "log_validation_ppl_to_tensorboard"),
)


def main(given: Asked, words: Sequence[str], *, started: float) -> int:
    """Measure what the words ask for, and print a table or one JSON object.

    started: when the program began, by time.monotonic.
    """
    options, rest, asked = given
    with one_of_a_node_tells():
        if asked.monitor.profile:
            raise ValueError("--profile: bench traces nothing. megalith pretrain --mock-data --profile ... does")
        if asked.task not in MOCKED:
            raise ValueError(
                f"{asked.task}: bench makes data up for {', '.join(MOCKED)} only. A run tells its speed in "
                "SAVE/log.jsonl."
            )
        run = made_for_measuring(asked, steps=options.warmup + options.steps + SPLIT_STEPS)
    if run.parallel.nproc is not None and "RANK" not in os.environ:
        command = as_program("megalith", "bench", *words)
        return launch(command, run.parallel.nproc, stop_grace=run.parallel.stop_grace, effect="end")
    rank, world_size, _ = ranks_in(os.environ)
    with one_of_a_node_tells():
        if faults := check(run, world_size):
            raise ConfigError(faults)
    if rank == 0 and (idle := without_effect(rest, asked, run)):
        change = "changes" if len(idle) == 1 else "change"
        text = f"note: bench makes tokens up, and reads and writes no run: {', '.join(idle)} {change} nothing."
        print(text, file=sys.stderr)
    figures = measure(run, warmup=options.warmup, steps=options.steps, started=started)
    if rank == 0:
        print(json.dumps(plain(figures), allow_nan=False) if options.json else table(figures), flush=True)
    return 0


def made_for_measuring(run: Run, *, steps: int) -> Run:
    """The run on made-up tokens, so many steps long, that takes them all and reads and writes no files."""
    optimizer, model = run.optimizer, run.model
    has_words = run.task in TASK_ROWS and TASK_ROWS[run.task].has_tokenizer
    # That of the run's own tokenizer, for the table of words may be the larger part of a model.
    vocab_size = vocabulary_of(run).size if has_words else run.data.vocab_size
    _, length = given_length(run)
    if run.task == "t5" and length is not None:
        length = max(length, run.data.decoder_seq_length or 0)
    places = None if length is None else max(1, length)  # a wrong length is one fault, not two
    return dataclasses.replace(
        run,
        model=dataclasses.replace(model, max_position_embeddings=model.max_position_embeddings or places),
        data=dataclasses.replace(
            run.data,
            mock_data=True,
            data_path=None,
            valid_data_path=None,
            test_data_path=None,
            titles_data_path=None,
            corpus=None,
            vocab_size=vocab_size,
        ),
        optimizer=dataclasses.replace(
            optimizer,
            lr=LEARNING_RATE if optimizer.lr is None else optimizer.lr,
            # A schedule made for another length; and a batch that is constant, or steps could not be compared.
            lr_decay_style="constant" if optimizer.lr_decay_style == "WSD" else optimizer.lr_decay_style,
            lr_decay_iters=None,
            lr_decay_samples=None,
            lr_wsd_decay_iters=None,
            lr_wsd_decay_samples=None,
            lr_warmup_iters=0,
            lr_warmup_samples=0,
            lr_warmup_fraction=None,
            lr_warmup_init=0.0,
            rampup_batch_size=None,
            on_nan="skip",
            # Steps whose gradients overflow update nothing: they are shorter than others.
            initial_loss_scale=min(optimizer.initial_loss_scale, USUAL_LOSS_SCALE),
            min_loss_scale=min(optimizer.min_loss_scale, USUAL_LOSS_SCALE),
        ),
        checkpoint=dataclasses.replace(
            run.checkpoint, save=None, load=None, finetune=False, save_interval=None, keep_last=None, keep_every=None
        ),
        evaluate=dataclasses.replace(run.evaluate, eval_iters=0, eval_first=False, sample_prompt=None),
        monitor=dataclasses.replace(run.monitor, tensorboard_dir=None),
        train=dataclasses.replace(
            run.train, train_iters=steps, train_samples=None, exit_interval=None, exit_before_training=False
        ),
    )


def without_effect(words: Sequence[str], asked: Run, measured: Run) -> list[str]:
    """Flags among the words that change nothing. measured: what `made_for_measuring` makes of the run that is asked."""
    flags, given = [], {word.split("=")[0] for word in words}
    for name, setting in known_settings().items():
        before, after = (getattr(getattr(run, setting.part), name) for run in (asked, measured))
        gives_vocabulary = name == "corpus" or (name == "save" and kept_tokenizer(asked) is not None)
        is_idle = before != after or setting.part in UNUSED_PARTS or name in UNUSED
        if is_idle and not gives_vocabulary and not given.isdisjoint(setting.flags):
            flags.append(setting.flag)
    return flags


@contextmanager
def prepared(run: Run, *, started: float) -> Iterator[tuple[Job, Keeper]]:
    """The job of a checked run that is only measured, watched and ready for `take_told_step`."""
    layout = make_layout(
        os.environ,
        tensor=run.parallel.tensor_model_parallel_size,
        pipeline=run.parallel.pipeline_model_parallel_size,
        context=run.parallel.context_parallel_size,
    )
    with ExitStack() as stack:
        device = choose_device(run.parallel.device, layout.local_rank)
        refuse_what_cannot_fit(run, layout, device)
        if device.type == "cpu":
            keep_freed_memory()
        meeting = joined(layout, device, join_timeout=run.parallel.join_timeout, timeout=collective_timeout(run))
        watch = stack.enter_context(open_watch(run, layout, stack.enter_context(meeting)))
        require_same_settings(run)
        silent: TextIO = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        log = stack.enter_context(open_log(run, layout, silent))
        job = build_job(run, layout, device, log, started=started)
        watch.follow(Places(job))
        keeper = stack.enter_context(Keeper(job))
        open_data(job)
        job.ledger.switch("other")
        job.first_step = job.progress.step
        yield job, keeper


def measure(run: Run, *, warmup: int, steps: int, started: float) -> dict[str, Any]:
    """The figures of a checked run, on every rank; times are those of this rank, memory is the most of any."""
    with prepared(run, started=started) as (job, keeper):
        device = job.device
        synchronize = torch.cuda.synchronize if device.type == "cuda" else _nothing
        first_loss = _step(job, keeper, synchronize).loss
        first_step_seconds = time.monotonic() - started
        for _ in range(warmup - 1):
            _step(job, keeper, synchronize)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        busy = time.process_time()
        timed = [_step(job, keeper, synchronize) for _ in range(steps)]
        busy = time.process_time() - busy
        memory = memory_use(device)
        peak = Ranks().largest([0 if memory is None else memory.max_allocated])[0]
        split = _split(job, keeper, synchronize)
        return {
            **_speed(job, [step.seconds for step in timed], device),
            "skipped_steps": sum(step.skipped for step in timed),
            "step_cpu_seconds": busy / steps,
            "first_step_seconds": first_step_seconds,
            "split_seconds": split,
            "peak_memory_bytes": peak or None,
            "parameters_on_this_rank": job.laid.num_parameters,
            "first_loss": first_loss,
            "last_loss": timed[-1].loss,
            **_conditions(run, job.layout, device),
        }


def _nothing() -> None:
    """The host has done its work when it returns."""


class Step(NamedTuple):
    seconds: float  # device included
    loss: float
    skipped: bool  # its gradients were not finite, so nothing was updated


def _step(job: Job, keeper: Keeper, synchronize: Callable[[], None]) -> Step:
    """Take a step as pretrain does. Raises ConfigError on every rank if what was computed is not to be trusted."""
    began = time.perf_counter()
    done = take_told_step(job, keeper)
    if job.stop == COMPUTES_WRONGLY:
        text = f"--check-compute: stopped at step {done.step} by {COMPUTES_WRONGLY}, so nothing is measured. "
        refuse(Ranks(), f"{text}megalith pretrain --mock-data names it with the same flags.")
    synchronize()
    seconds = time.perf_counter() - began
    return Step(seconds, float(done.losses[job.task.losses(job.run)[0]]), done.skipped)


def _split(job: Job, keeper: Keeper, synchronize: Callable[[], None]) -> dict[str, float]:
    """Seconds of each part of a step, means over a few; what no timer covers is `other`."""
    job.timers = Timers(synchronize)
    began = time.perf_counter()
    for _ in range(SPLIT_STEPS):
        with job.ledger.spend("step"):
            take_step(job, keeper)  # not told: a line would read the timers
        synchronize()
    total = (time.perf_counter() - began) / SPLIT_STEPS
    measured = job.timers.elapsed(STEP_TIMERS)
    split = {word: measured[name] / SPLIT_STEPS for name, word in SPLIT.items() if name in measured}
    return {**split, "other": total - sum(split.values())}


def _speed(job: Job, seconds: Sequence[float], device: torch.device) -> dict[str, Any]:
    batch = job.batch_sizes.batch_size(0)
    median = statistics.median(seconds)
    flops = job.task.step_flops(job.run, job.vocab_size, batch) / job.layout.world_size
    causal = job.task.causal_flops
    reached = flops / median
    matmul = measure_matmul_flops(device, getattr(torch, compute_dtype(job.run)))
    peak = job.interval.peak_flops
    return {
        "tokens_per_second": batch * job.task.num_places(job.run) / median,
        "step_seconds": median,
        "step_seconds_lowest": min(seconds),
        "step_seconds_highest": max(seconds),
        # Of two steps as well, they lie between the lowest and the highest.
        "step_seconds_quartiles": statistics.quantiles(seconds, n=4, method="inclusive")[::2]
        if len(seconds) > 1
        else [median, median],
        "timed_steps": len(seconds),
        "model_tflops": reached / TERA,
        "model_tflops_causal": None
        if causal is None
        else causal(job.run, job.vocab_size, batch) / job.layout.world_size / median / TERA,
        "matmul_tflops": matmul / TERA,
        "mfu": reached / matmul,
        "datasheet_tflops": None if peak is None else peak / TERA,
        "mfu_datasheet": None if peak is None else reached / peak,
    }


def _conditions(run: Run, layout: Layout, device: torch.device) -> dict[str, Any]:
    is_cuda = device.type == "cuda"
    return {
        "task": run.task,
        "num_layers": run.model.num_layers,
        "hidden_size": run.model.hidden_size,
        "vocab_size": run.data.vocab_size,
        "sequence_length": given_length(run)[1],
        "micro_batch_size": run.optimizer.micro_batch_size,
        "global_batch_size": global_batch_size(run, layout.data),
        "dtype": compute_dtype(run),
        "ranks": layout.world_size,
        "layout": {axis: size for axis, size in layout.sizes.items() if size > 1},
        "device": torch.cuda.get_device_name(device) if is_cuda else _processor(),
        "threads": None if is_cuda else torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "megalith": __version__,
    }


def _processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def table(figures: dict[str, Any]) -> str:
    """The figures for a person."""
    step, split = figures["step_seconds"], sum(figures["split_seconds"].values())
    low, high = figures["step_seconds_quartiles"]
    memory, datasheet = figures["peak_memory_bytes"], figures["mfu_datasheet"]
    of_ranks = f", the most of {figures['ranks']} ranks" if figures["ranks"] > 1 else ""
    rows = [
        ("device", f"{figures['device']}, torch {figures['torch']}"),
        ("tokens per second", f"{figures['tokens_per_second']:,.0f}"),
        ("step", f"{step:.4f} s (median of {figures['timed_steps']}; quartiles {low:.4f} to {high:.4f})"),
        *((f"  {name}", f"{s:.4f} s  {100 * s / split:5.1f} %") for name, s in figures["split_seconds"].items()),
        ("processor's time", f"{figures['step_cpu_seconds']:.4f} s a step, all threads of this rank"),
        ("first step after", f"{figures['first_step_seconds']:.1f} s"),
        ("peak memory", "unknown" if memory is None else f"{memory / 2**20:,.0f} MiB{of_ranks}"),
        ("model TFLOP/s", f"{figures['model_tflops']:.3f} (Megatron's convention)"),
    ]
    if skipped := figures["skipped_steps"]:
        why = "an overflow, a number that is not finite, or a spike"
        rows.insert(3, ("  skipped", f"{skipped} of {figures['timed_steps']} steps updated nothing: {why}"))
    if figures["model_tflops_causal"] is not None:
        rows.append(("", f"{figures['model_tflops_causal']:.3f} (causal)"))
    rows.append(("MFU", f"{100 * figures['mfu']:.1f} % of a measured {figures['matmul_tflops']:.3f} TFLOP/s"))
    if datasheet is not None:
        rows.append(("", f"{100 * datasheet:.1f} % of the data sheet's {figures['datasheet_tflops']:.0f} TFLOP/s"))
    return "\n".join(f"{name:<24}{value}" for name, value in rows)
