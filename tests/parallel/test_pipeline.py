"""What an engine of stages keeps from batch to batch, and when its gradients travel between replicas."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalith.monitor.timers import Timers
from megalith.parallel import reduce
from megalith.parallel.pipeline import SCHEDULES, Pipeline
from megalith.parallel.reduce import Replicated
from tests.ranks import run_ranks

WIDTH = 4
SIZES = (2, 4, 8, 8, 2)  # microbatches of the batches that follow each other


def run_part(part: nn.Module, entering: Tensor, batch: Any) -> Tensor:
    leaving: Tensor = part(entering)
    return leaving.square().sum().reshape(1) if hasattr(part, "is_last") else leaving


def whole_loss(parts: list[nn.Linear], tokens: Tensor) -> float:
    for part in parts:
        tokens = part(tokens)
    return float(tokens.detach().square().sum())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_ramp_of_batch_sizes_leaves_one_schedule_for_training_and_one_for_evaluation(schedule: str) -> None:
    _, takes_several = SCHEDULES[schedule]
    chunks = 2 if takes_several else 1

    def on_rank(rank: int) -> tuple[list[float], list[float], list[int]]:
        torch.manual_seed(0)
        whole = [nn.Linear(WIDTH, WIDTH) for _ in range(2 * chunks)]
        setattr(whole[-1], "is_last", True)  # noqa: B010 - mypy forbids to give a module what it has not
        stages: weakref.WeakSet[Any] = weakref.WeakSet()

        class Noted(Pipeline):
            def _stage(self, *args: Any) -> Any:
                stage = super()._stage(*args)
                stages.add(stage)
                return stage

        engine = Noted(
            {number: whole[number] for number in range(rank, 2 * chunks, 2)},
            run_part,
            num_parts=2 * chunks,
            schedule=schedule,
            group=dist.group.WORLD,  # type: ignore[arg-type]
            device=torch.device("cpu"),
            stream_shape=(WIDTH,),
            stream_dtype=torch.float32,
            reduction=Replicated([], None, overlap=False),
            num_losses=1,
            sums_over=(dist.group.WORLD,),
        )
        gc.collect()
        found, wanted, kept = [], [], []
        for count in SIZES:
            batches = [{"tokens": torch.randn(3, WIDTH)} for _ in range(count)]
            wanted.append(sum(whole_loss(whole, batch["tokens"]) for batch in batches))
            for backward in (True, False):
                with torch.set_grad_enabled(backward):
                    found.append(float(engine.run(batches, backward=backward, timers=Timers())))
            kept.append(len(stages))
        return found, wanted, kept

    for found, wanted, kept in run_ranks(on_rank, 2):
        assert found[::2] == pytest.approx(wanted, rel=1e-5) and found[1::2] == pytest.approx(wanted, rel=1e-5)
        assert kept == [2 * chunks] * len(SIZES)


class Watched(Replicated):
    """Notes how many of its buckets were on their way when the backward passes were over."""

    early = -1

    def after_last_backward(self) -> None:
        self.early = len(self._travelling)
        super().after_last_backward()


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_gradients_travel_between_replicas_during_the_last_backward_passes(schedule: str) -> None:
    _, takes_several = SCHEDULES[schedule]
    chunks = 2 if takes_several else 1

    def on_rank(rank: int) -> tuple[int, int, float]:
        reduce.BUCKET_BYTES = 64  # several buckets
        stage, replica = rank % 2, rank // 2
        stages = [dist.new_group([0, 1]), dist.new_group([2, 3])][replica]
        replicas = [dist.new_group([0, 2]), dist.new_group([1, 3])][stage]
        torch.manual_seed(0)
        whole = [nn.Linear(WIDTH, WIDTH) for _ in range(2 * chunks)]
        setattr(whole[-1], "is_last", True)  # noqa: B010
        held = {number: whole[number] for number in range(stage, 2 * chunks, 2)}
        parameters = [parameter for part in held.values() for parameter in part.parameters()]
        reduction = Watched(parameters, replicas, overlap=True)
        engine = Pipeline(
            held,
            run_part,
            num_parts=2 * chunks,
            schedule=schedule,
            group=stages,
            device=torch.device("cpu"),
            stream_shape=(WIDTH,),
            stream_dtype=torch.float32,
            reduction=reduction,
            num_losses=1,
            sums_over=(),
        )
        batches = [[{"tokens": torch.randn(3, WIDTH)} for _ in range(4)] for _ in range(2)]
        engine.run(batches[replica], backward=True, timers=Timers())
        reduction.finish()
        found = [parameter.grad for parameter in parameters]
        for part in whole:
            part.zero_grad(set_to_none=True)
        for batch in batches[0] + batches[1]:
            tokens = batch["tokens"]
            for part in whole:
                tokens = part(tokens)
            tokens.square().sum().backward()
        differences = [
            float((gradient - parameter.grad).abs().max() / parameter.grad.abs().max())
            for gradient, parameter in zip(found, parameters, strict=True)
            if gradient is not None and parameter.grad is not None
        ]
        assert len(differences) == len(parameters)
        return reduction.early, len(reduction._buckets), max(differences)

    for early, buckets, difference in run_ranks(on_rank, 4):
        assert early == buckets > 1
        assert difference < 1e-5
