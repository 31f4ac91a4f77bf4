"""`megalith plan`: what a GPT job of any size will need and how long it will take, from its command line alone."""

import dataclasses
import json
from typing import Any

from megalith.asked import MOST_PLANS, Asked
from megalith.bench import made_for_measuring
from megalith.candidates import Candidate, candidates, fits, flags_of
from megalith.check import MOST, check
from megalith.config import ConfigError, Fault, Run, flag_of
from megalith.derived import compute_dtype, global_batch_size
from megalith.monitor.flops import TERA
from megalith.plan.job import Job, parameters_on_rank
from megalith.plan.machine import GIB, GIGA, MACHINES, Machine, this_cpu
from megalith.plan.memory import predict
from megalith.plan.time import predict_time, program_of
from megalith.plan.traffic import transfers
from megalith.planned import padded_vocabulary, planned, vocabulary_of, without_layout
from megalith.task_rows import TASK_ROWS
from megalith.terminal import counted

# What changes memory and time by what a compiler decides.
NOT_COUNTED = ("activation_memory_budget",)


def main(given: Asked) -> int:
    """Print the forecast as a table or one JSON object."""
    options, _, asked = given
    run = made_for_measuring(asked, steps=1)
    if run.task != "gpt":
        raise ValueError(f"{run.task}: only a gpt job can be planned; measure with megalith bench {run.task}")
    ranks = options.ranks or run.parallel.nproc or 1
    whole = completed(asked)
    faults = check(without_layout(whole), 1) if options.search else check(whole, ranks)
    if options.search and run.optimizer.global_batch_size is None:
        rule = "is missing: layouts are compared by what they take for the same step"
        faults.append(Fault("--global-batch-size", None, rule, "Say how many sequences a step has"))
    if faults:
        raise ConfigError(faults)
    machine = machine_of(options.on, run, ranks)
    if options.search:
        return search(run, ranks, machine, as_json=options.json)
    figures = forecast(run, ranks, machine)
    print(json.dumps(figures) if options.json else table(figures))
    return 0


def completed(run: Run) -> Run:
    """The run with all that pretrain needs and a plan does not, so that what pretrain refuses besides is refused.

    No file or directory of another run is looked for.
    """
    measured, optimizer, train = made_for_measuring(run, steps=1), run.optimizer, run.train
    if train.train_iters is None and train.train_samples is None:
        of_samples = (optimizer.lr_decay_samples, optimizer.lr_warmup_samples, optimizer.lr_wsd_decay_samples)
        by_samples = optimizer.rampup_batch_size is not None or any(of_samples)
        iters, samples = (None, MOST) if by_samples else (MOST, None)
        train = dataclasses.replace(train, train_iters=iters, train_samples=samples)
    interval = 1 if run.checkpoint.save_interval is None else run.checkpoint.save_interval
    return dataclasses.replace(
        measured,
        optimizer=dataclasses.replace(optimizer, lr=measured.optimizer.lr),
        checkpoint=dataclasses.replace(run.checkpoint, load=None, finetune=False, save_interval=interval),
        evaluate=run.evaluate,
        train=train,
    )


def machine_of(name: str, run: Run, ranks: int) -> Machine:
    """What is known of a machine; of this one's CPU by measuring."""
    if name != "cpu":
        return MACHINES[name]
    import torch

    return this_cpu(ranks, getattr(torch, compute_dtype(run)))


def forecast(run: Run, ranks: int, machine: Machine) -> dict[str, Any]:
    """The figures of a checked run on that many ranks; bytes, operations and seconds are those of one rank."""
    job = planned(run, ranks, vocab_size=padded_vocabulary(run), device=machine.device)
    memory, batch = predict(job), global_batch_size(run, job.data)
    seconds = predict_time(job, machine, program_of(job))
    flops = TASK_ROWS["gpt"].step_flops(run, job.vocab_size, batch)
    tokens = batch * job.sequence_length
    whole = dataclasses.replace(job, tensor=1, pipeline=1)
    return {
        "parameters": round(parameters_on_rank(whole)),
        "parameters_on_a_rank": parameters_on_rank(job),
        "vocabulary": job.vocab_size,
        "vocabulary_of": vocabulary_of(run).known_by,
        "layout": {"data": job.data, "tensor": job.tensor, "pipeline": job.pipeline, "context": job.context},
        "global_batch_size": batch,
        "tokens_per_step": tokens,
        "microbatches": job.num_microbatches,
        "dtype": compute_dtype(run),
        **{f"{name}_bytes": value for name, value in dataclasses.asdict(memory).items()},
        "peak_bytes": memory.total,
        "step_tflop": flops / TERA,
        "step_tflop_per_rank": flops / ranks / TERA,
        "machine": machine.name,
        "machine_memory_bytes": machine.memory_bytes,
        "fits": fits(memory.total, machine),
        "step_seconds": seconds.total,
        "seconds": dataclasses.asdict(seconds),
        "tokens_per_second": tokens / seconds.total,
        "mfu": flops / ranks / seconds.total / machine.flops,
        "sent_bytes": sent_bytes(job),
        "not_counted": [flag_of(name) for name in NOT_COUNTED if getattr(run.parallel, name) is not None],
    }


def sent_bytes(job: Job) -> dict[str, float]:
    """Bytes that the rank which sends most sends in a step, by what for."""
    sent: dict[str, float] = {}
    for move in transfers(job):
        sent[move.purpose] = sent.get(move.purpose, 0.0) + move.sent * move.calls
    return sent


def table(figures: dict[str, Any]) -> str:
    """The figures for a person."""
    layout = " x ".join(f"{axis} {size}" for axis, size in figures["layout"].items() if size > 1) or "one rank"
    memory = [
        (f"  {name}", f"{figures[f'{name}_bytes'] / GIB:8.2f} GiB")
        for name in ("weights", "gradients", "optimizer", "activations", "working")
    ]
    fitting = "fits" if figures["fits"] else "does NOT fit"
    room = f"{fitting} into {figures['machine_memory_bytes'] / GIB:.0f} GiB of {figures['machine']}"
    seconds = [(f"  {name}", f"{value:8.3f} s") for name, value in figures["seconds"].items() if value >= 5e-4]
    speed = f"{figures['tokens_per_second']:,.0f} tokens/s, MFU {100 * figures['mfu']:.1f} %"
    sent = [(f"  {name}", f"{value / GIGA:8.3f} GB") for name, value in figures["sent_bytes"].items()]
    microbatches = counted(figures["microbatches"], "microbatch", "microbatches")
    rows = [
        ("parameters", f"{figures['parameters']:,.0f}"),
        ("  vocabulary", f"{figures['vocabulary']:,} rows ({figures['vocabulary_of']})"),
        ("layout", layout),
        ("  parameters of a rank", f"{figures['parameters_on_a_rank']:,.0f}"),
        ("step", f"{figures['tokens_per_step']:,} tokens in {microbatches} of a rank"),
        ("  operations", f"{figures['step_tflop']:,.1f} TFLOP, {figures['step_tflop_per_rank']:,.2f} a rank"),
        ("peak memory of a rank", f"{figures['peak_bytes'] / GIB:8.2f} GiB, {room}"),
        *memory,
        ("time of a step", f"{figures['step_seconds']:8.3f} s, {speed}"),
        *seconds,
        ("sent by a rank in a step", f"{sum(figures['sent_bytes'].values()) / GIGA:8.3f} GB"),
        *sent,
        *(("not counted", f"{flag}: less memory than said, more time") for flag in figures["not_counted"]),
    ]
    return "\n".join(f"{name:<26}{value}" for name, value in rows)


def search(run: Run, ranks: int, machine: Machine, *, as_json: bool) -> int:
    """Print the fastest layouts that fit. Raises ValueError if none does."""
    found = sorted(candidates(run, ranks, machine), key=lambda candidate: candidate.seconds)
    fitting = [candidate for candidate in found if fits(candidate.peak_bytes, machine)]
    if not found:
        batch, micro = run.optimizer.global_batch_size, run.optimizer.micro_batch_size
        held = f"--global-batch-size {batch}" + (f" in microbatches of {micro}" if micro is not None else "")
        raise ValueError(f"--ranks = {ranks}: no layout suits the model and {held}. Change one of them")
    if not fitting:
        least = min(found, key=lambda candidate: candidate.peak_bytes)
        raise ValueError(
            f"--ranks = {ranks}: none of {len(found):,} layouts fits into {machine.memory_bytes / GIB:.0f} GiB; the "
            f"smallest takes {least.peak_bytes / GIB:.1f} GiB a rank: {' '.join(flags_of(least.run))}. Use more ranks"
        )
    tokens = global_batch_size(run, 1) * found[0].job.sequence_length
    if as_json:
        print(
            json.dumps(
                {"tried": len(found), "fit": len(fitting), "layouts": [_row(c, tokens) for c in fitting[:MOST_PLANS]]}
            )
        )
        return 0
    print(f"{len(found):,} layouts of {ranks:,} ranks ({machine.name}), of which {len(fitting):,} fit; the fastest:")
    print(f"{'s/step':>8} {'tokens/s':>12} {'GiB':>6}  flags")
    for candidate in fitting[:MOST_PLANS]:
        row = _row(candidate, tokens)
        speed = f"{row['step_seconds']:8.3f} {row['tokens_per_second']:12,.0f}"
        print(f"{speed} {row['peak_bytes'] / GIB:6.1f}  {row['flags']}")
    return 0


def _row(candidate: Candidate, tokens: int) -> dict[str, Any]:
    return {
        "step_seconds": candidate.seconds,
        "tokens_per_second": tokens / candidate.seconds,
        "peak_bytes": candidate.peak_bytes,
        "flags": " ".join(flags_of(candidate.run)),
    }
