"""Step times that others measured are foretold; a pipeline waits as long as its schedule played out would."""

import dataclasses

import pytest

from benchmarks.planner import (
    A100_BENEATH_DEEPSPEED,
    AS_MEASURED,
    DEEPSPEED,
    MEGATRON,
    deepspeed,
    errors,
    korthikanti,
    mean_and_worst,
    ours,
    products,
)
from megalith.plan.job import Job
from megalith.plan.machine import A100, H100, H200, Machine
from megalith.plan.memory import predict
from megalith.plan.products import operations_with_waste
from megalith.plan.time import COMPILED, Seconds, predict_time

JOB = Job(
    num_layers=24,
    width=2048,
    num_heads=16,
    head_width=128,
    inner=8192,
    vocab_size=50304,
    num_positions=2048,
    sequence_length=2048,
    micro_batch_size=2,
    num_microbatches=16,
    compute_bytes=2,
    stream_bytes=2,
    compiled=True,
    device="cuda",
)


def seconds(machine: Machine = H100, **changes: object) -> Seconds:
    return predict_time(dataclasses.replace(JOB, **changes), machine, COMPILED)  # type: ignore[arg-type]


def test_step_times_of_others_are_foretold_where_constants_were_not_chosen_by_them() -> None:
    one, many = deepspeed()
    assert mean_and_worst(errors(one[1::2], A100_BENEATH_DEEPSPEED, DEEPSPEED))[0] < 0.08
    assert mean_and_worst(errors(many[1::2], A100_BENEATH_DEEPSPEED, DEEPSPEED))[0] < 0.12
    mean, worst = mean_and_worst(errors(korthikanti(), A100, MEGATRON))
    assert mean < 0.035 and worst < 0.08


def test_our_own_steps_on_a_gpu_are_foretold() -> None:
    jobs = [measured for measured, _ in ours()]
    assert len(jobs) == 13
    assert mean_and_worst(errors(jobs, H200, AS_MEASURED))[0] < 0.03
    rates = [predicted / measured - 1 for _, predicted, measured in products()]
    assert len(rates) == 27
    assert mean_and_worst(rates)[0] < 0.05


def test_a_product_takes_at_least_its_operations_and_its_bytes() -> None:
    for rows, inner, columns in ((128, 64, 256), (1, 1, 1), (100, 50304, 7), (16384, 1600, 6400)):
        operations = operations_with_waste(rows, inner, columns, batch=1, multiprocessors=132, depth=200.0)
        assert operations >= 2 * rows * inner * columns
        moved = 2 * (rows * inner + inner * columns + rows * columns)
        assert H100.product(rows, inner, columns, size=2) >= moved / H100.bandwidth
    large = operations_with_waste(16384, 16384, 16384, batch=1, multiprocessors=132, depth=200.0)
    assert large < 1.1 * 2 * 16384**3


def played_out(forward: float, backward: float, *, stages: int, microbatches: int) -> float:
    """When the last of equal stages is done with 1F1B, by following every pass."""
    orders = []
    for stage in range(stages):
        before = min(stages - 1 - stage, microbatches)
        order = [("F", n) for n in range(before)]
        for n in range(microbatches - before):
            order += [("F", before + n), ("B", n)]
        orders.append(order + [("B", n) for n in range(microbatches - before, microbatches)])
    done: dict[tuple[str, int, int], float] = {}
    clocks, places = [0.0] * stages, [0] * stages
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for stage, order in enumerate(orders):
            if places[stage] == len(order):
                continue
            kind, n = order[places[stage]]
            neighbour = stage - 1 if kind == "F" else stage + 1
            is_end = neighbour in (-1, stages)
            if not is_end and (kind, n, neighbour) not in done:
                continue
            ready = 0.0 if is_end else done[kind, n, neighbour]
            clocks[stage] = max(clocks[stage], ready) + (forward if kind == "F" else backward)
            done[kind, n, stage] = clocks[stage]
            places[stage] += 1
    return max(clocks)


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_a_pipeline_of_equal_stages_takes_as_long_as_its_schedule_played_out(stages: int) -> None:
    # Without ends and with sends that take no time all stages are equal.
    free = dataclasses.replace(H100, link=1e18, network=1e18, link_latency=0.0, network_latency=0.0)
    job = dataclasses.replace(JOB, pipeline=stages, vocab_size=1, num_positions=1)
    found = predict_time(job, free, COMPILED)
    forward, backward = found.forward / job.num_microbatches, found.backward / job.num_microbatches
    whole = played_out(forward, backward, stages=stages, microbatches=job.num_microbatches)
    assert found.forward + found.backward + found.pipeline == pytest.approx(whole, rel=0.01)


def test_parts_of_a_stage_share_what_it_waits() -> None:
    plain = seconds(pipeline=4)
    parts = seconds(pipeline=4, parts=3, schedule="interleaved")
    bubble = seconds(pipeline=4, schedule="zero-bubble")
    assert parts.forward == plain.forward
    assert bubble.pipeline < plain.pipeline
    assert parts.pipeline < plain.pipeline


def test_gradients_that_travel_during_the_backward_pass_cost_less_than_those_after_it() -> None:
    during, after = seconds(data=8), seconds(data=8, sharding="optimizer")
    assert 0 < during.reduction < after.reduction / 2
    assert seconds(data=64).reduction >= during.reduction
    assert seconds().reduction == 0


def test_more_work_takes_longer_and_more_ranks_less() -> None:
    assert seconds(num_microbatches=32).total > 1.9 * seconds().total
    assert seconds(recompute="full").total > 1.2 * seconds().total
    assert seconds(tensor=2).forward < 0.7 * seconds().forward
    assert seconds(tensor=2).tensor > 0
    assert seconds(machine=A100).total > 2 * seconds().total
    # 8 bits pay with enough rows in a microbatch: gradients of matrices leave such products one by one.
    assert seconds(fp8=True, micro_batch_size=8).total < seconds(micro_batch_size=8).total


def test_what_a_later_stage_keeps_is_less_until_the_loss_comes_in() -> None:
    few = dataclasses.replace(JOB, pipeline=4)
    assert predict(few).total < predict(JOB).total
    many = dataclasses.replace(few, vocab_size=2_000_000)
    assert predict(many).working > predict(few).working


def test_what_tensor_ranks_exchange_beside_products_costs_what_these_do_not_hide() -> None:
    job = dataclasses.replace(JOB, tensor=8, sequence_parallel=True)
    alone = dataclasses.replace(COMPILED, hides_exchanges=False)
    all_of_it = predict_time(job, H100, alone).tensor
    # Of ten transfers of a layer four are beside products.
    one = H100.collective(2 * 2048 * 2048 * 2 * 7 / 8, 8, 1)
    products = [
        H100.product(4096, leaving, 2048, size=2) + H100.product(leaving, 4096, 2048, size=2) for leaving in (768, 1024)
    ]
    assert one > max(products), "a node's links are slower than an eighth of such products"
    found = predict_time(job, H100, COMPILED).tensor
    assert found == pytest.approx(all_of_it - 16 * 24 * sum(products))
    faster = dataclasses.replace(H100, link=100 * H100.link, link_latency=0.0)
    hidden = predict_time(job, faster, alone).tensor - predict_time(job, faster, COMPILED).tensor
    assert hidden == pytest.approx(16 * 24 * 4 * faster.collective(2 * 2048 * 2048 * 2 * 7 / 8, 8, 1))
    # A pipeline that splits backward passes gathers nothing again, and waits for all.
    split = dataclasses.replace(job, pipeline=2, parts=1, schedule="zero-bubble")
    assert predict_time(split, H100, COMPILED).tensor == predict_time(split, H100, alone).tensor
