"""Megalith: the step of `megalith pretrain`, logged and watched as there, on made-up tokens."""

import time

import torch
from protocol import asked_size, serve

from megalith.bench import made_for_measuring, prepared
from megalith.check import check
from megalith.sources import read_command_line
from megalith.train import take_told_step

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
with prepared(run, started=time.monotonic()) as (job, keeper):
    serve(
        lambda: float(take_told_step(job, keeper).losses["lm loss"]),
        num_parameters=job.laid.num_parameters,
        threads=torch.get_num_threads(),
    )
