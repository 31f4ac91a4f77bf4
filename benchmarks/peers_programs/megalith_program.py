"""Megalith: the step of `megalith pretrain`, on made-up tokens."""

import os
import time
from contextlib import ExitStack

import torch
from protocol import asked_size, serve

from megalith.allocator import keep_freed_memory
from megalith.bench import made_for_measuring
from megalith.check import check
from megalith.job import build_job
from megalith.keeper import Keeper
from megalith.loaders import open_data
from megalith.monitor.log import RunLog
from megalith.parallel.mesh import choose_device, make_layout
from megalith.sources import read_command_line
from megalith.train import take_step

size = asked_size()
words = f"""
    --num-layers {size.num_layers} --hidden-size {size.hidden_size} --num-attention-heads {size.num_heads}
    --seq-length {size.sequence_length} --max-position-embeddings {size.sequence_length} --seed {size.seed}
    --micro-batch-size {size.batch_size} --vocab-size {size.vocab_size} --make-vocab-size-divisible-by 1
    --attention-dropout 0 --hidden-dropout 0 --weight-decay 0.1 --clip-grad 1.0 --lr 1e-4 --device cpu --mock-data
""".split()
if size.mode == "compiled":
    words += ["--compile", "on"]
if size.bf16:
    words += ["--bf16"]
run = made_for_measuring(read_command_line(words), steps=100_000)
assert not check(run, 1)
layout = make_layout({}, tensor=1, pipeline=1)
keep_freed_memory()  # As `megalith pretrain` does on a CPU.
with ExitStack() as stack:
    silent = stack.enter_context(open(os.devnull, "w"))
    log = stack.enter_context(RunLog("json", silent, is_printing_rank=False))
    job = build_job(run, layout, choose_device("cpu", 0), log, started=time.monotonic())
    keeper = stack.enter_context(Keeper(job))
    open_data(job)
    serve(
        lambda: float(take_step(job, keeper).losses["lm loss"]),
        num_parameters=job.laid.num_parameters,
        threads=torch.get_num_threads(),
    )
