"""`megalith plan`: what a GPT job of any size will need on each rank, from its command line alone, on any machine."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from megalith.bench import made_for_measuring
from megalith.check import check
from megalith.command_line import CommandParser
from megalith.config import ConfigError, Run
from megalith.data.tokenizer import padded_vocab_size
from megalith.derived import compute_dtype, global_batch_size, recompute_granularity, sequence_length
from megalith.job import MOCK_VOCABULARY
from megalith.models.shape import shape_of
from megalith.monitor.flops import TERA
from megalith.parallel.mesh import Layout
from megalith.plan.memory import Job, parameters_on_rank, predict
from megalith.sources import read_command_line
from megalith.task_rows import TASK_ROWS

GIB = 2**30


def main(words: Sequence[str]) -> int:
    """Print the forecast as a table or one JSON object."""
    parser = CommandParser(
        prog="megalith plan",
        usage="megalith plan [RUN.toml] [--preset NAME] [--ranks N] [--on cuda|cpu] [--json] [--flags of pretrain ...]",
        description="What a GPT job of any size will need on each rank. Needs no data, no GPU and no other rank.",
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks of the job [default 1]")
    parser.add_argument("--on", choices=("cuda", "cpu"), default="cuda", help="what the ranks compute on [cuda]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, rest = parser.parse_known_args(words)
    if options.ranks < 1:
        raise ValueError(f"--ranks = {options.ranks}: must be at least 1")
    run = made_for_measuring(read_command_line(rest), steps=1)
    if faults := check(run, options.ranks):
        raise ConfigError(faults)
    if run.task != "gpt":
        raise ValueError(f"{run.task}: only a gpt job can be planned; measure with megalith bench {run.task}")
    figures = forecast(run, options.ranks, device=options.on)
    print(json.dumps(figures) if options.json else table(figures))
    return 0


def forecast(run: Run, ranks: int, *, device: str) -> dict[str, Any]:
    """The figures of a checked run on that many ranks; bytes and operations are those of one rank."""
    job = planned(run, ranks, vocab_size=padded_vocabulary(run), device=device)
    memory, batch = predict(job), global_batch_size(run, job.data)
    flops = TASK_ROWS["gpt"].step_flops(run, job.vocab_size, batch)
    whole = dataclasses.replace(job, tensor=1, pipeline=1)
    return {
        "parameters": parameters_on_rank(whole),
        "parameters_on_a_rank": parameters_on_rank(job),
        "layout": {"data": job.data, "tensor": job.tensor, "pipeline": job.pipeline, "context": job.context},
        "global_batch_size": batch,
        "tokens_per_step": batch * job.sequence_length,
        "microbatches": job.num_microbatches,
        "dtype": compute_dtype(run),
        **{f"{name}_bytes": value for name, value in dataclasses.asdict(memory).items()},
        "peak_bytes": memory.total,
        "step_tflop": flops / TERA,
        "step_tflop_per_rank": flops / ranks / TERA,
    }


def padded_vocabulary(run: Run) -> int:
    """Rows of the table; of GPT-2's vocabulary where the command line names none."""
    size = MOCK_VOCABULARY if run.data.vocab_size is None else run.data.vocab_size
    return padded_vocab_size(size, run.model.make_vocab_size_divisible_by, 1)


def planned(run: Run, ranks: int, *, vocab_size: int, device: str) -> Job:
    """The sizes of a checked run of a GPT."""
    shape, parallel = shape_of(run.model), run.parallel
    layout = Layout(
        ranks,
        0,
        0,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    assert run.optimizer.micro_batch_size is not None, "check.py saw to it"
    element = 4 if compute_dtype(run) == "float32" else 2
    return Job(
        num_layers=shape.num_layers,
        width=shape.width,
        num_heads=shape.num_heads,
        head_width=shape.head_width,
        inner=shape.inner,
        vocab_size=vocab_size,
        num_positions=shape.num_positions,
        sequence_length=sequence_length(run),
        micro_batch_size=run.optimizer.micro_batch_size,
        num_microbatches=global_batch_size(run, layout.data) // (run.optimizer.micro_batch_size * layout.data),
        compute_bytes=element,
        bf16=compute_dtype(run) == "bfloat16",
        stream_bytes=4 if run.model.fp32_residual_connection else element,
        dropout=run.model.hidden_dropout > 0,
        attention_dropout=run.model.attention_dropout > 0,
        recompute=recompute_granularity(run),
        recompute_every=parallel.checkpoint_num_layers,
        optimizer=run.optimizer.optimizer,
        moments=run.optimizer.optimizer_state_dtype,
        tied=not run.model.untie_embeddings_and_output_weights,
        tensor=layout.tensor,
        sequence_parallel=parallel.sequence_parallel,
        pipeline=layout.pipeline,
        context=layout.context,
        data=layout.data,
        sharding=parallel.data_parallel_sharding,
        shard_size=parallel.data_parallel_shard_size,
        device=device,
    )


def table(figures: dict[str, Any]) -> str:
    """The figures for a person."""
    layout = " x ".join(f"{axis} {size}" for axis, size in figures["layout"].items() if size > 1) or "one rank"
    memory = [
        (f"  {name}", f"{figures[f'{name}_bytes'] / GIB:8.2f} GiB")
        for name in ("weights", "gradients", "optimizer", "activations", "working")
    ]
    rows = [
        ("parameters", f"{figures['parameters']:,.0f}"),
        ("layout", layout),
        ("  parameters of a rank", f"{figures['parameters_on_a_rank']:,.0f}"),
        ("step", f"{figures['tokens_per_step']:,} tokens in {figures['microbatches']} microbatches of a rank"),
        ("  operations", f"{figures['step_tflop']:,.1f} TFLOP, {figures['step_tflop_per_rank']:,.2f} a rank"),
        ("peak memory of a rank", f"{figures['peak_bytes'] / GIB:8.2f} GiB"),
        *memory,
    ]
    return "\n".join(f"{name:<26}{value}" for name, value in rows)
