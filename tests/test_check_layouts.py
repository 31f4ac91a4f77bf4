"""Wrong layouts are refused before anything is built, all faults at once, each with what would fit."""

import pytest

from megalith.check import check
from megalith.sources import read_command_line

BASE = """
    --num-layers 8 --hidden-size 48 --num-attention-heads 6 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 2 --global-batch-size 16 --lr 1e-3 --train-iters 10 --data-path data
    --tokenizer-type ByteLevelTokenizer
""".split()
TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
VIRTUAL = "--num-layers-per-virtual-pipeline-stage"


def faults(world_size: int, *words: str) -> list[str]:
    return [str(fault) for fault in check(read_command_line([*BASE, *words]), world_size)]


@pytest.mark.parametrize(
    ("world_size", "words"),
    [
        (1, []),
        (2, [TP, "2", "--sequence-parallel"]),
        (8, [TP, "2", PP, "2", "--pipeline-schedule", "gpipe"]),
        (4, [PP, "4", VIRTUAL, "1"]),
        (2, [PP, "2", VIRTUAL, "2", "--pipeline-schedule", "zero-bubble"]),
        (2, [PP, "2", "--pipeline-schedule", "zero-bubble", "--data-parallel-sharding", "gradients"]),
        (3, [PP, "3"]),  # 8 layers on 3 stages are balanced by cost
        (4, [TP, "2", CP, "2", "--context-exchange", "gather"]),
        (
            2,
            [PP, "2", VIRTUAL, "1", "--pipeline-schedule", "zero-bubble", "--recompute-granularity", "full"],
        ),
        (6, [TP, "2", CP, "3", "--context-exchange", "all-to-all", "--seq-length", "30"]),
        (8, [TP, "2", "--data-parallel-sharding", "parameters", "--data-parallel-shard-size", "2"]),
        (4, ["--deterministic"]),
        (4, [TP, "2", "--deterministic"]),
    ],
)
def test_layouts_that_fit_have_no_fault(world_size: int, words: list[str]) -> None:
    assert faults(world_size, *words) == []


@pytest.mark.parametrize("number", [-1, 0, 2**40])
@pytest.mark.parametrize("flag", ["--num-attention-heads", "--num-layers"])
def test_a_number_that_is_none_or_has_too_many_digits_costs_no_time(flag: str, number: int) -> None:
    assert faults(4, flag, str(number), PP, "4", VIRTUAL, "3")


@pytest.mark.parametrize(
    ("world_size", "words", "expected"),
    [
        (
            8,
            [TP, "3", PP, "2"],
            "--tensor-model-parallel-size = 3: times --pipeline-model-parallel-size = 2 does not divide the 8 ranks. "
            "Products that fit: [1, 2, 4, 8]; or start another number of ranks (torchrun --nproc-per-node).",
        ),
        (
            8,
            [TP, "2", CP, "3", "--seq-length", "30"],
            "--tensor-model-parallel-size = 2: times --pipeline-model-parallel-size = 1 x --context-parallel-size = 3 "
            "does not divide the 8 ranks. Products that fit: [1, 2, 4, 8]; or start another number of ranks (torchrun "
            "--nproc-per-node).",
        ),
        (
            4,
            [TP, "4"],
            "--num-attention-heads = 6: is not divisible by --tensor-model-parallel-size = 4. Tensor-parallel sizes "
            "that fit this model: [1, 2, 3, 6].",
        ),
        (
            2,
            [TP, "2", "--ffn-hidden-size", "99"],
            "--ffn-hidden-size = 99: is not divisible by --tensor-model-parallel-size = 2. Tensor-parallel sizes that "
            "fit this model: [1, 3].",
        ),
        (
            2,
            [CP, "2", "--seq-length", "30"],
            "--seq-length = 30: is not divisible by 2 x --context-parallel-size = 4. Context-parallel sizes that fit: "
            "[1, 3, 5, 15]; or the nearest lengths: [28, 32].",
        ),
        (
            2,
            [TP, "2", "--sequence-parallel", "--seq-length", "31"],
            "--seq-length = 31: is not divisible by --tensor-model-parallel-size = 2, over which --sequence-parallel "
            "cuts it. Nearest lengths: [30, 32]; or leave --sequence-parallel out.",
        ),
        (
            4,
            [TP, "2", CP, "2", "--context-exchange", "all-to-all"],
            "--context-parallel-size = 2: does not divide the 3 heads of a tensor rank, which --context-exchange "
            "all-to-all trades. Sizes that fit: [1, 3]; or use --context-exchange gather.",
        ),
        (
            16,
            [PP, "16", "--micro-batch-size", "1"],
            "--pipeline-model-parallel-size = 16: is more than the 8 layers, of which each stage needs one. Use at "
            "most 8 stages.",
        ),
        (
            2,
            [PP, "2", VIRTUAL, "3"],
            "--num-layers-per-virtual-pipeline-stage = 3: times --pipeline-model-parallel-size = 2 does not divide the "
            "8 layers. Layers per virtual stage that fit: [1, 2, 4].",
        ),
        (
            3,
            [PP, "3", VIRTUAL, "2", "--micro-batch-size", "1", "--global-batch-size", "6"],
            "--num-layers-per-virtual-pipeline-stage = 2: times --pipeline-model-parallel-size = 3 does not divide the "
            "8 layers. Use one of [2, 4, 8] pipeline stages, or [6, 12] layers.",
        ),
        (
            1,
            [VIRTUAL, "2"],
            "--num-layers-per-virtual-pipeline-stage = 2: needs more than one pipeline stage. Leave it out.",
        ),
        (
            2,
            [PP, "2", "--pipeline-schedule", "interleaved"],
            "--pipeline-schedule = interleaved: needs several parts of the model on each rank. Add "
            "--num-layers-per-virtual-pipeline-stage N, or use 1f1b.",
        ),
        (
            2,
            [PP, "2", VIRTUAL, "1", "--pipeline-schedule", "1f1b"],
            "--pipeline-schedule = 1f1b: runs one part of the model on each rank, against "
            "--num-layers-per-virtual-pipeline-stage = 1. Use interleaved or zero-bubble, or leave one of them out.",
        ),
        (
            1,
            ["--pipeline-schedule", "gpipe"],
            "--pipeline-schedule = gpipe: needs more than one pipeline stage. Leave it out.",
        ),
        (
            4,
            [PP, "2", "--pipeline-schedule", "zero-bubble", "--data-parallel-sharding", "parameters"],
            "--data-parallel-sharding = parameters: gives wrong gradients where --pipeline-schedule zero-bubble splits "
            "the backward pass. Use --data-parallel-sharding gradients, or another schedule.",
        ),
        (
            4,
            [PP, "4", VIRTUAL, "1", "--global-batch-size", "12"],
            "--global-batch-size = 12: gives 6 microbatches, not divisible by the 4 stages of an interleaved schedule. "
            "Batch sizes that fit nearby: [8, 16]; or use fewer stages or replicas.",
        ),
        (
            4,
            [PP, "4", "--global-batch-size", "6"],
            "--global-batch-size = 6: gives 3 microbatches, fewer than the 4 pipeline stages. Batch sizes that fit "
            "nearby: [8]; or use fewer stages or replicas.",
        ),
        (
            4,
            ["--data-parallel-shard-size", "2"],
            "--data-parallel-shard-size = 2: has nothing to share out with --data-parallel-sharding none. Use "
            "--data-parallel-sharding parameters or gradients, or leave it out.",
        ),
        (
            4,
            ["--data-parallel-sharding", "gradients", "--data-parallel-shard-size", "3"],
            "--data-parallel-shard-size = 3: does not divide the 4 ranks that hold the same part of the model. Sizes "
            "that fit: [1, 2, 4].",
        ),
        (
            2,
            ["--deterministic", "--data-parallel-sharding", "optimizer"],
            "--deterministic: cannot order the sums of --data-parallel-sharding optimizer. Leave one of them out.",
        ),
        (
            2,
            ["--deterministic", PP, "2"],
            "--deterministic: cannot order the sums of a pipeline, whose schedule adds microbatches as they come. "
            "Leave it out, or use --pipeline-model-parallel-size 1.",
        ),
        (
            2,
            [TP, "2", "--sequence-parallel", "--checkpoint-activations", "--distribute-checkpointed-activations"],
            "--distribute-checkpointed-activations: contradicts --sequence-parallel, which has cut what is kept "
            "already. Leave it out.",
        ),
        (
            1,
            ["--compile", "on", "--activation-memory-budget", "2"],
            "--activation-memory-budget = 2.0: must be from 0 to 1. Give the share to keep.",
        ),
        (
            1,
            ["--activation-memory-budget", "0.5"],
            "--activation-memory-budget = 0.5: is kept by the compiler. Add --compile on.",
        ),
        (
            2,
            [PP, "2", "--pipeline-schedule", "zero-bubble", "--compile", "on"],
            "--compile = on: cannot split the backward pass. Use another --pipeline-schedule.",
        ),
        (
            1,
            [CP, "0"],
            "--context-parallel-size = 0: must be greater than 0. Give a positive number.",
        ),
    ],
)
def test_a_layout_that_cannot_run_is_refused_with_what_would_fit(
    world_size: int, words: list[str], expected: str
) -> None:
    assert faults(world_size, *words) == [expected]


def test_a_ramp_of_the_batch_size_must_feed_the_pipeline_at_every_size() -> None:
    words = [PP, "4", "--micro-batch-size", "1", "--rampup-batch-size", "2", "2", "100", "--global-batch-size", "8"]
    found = faults(4, *[word for word in words], "--train-samples", "1000")
    refused = [fault.split(".")[0] for fault in found if "microbatches" in fault]
    assert refused == ["--rampup-batch-size = 2: gives 2 microbatches, fewer than the 4 pipeline stages"]


def test_context_ranks_share_a_batch() -> None:
    # 4 ranks of which 2 share each sequence are 2 replicas: 2 x 5 = 10 is divisible, 4 x 5 would not be.
    assert faults(4, CP, "2", "--micro-batch-size", "5", "--global-batch-size", "10") == []


def test_all_faults_of_a_layout_are_told_at_once() -> None:
    found = faults(
        8, TP, "4", CP, "2", "--seq-length", "30", "--deterministic", "--data-parallel-sharding", "gradients"
    )
    assert [fault.split(" ")[0].rstrip(":") for fault in found] == [
        "--num-attention-heads",
        "--seq-length",
        "--deterministic",
    ]
