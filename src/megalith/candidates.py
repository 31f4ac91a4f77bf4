"""The layouts that a job could have on so many ranks: which fit, and which is fastest by the forecast.

What differs from its default on the command line stays as it is. Varied are the sizes of tensor, pipeline and, for long
sequences, context parallelism, sequence parallelism, parts of a stage, the microbatch, recomputation and what replicas
share out. On GPUs blocks are compiled.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from megalith.check_layout import divisors, layout_faults
from megalith.config import Run, flag_of
from megalith.derived import num_layers, recompute_granularity, sequence_length
from megalith.parallel.settings import ParallelConfig
from megalith.plan.job import Job
from megalith.plan.machine import GIB, Machine
from megalith.plan.memory import predict
from megalith.plan.time import predict_time, program_of
from megalith.planned import padded_vocabulary, planned

# What a GPU's memory holds besides the tensors that are counted: libraries, workspaces, an allocator's waste.
BESIDES_BYTES, WASTE = 2 * GIB, 1.03
MOST_STAGES, MOST_SEQUENCES, MOST_PARTS = 64, 64, 8
LONG_SEQUENCE = 8192
SHARDINGS = ("none", "optimizer", "gradients", "parameters")
# The order in which flags are told.
VARIED = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "context_parallel_size",
    "data_parallel_sharding",
    "checkpoint_activations",
    "compile",
)


@dataclass(frozen=True)
class Candidate:
    """A layout with what is foretold of it."""

    run: Run
    job: Job
    seconds: float  # of a step
    peak_bytes: float  # of the tensors of a rank


def candidates(run: Run, ranks: int, machine: Machine) -> Iterator[Candidate]:
    """Every layout of a run that suits its ranks; the run may have no microbatch yet."""
    vocabulary = padded_vocabulary(run)
    if machine.device == "cuda" and run.parallel.compile == "off":
        run = dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, compile="on"))
    for varied in variants(run, ranks, machine):
        job = planned(varied, ranks, vocab_size=vocabulary, device=machine.device)
        seconds = predict_time(job, machine, program_of(job)).total
        yield Candidate(varied, job, seconds, predict(job).total)


def variants(run: Run, ranks: int, machine: Machine) -> Iterator[Run]:
    """The run in every layout that suits its ranks."""
    layers, length = num_layers(run), sequence_length(run)
    batch = run.optimizer.global_batch_size
    assert batch is not None, "forecast.py saw to it"
    given = run.parallel
    tensors = _choices(given, "tensor_model_parallel_size", [n for n in divisors(ranks) if n <= machine.ranks_per_node])
    stages = [n for n in divisors(ranks) if n <= MOST_STAGES and layers % n == 0]
    contexts = [n for n in divisors(ranks) if n <= (machine.ranks_per_node if length >= LONG_SEQUENCE else 1)]
    recomputations = [False, True] if recompute_granularity(run) is None else [given.checkpoint_activations]
    for tensor, pipeline, context, sharding, again in product(
        tensors,
        _choices(given, "pipeline_model_parallel_size", stages),
        _choices(given, "context_parallel_size", contexts),
        _choices(given, "data_parallel_sharding", SHARDINGS),
        recomputations,
    ):
        if ranks % (tensor * pipeline * context):
            continue
        data = ranks // (tensor * pipeline * context)
        if batch % data or (sharding != "none" and data * context == 1):
            continue
        for sequence, chunk, micro in product(
            _choices(given, "sequence_parallel", [False, True] if tensor > 1 else [False]),
            _choices(given, "num_layers_per_virtual_pipeline_stage", _chunks(layers // pipeline, pipeline)),
            _micro_batches(run, batch // data),
        ):
            parallel = dataclasses.replace(
                given,
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                context_parallel_size=context,
                data_parallel_sharding=sharding,
                checkpoint_activations=again,
                sequence_parallel=sequence,
                num_layers_per_virtual_pipeline_stage=chunk,
            )
            optimizer = dataclasses.replace(run.optimizer, micro_batch_size=micro)
            varied = dataclasses.replace(run, parallel=parallel, optimizer=optimizer)
            if not layout_faults(varied, ranks):
                yield varied


def _choices(given: ParallelConfig, name: str, choices: Any) -> list[Any]:
    """What a setting may be: as it was given, or any of these."""
    return [getattr(given, name)] if _differs(given, name) else list(choices)


def _differs(given: ParallelConfig, name: str) -> bool:
    """Whether a setting is not its default."""
    return bool(getattr(given, name) != getattr(ParallelConfig(), name))


def _chunks(layers: int, stages: int) -> list[int | None]:
    """Layers of a part, of stages with so many layers; None: a stage is one part."""
    if stages == 1:
        return [None]
    return [None, *(layers // parts for parts in divisors(layers) if 1 < parts <= MOST_PARTS)]


def _micro_batches(run: Run, sequences: int) -> list[int]:
    """Sequences of a microbatch, of a replica with so many in a step."""
    if run.optimizer.micro_batch_size is not None:
        return [n for n in (run.optimizer.micro_batch_size,) if sequences % n == 0]
    return [n for n in divisors(sequences) if n <= MOST_SEQUENCES]


def fits(peak_bytes: float, machine: Machine) -> bool:
    """Whether a rank's device holds so much of tensors, and what is not counted besides."""
    return peak_bytes * WASTE + BESIDES_BYTES <= machine.memory_bytes


def flags_of(run: Run) -> list[str]:
    """The words of the command line that make this layout of any."""
    words = ["--micro-batch-size", str(run.optimizer.micro_batch_size)]
    for name in VARIED:
        if _differs(run.parallel, name):
            value = getattr(run.parallel, name)
            words += [flag_of(name)] if value is True else [flag_of(name), str(value)]
    return words
