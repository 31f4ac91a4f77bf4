"""The seconds of a step of a tiny model on a machine of round numbers, each worked out by hand.

A layer has the products 4x12, 4x4, 4x8 and 8x4 (2 heads of 2), the table 10 rows; 7 microbatches of 3 sequences of 5
tokens: 15 tokens. Products take 5 operations a second, memory 100 bytes, a link 8 bytes and a second to begin with.
"""

from dataclasses import fields, replace
from typing import Any

import pytest

from megalith.plan.job import Job
from megalith.plan.machine import Machine
from megalith.plan.time import COMPILED, CPU, EAGER, Program, Seconds, predict_time, program_of

MACHINE = Machine(
    name="round",
    memory_bytes=1e9,
    flops=10.0,
    flops_8_bit=40.0,
    bandwidth=200.0,
    link=16.0,
    network=4.0,
    ranks_per_node=4,
    product_share=0.5,
    product_share_8_bit=0.25,  # 10 operations a second
    memory_share=0.5,
    attention_share=0.2,  # 2 operations a second
    attention_backward_share=0.05,
    link_share=0.5,
    network_share=0.5,
    link_latency=1.0,
    network_latency=3.0,
)
JOB = Job(
    num_layers=2,
    width=4,
    num_heads=2,
    head_width=2,
    inner=8,
    vocab_size=10,
    num_positions=6,
    sequence_length=5,
    micro_batch_size=3,
    num_microbatches=7,
    compute_bytes=2,
    stream_bytes=2,
)
PROGRAM = Program(
    stream_passes=3.0,
    inner_passes=5.0,
    backward_passes=2.0,
    dropout_passes=6.0,
    fp8_passes=9.0,
    attention_dropout_slowdown=1.5,
    logit_bytes=12.0,
    cast_bytes=10.0,
    compact_bytes=11.0,
    gradient_bytes=13.0,
    travelling_bytes=2.0,  # half of what is sent in fp32
    gap=0.5,
    fixed=17.0,
)
# Of a microbatch and a layer: 15 x 2 x 128 operations and four gaps, 600 operations of attention, 960 bytes.
FORWARD = 770 + 300 + 9.6
# Twice the products, 2.5 times attention at a quarter of the rate, twice the bytes; 23 bytes for each of 128 weights.
BACKWARD = 1540 + 3000 + 19.2 + 29.44
# The look-up reads and writes three streams of 120 bytes, and back two tables of 160; the loss has 150 logits of 12
# bytes, a third of which moves forward.
LOOK_UP, LOSS = (3.6, 6.8), (240 + 6, 480 + 12)


def seconds(job: dict[str, Any] | None = None, program: dict[str, Any] | None = None, **machine: Any) -> Seconds:
    """Of the job above on the machine above, but for these changes."""
    return predict_time(replace(JOB, **job or {}), replace(MACHINE, **machine), replace(PROGRAM, **program or {}))


def exactly(number: float) -> Any:
    return pytest.approx(number, rel=1e-12)


def test_a_step_of_one_rank() -> None:
    found = seconds()
    assert found.forward == exactly(7 * (2 * FORWARD + LOOK_UP[0] + LOSS[0]))
    assert found.backward == exactly(7 * (2 * BACKWARD + LOOK_UP[1] + LOSS[1]))
    # 416 parameters: four bytes of weight and gradient, twice each, two moments read and written.
    assert found.optimizer == exactly(416 * 32 / 100)
    assert (found.recomputation, found.tensor, found.context, found.pipeline, found.reduction) == (0, 0, 0, 0, 0)
    assert found.other == 17.0
    assert found.total == exactly(sum(float(getattr(found, field.name)) for field in fields(found)))
    assert found.total == exactly(found.forward + found.backward + found.optimizer + 17.0)


Changes = dict[str, Any]
MICROBATCHES: dict[str, tuple[Changes, Changes, float, float]] = {
    "in fp32 nothing is rounded, and all is twice as wide": (
        {"compute_bytes": 4},
        {},
        2 * (770 + 300 + 19.2) + 7.2 + 246,
        2 * (1540 + 3000 + 38.4 + 16.64) + 10.4 + 492,
    ),
    "weights are rounded once in a step on a GPU": (
        {"device": "cuda"},
        {},
        2 * FORWARD + 249.6,
        2 * (1540 + 3000 + 19.2 + 1.28 * (10 / 7 + 13)) + 498.8,
    ),
    "gradients that products add up are read by all microbatches but the first": (
        {"device": "cuda"},
        {"adds_in_products": True},
        2 * FORWARD + 249.6,
        2 * (1540 + 3000 + 19.2 + 1.28 * (10 / 7 + 4 * 6 / 7)) + 498.8,
    ),
    "products that cannot add up do not": ({}, {"adds_in_products": True}, 2 * FORWARD + 249.6, 2 * BACKWARD + 498.8),
    "products of blocks in 8 bits": (
        {"fp8": True},
        {},
        2 * (386 + 300 + 9.6 + 3.6) + 249.6,
        2 * (772 + 3000 + 19.2 + 7.2 + 29.44) + 498.8,
    ),
    "dropout": ({"dropout": True}, {}, 2 * (FORWARD + 2.4) + 249.6, 2 * (BACKWARD + 4.8) + 498.8),
    "dropout of attention": (
        {"attention_dropout": True},
        {},
        2 * (FORWARD + 150 + 2.4) + 249.6,
        2 * (BACKWARD + 1500 + 4.8) + 498.8,
    ),
    "both are made once": (
        {"dropout": True, "attention_dropout": True},
        {},
        2 * (FORWARD + 150 + 2.4) + 249.6,
        2 * (BACKWARD + 1500 + 4.8) + 498.8,
    ),
    "a host that is slower than the device forward": (
        {},
        {"host_forward": 2000.0},
        2 * 2000 + 249.6,
        2 * BACKWARD + 498.8,
    ),
    "and backward": ({}, {"host_backward": 9000.0}, 2 * FORWARD + 249.6, 2 * 9000 + 498.8),
    # Two products of 120 seconds, two gaps, and 150 scores of 8 and 20 bytes.
    "scores that are written": (
        {},
        {"score_bytes": (8.0, 20.0)},
        2 * (770 + 241 + 12 + 9.6) + 249.6,
        2 * (1540 + 482 + 30 + 19.2 + 29.44) + 498.8,
    ),
    "half the queries, of scores that are written": (
        {"context": 2},
        {"score_bytes": (8.0, 20.0)},
        2 * (386 + 121 + 6 + 4.8) + 1.8 + 123,
        2 * (772 + 242 + 15 + 9.6 + 29.44) + 5 + 246,
    ),
    "half the tokens": (
        {"context": 2},
        {},
        2 * (386 + 150 + 4.8) + 1.8 + 123,
        2 * (772 + 1500 + 9.6 + 29.44) + 5 + 246,
    ),
    # Products of half the columns or rows; of the passes those of the stream are whole.
    "half the heads and the inner features": (
        {"tensor": 2},
        {},
        2 * (386 + 150 + 6.6) + 3.6 + 123,
        2 * (772 + 1500 + 13.2 + 14.72) + 5.2 + 246,
    ),
    "and half the stream": (
        {"tensor": 2, "sequence_parallel": True, "dropout": True},
        {},
        2 * (386 + 150 + 4.8 + 1.2) + 3.6 + 123,
        2 * (772 + 1500 + 9.6 + 2.4 + 14.72) + 5.2 + 246,
    ),
    "half the heads, whose scores are written": (
        {"tensor": 2},
        {"score_bytes": (8.0, 20.0)},
        2 * (386 + 121 + 6 + 6.6) + 3.6 + 123,
        2 * (772 + 242 + 15 + 13.2 + 14.72) + 5.2 + 246,
    ),
}


@pytest.mark.parametrize("case", MICROBATCHES)
def test_a_microbatch_forward_and_backward(case: str) -> None:
    job, program, forward, backward = MICROBATCHES[case]
    found = seconds(job, program)
    assert found.forward == exactly(7 * forward)
    assert found.backward == exactly(7 * backward)
    assert found.recomputation == 0


@pytest.mark.parametrize(
    ("job", "program", "again"),
    [
        # The last product, 15 x 2 x 32 operations and a gap, is left out at the end of each chunk.
        ({"recompute": "full"}, {}, FORWARD - 192.5),
        ({"recompute": "full", "recompute_every": 2}, {}, FORWARD - 96.25),
        ({"recompute": "full"}, {"recomputes_all": True}, FORWARD),
        ({"recompute": "full", "tensor": 2}, {}, 386 + 150 + 6.6 - 96.5),
        ({"recompute": "full", "fp8": True}, {}, 386 + 300 + 9.6 + 3.6 - 96.5),
        ({"recompute": "full"}, {"host_forward": 2000.0}, 2000.0),
        ({"recompute": "selective"}, {}, 300.0),
        ({"recompute": "selective"}, {"host_forward": 2000.0}, 300.0),
    ],
)
def test_what_is_computed_again(job: dict[str, Any], program: dict[str, Any], again: float) -> None:
    assert seconds(job, program).recomputation == exactly(7 * 2 * again)


def test_collectives_of_tensor_and_of_context_ranks() -> None:
    # Sums of 120 bytes four times a layer and once for the loss, of 240 for the embedding, three of 60 for the logits.
    assert seconds({"tensor": 2}, {"hides_exchanges": False}).tensor == exactly(7 * (9 * 16 + 31 + 3 * 8.5))
    # Two of a layer's are beside the gradients by weights of products 4x6 and 4x4, of 144 and 96 seconds.
    assert seconds({"tensor": 2}).tensor == exactly(7 * (5 * 16 + 31 + 3 * 8.5))
    assert seconds({"tensor": 2}, link=1.0).tensor == exactly(
        7 * (5 * 241 + 2 * (241 - 144 + 241 - 96) + 481 + 3 * 121)
    )
    # Keys and values of 240 bytes are gathered, and their gradients scattered, in each layer.
    assert seconds({"context": 2}).context == exactly(7 * 2 * 2 * 16)


PIPELINES: dict[str, tuple[Changes, Changes, float, float]] = {
    # A stage has one layer. What is sent is 120 bytes each way; the last stage is the slowest by the loss.
    "1f1b": ({}, {}, 32, 2 * (FORWARD + BACKWARD + 32) + 10.4 + 738 - (FORWARD + BACKWARD + 738 + 32)),
    "whose layers are computed again": (
        {"recompute": "full"},
        {},
        32,
        FORWARD + BACKWARD + FORWARD - 192.5 + 32 + 10.4,
    ),
    "interleaved": (
        {"schedule": "interleaved", "parts": 3},
        {},
        96,
        (2 * (FORWARD + BACKWARD + 96) + 10.4 + 738 - (FORWARD + BACKWARD + 738 + 96)) / 3,
    ),
    "zero-bubble": (
        {"schedule": "zero-bubble", "parts": 2},
        {},
        64,
        (2 * (FORWARD + BACKWARD + 64) + 10.4 + 738 - (FORWARD + BACKWARD + 738 + 64)) / 6,
    ),
    "over the network": (
        {"data": 4},
        {},
        126,
        2 * (FORWARD + BACKWARD + 126) + 10.4 + 738 - (FORWARD + BACKWARD + 738 + 126),
    ),
    # A layer of two ranks takes 2842.52 s, the ends 8.8 and 369, what its ranks wait for 2 x 16 + 31 + 3 x 8.5.
    "of tensor ranks": ({"tensor": 2}, {}, 32, 2 * (2842.52 + 88.5 + 32) + 377.8 - (2842.52 + 369 + 88.5 + 32)),
    "of tensor ranks that share out what they send": (
        {"tensor": 2},
        {"shares_out_sends": True},
        17,
        2 * (2842.52 + 88.5 + 17) + 377.8 - (2842.52 + 369 + 88.5 + 17),
    ),
    "of tensor ranks over the network": (
        {"tensor": 2, "data": 2},
        {},
        126,
        2 * (2842.52 + 88.5 + 126) + 377.8 - (2842.52 + 369 + 88.5 + 126),
    ),
    # A layer takes 2851.84 s, the ends 6.8 and 369, its collectives 2 x 16; 60 bytes are sent.
    "of context ranks": ({"context": 2}, {}, 17, 2 * (2851.84 + 32 + 17) + 375.8 - (2851.84 + 369 + 32 + 17)),
    "of context ranks over the network": (
        {"context": 2, "data": 2},
        {},
        66,
        2 * (2851.84 + 32 + 66) + 375.8 - (2851.84 + 369 + 32 + 66),
    ),
}


@pytest.mark.parametrize("case", PIPELINES)
def test_a_pipeline_sends_and_waits(case: str) -> None:
    job, program, sends, idle = PIPELINES[case]
    assert seconds({"pipeline": 2, **job}, program).pipeline == exactly(7 * sends + idle)


def test_a_stream_that_is_cut_already_is_not_shared_out_again() -> None:
    job = {"pipeline": 2, "tensor": 2, "sequence_parallel": True}
    assert seconds(job, {"shares_out_sends": True}) == seconds(job)


def test_the_slowest_stage_is_counted() -> None:
    found = seconds({"pipeline": 2})
    assert found.forward == exactly(7 * (FORWARD + LOSS[0]))
    assert found.backward == exactly(7 * (BACKWARD + LOSS[1]))
    # With so many operations a second products take what their bytes do: of a table of one row 1.58 s forward and 3.16
    # back, less than the look-up's 3.6 and 3.92; of a layer 16.96 and 33.92.
    quick = {"flops": 1e9, "attention_share": 2e-9, "attention_backward_share": 5e-10}
    found = seconds({"pipeline": 2, "vocab_size": 1}, {"logit_bytes": 0.0}, **quick)
    assert found.forward == exactly(7 * (16.96 + 2 + 300 + 9.6 + 3.6))
    assert found.backward == exactly(7 * (33.92 + 4 + 3000 + 19.2 + 29.44 + 3.92))


SLOW = {"link": 0.1}  # 0.05 bytes a second are reached
SLOWER = {"link": 0.01}
# A rank alone computes a microbatch backward in so many seconds, and in all.
WHOLE_BACKWARD = 2 * BACKWARD + 498.8
WHOLE = WHOLE_BACKWARD + 2 * FORWARD + 249.6
REDUCTIONS: dict[str, tuple[Changes, Changes, Changes, float]] = {
    # Half of 1,664 bytes and of the second: 104.5, of which a bucket in four is left over.
    "hidden but for a bucket": ({"data": 2}, {}, {}, 104.5 / 4),
    "hidden by nothing": ({"data": 2}, {"overlaps": False}, {}, 104.5),
    "longer than what hides it": ({"data": 2}, {}, SLOW, 16640.5 - WHOLE_BACKWARD),
    "hidden by what is computed again too": (
        {"data": 2, "recompute": "full"},
        {},
        SLOW,
        16640.5 - WHOLE_BACKWARD - 2 * (FORWARD - 192.5),
    ),
    "of the optimizer's shards, gathered when all is done": (
        {"data": 2, "sharding": "optimizer"},
        {},
        {},
        52.5 / 4 + 52.5,
    ),
    "of the optimizer's shards on a slow link": (
        {"data": 2, "sharding": "optimizer"},
        {},
        SLOWER,
        83200.5 - WHOLE_BACKWARD + 83200.5,
    ),
    # 14 gathers of 488 bytes, 7 sums of 832.
    "of all shards": ({"data": 2, "sharding": "parameters"}, {}, {}, (14 * 62 + 7 * 105) / 2 / 4),
    "of all shards on a slow link": (
        {"data": 2, "sharding": "parameters"},
        {},
        SLOWER,
        (14 * 97601 + 7 * 166401) / 2 - 7 * WHOLE,
    ),
    "of shards and their copies": (
        {"data": 4, "shard_size": 2, "sharding": "gradients"},
        {},
        {},
        (62 + 7 * 105 + 7 * 105) / 2 / 4,
    ),
    # A pipeline has 944 bytes a stage, and a table of 160 at both ends.
    "of a pipeline": ({"data": 2, "pipeline": 2}, {}, {}, 119 / 2 / 2 + 21 / 2),
    "of a pipeline that splits its backward passes, after the last": (
        {"data": 2, "pipeline": 2, "schedule": "zero-bubble"},
        {},
        {},
        119 / 2 + 21 / 2,
    ),
    "of the ends of a pipeline alone": ({"pipeline": 2}, {}, {}, 21 / 2),
    "of a pipeline whose ends are not tied": ({"pipeline": 2, "tied": False}, {}, {}, 0.0),
    # 8 gathers of 300 bytes and a sum of 472, hidden by one microbatch; a table of 80 bytes.
    "of the shards of a pipeline": (
        {"data": 2, "pipeline": 2, "sharding": "parameters"},
        {},
        SLOW,
        (8 * 6001 + 9441) / 2 - (FORWARD + BACKWARD + 738) + 1601 / 2,
    ),
    "of tensor ranks": ({"data": 2, "tensor": 2}, {}, {}, 125 / 2 / 4),
    "of tensor ranks whose stream is cut": ({"data": 2, "tensor": 2, "sequence_parallel": True}, {}, {}, 125 / 2 / 4),
    "of one tensor rank": ({"data": 2, "sequence_parallel": True}, {}, {}, 104.5 / 4),
    "in fp32": ({"data": 2}, {"travelling_bytes": 4.0}, {}, 209 / 4),
}


@pytest.mark.parametrize("case", REDUCTIONS)
def test_gradients_and_weights_between_replicas(case: str) -> None:
    job, program, machine, expected = REDUCTIONS[case]
    assert seconds(job, program, **machine).reduction == exactly(expected)


@pytest.mark.parametrize(
    ("job", "moved"),
    [
        ({"optimizer": "sgd"}, 416 * 24),
        ({"moments": "bf16"}, 416 * 24),
        ({"moments": "int8"}, 416 * (16 + 4 * (1 + 4 / 256) + 11)),
        ({"data": 2, "sharding": "optimizer"}, 208 * 32),
        ({"data": 2}, 416 * 32),
        ({"data": 4, "shard_size": 2, "sharding": "parameters"}, 208 * 32),
        ({"data": 4, "sharding": "gradients"}, 104 * 32),
        ({"pipeline": 2}, 236 * 32),
        ({"tensor": 2}, 248 * 32),
    ],
)
def test_an_update_moves_weights_gradients_and_moments(job: dict[str, Any], moved: float) -> None:
    assert seconds(job).optimizer == exactly(moved / 100)


def test_what_a_job_does_besides_products_follows_its_device_and_its_compiler() -> None:
    assert program_of(replace(JOB, device="cpu", compiled=True)) == CPU
    assert program_of(replace(JOB, device="cuda", compiled=True)) == COMPILED
    assert program_of(replace(JOB, device="cuda", compiled=False)) == EAGER
