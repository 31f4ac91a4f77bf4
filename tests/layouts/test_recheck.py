"""Passes that are taken again: nothing changes where all is well; a bit that flips on the way is found and named."""

import math
import socket
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import megalith.recheck
from megalith.check import check
from megalith.checkpoint.directory import list_checkpoints
from megalith.layers.feedforward import FeedForward
from megalith.layers.products import Again
from megalith.optim.local import local_part
from megalith.parallel.apply import Laid
from megalith.recheck import compares_gradients
from megalith.sources import read_command_line
from tests.images import write_images
from tests.layouts import test_bert, test_ict, test_t5, test_vit
from tests.layouts.runs import MODEL, Runs, events_of, largest_difference, run_on, steps_of
from tests.layouts.test_numbers import spoil_losses

TP, PP, SHARD = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--data-parallel-sharding"
SCHEDULE, CHUNKS = "--pipeline-schedule", "--num-layers-per-virtual-pipeline-stage"
SMALL = [*MODEL, *"--num-layers 2 --hidden-size 16 --num-attention-heads 2 --eval-iters 0 --train-iters 4".split()]
CHECKED = ["--check-compute", "2"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "one-fp16": (1, ["--fp16", "--initial-loss-scale", str(2.0**21), "--hysteresis", "1"]),
    "one-recomputed": (1, ["--recompute-granularity", "full"]),
    "dp2": (2, ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]),
    "dp2-deterministic": (2, ["--deterministic"]),
    "tp2": (2, [TP, "2"]),
    "tp2-sequence": (2, [TP, "2", "--sequence-parallel", "--recompute-granularity", "selective"]),
    "pp2": (2, [PP, "2"]),
    "pp2-gpipe": (2, [PP, "2", SCHEDULE, "gpipe"]),
    "pp2-interleaved": (2, [PP, "2", CHUNKS, "1", "--num-layers", "4"]),
    "pp2-zero-bubble": (2, [PP, "2", CHUNKS, "1", "--num-layers", "4", SCHEDULE, "zero-bubble"]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "cp2-traded": (2, ["--context-parallel-size", "2", "--context-exchange", "all-to-all"]),
    "zero1": (2, [SHARD, "optimizer"]),
    "zero2": (2, [SHARD, "gradients"]),
    "zero3": (2, [SHARD, "parameters"]),
    "dp2-tp2": (4, [TP, "2"]),
    "dp2-tp2-sequence": (4, [TP, "2", "--sequence-parallel"]),
    "pp2-dp2": (4, [PP, "2"]),
    "pp2-zero3": (4, [PP, "2", SHARD, "parameters"]),
    "hybrid": (4, [SHARD, "parameters", "--data-parallel-shard-size", "2"]),
}
QUICK = {"pp2"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[[str], Path]:
    """The run of a layout without checks and faults, made once."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def run_of(layout: str) -> Path:
        world_size, laid = LAYOUTS[layout]
        if not (folder / layout).exists():
            assert run_on(world_size, laid, folder / layout, data, model=SMALL) == 0
        return folder / layout

    return run_of


def skip_unless(quick: bool, request: pytest.FixtureRequest) -> None:
    if not quick and not request.config.getoption("--slow"):
        pytest.skip("run with --slow")


class Flip(torch.autograd.Function):
    """The tensor with one bit of one element flipped."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor, bit: int) -> Tensor:
        return flipped(tensor, bit)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def flipped(tensor: Tensor, bit: int) -> Tensor:
    other = tensor.detach().clone()
    as_bits, low = (torch.int32, 10) if other.element_size() == 4 else (torch.int16, 4)
    other.view(-1)[5:6].view(as_bits).bitwise_xor_(1 << low + bit)
    return other


def flip(rank: int, *, ranks: Iterable[int], passes: Iterable[int], backward: bool = False) -> None:
    """On some ranks flip a bit of what a feed-forward gives, or of its gradient, in some passes, counted from 1.

    Which bit depends on the pass: an error that is the same each time is beyond taking a pass again.
    """
    if rank not in ranks:
        return
    wrong, taken, clear, run = set(passes), [0], Laid.clear_gradients, FeedForward.forward

    def begin(laid: Laid) -> None:
        taken[0] += 1
        clear(laid)

    def forward(module: FeedForward, x: Tensor, again: Again | None = None) -> Tensor:
        given: Tensor = run(module, x, again)
        if taken[0] not in wrong:
            return given
        bit = taken[0]
        if not backward:
            given = Flip.apply(given, bit)
            return given
        given.register_hook(partial(flipped, bit=bit))
        return given

    Laid.clear_gradients = begin  # type: ignore[method-assign, assignment]
    FeedForward.forward = forward  # type: ignore[method-assign, assignment]


def saved_steps(save: Path) -> list[int]:
    return [found.step for found in list_checkpoints(save)]


def assert_same_bits(save: Path, other: Path) -> None:
    assert largest_difference(save, other) == 0.0
    told = ("step", "consumed_samples", "losses", "grad_norm", "params_norm", "learning_rate", "loss_scale", "skipped")
    pairs = zip(steps_of(save), steps_of(other), strict=True)
    assert [[a[name] for name in told] for a, _ in pairs] == [[b[name] for name in told] for b in steps_of(other)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_with_checks_is_the_run_without_them(
    layout: str,
    data: Path,
    tmp_path: Path,
    undisturbed: Callable[[str], Path],
    request: pytest.FixtureRequest,
) -> None:
    skip_unless(layout in QUICK, request)
    world_size, laid = LAYOUTS[layout]
    assert run_on(world_size, [*laid, *CHECKED], tmp_path / "run", data, model=SMALL) == 0
    compared = events_of(tmp_path / "run", "passes_compared")
    assert [(event["step"], event["verdict"], event["text"]) for event in compared] == [
        (2, "alike", ""),
        (4, "alike", ""),
    ]
    assert_same_bits(tmp_path / "run", undisturbed(layout))
    (ended,) = events_of(tmp_path / "run", "run_ended")
    assert ended["spent"]["check"] > 0


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bit_that_flips_once_is_found_named_and_left_out(
    layout: str,
    backward: bool,
    data: Path,
    tmp_path: Path,
    undisturbed: Callable[[str], Path],
    request: pytest.FixtureRequest,
) -> None:
    skip_unless(layout in QUICK and not backward, request)
    world_size, laid = LAYOUTS[layout]
    # Passes 2 and 3 are those of step 2; when they differ, 4 decides.
    guilty, wrong = world_size - 1, 2 if layout != "pp2" else 3
    before = partial(flip, ranks=[guilty], passes=[wrong], backward=backward)
    assert run_on(world_size, [*laid, *CHECKED], tmp_path / "run", data, model=SMALL, before=before) == 0
    first, second = events_of(tmp_path / "run", "passes_compared")
    assert (first["step"], first["verdict"], second["step"], second["verdict"]) == (2, "transient", 4, "alike")
    (erring,) = first["erring"]
    assert [erring[name] for name in ("rank", "host", "device", "passes")] == [
        guilty,
        socket.gethostname(),
        "cpu",
        [wrong - 1],
    ]
    assert erring["tensors"] and f"rank {guilty} (" in first["text"]
    assert_same_bits(tmp_path / "run", undisturbed(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_errs_every_time_ends_the_run_and_nothing_of_it_is_saved(
    layout: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    skip_unless(layout in {"one", "dp2"}, request)
    world_size, laid = LAYOUTS[layout]
    words = [*laid, *CHECKED, "--save-interval", "1"]
    before = partial(flip, ranks=[0], passes=range(2, 100))
    assert run_on(world_size, words, tmp_path / "run", data, model=SMALL, before=before) == 81
    (compared,) = events_of(tmp_path / "run", "passes_compared")
    (erring,) = compared["erring"]
    assert (compared["step"], compared["verdict"], erring["rank"], erring["passes"]) == (2, "persistent", 0, [1, 2, 3])
    assert "all three differ; rank 0 (" in compared["text"] and "the run ends" in compared["text"]
    assert saved_steps(tmp_path / "run") == [1]
    (ended,) = events_of(tmp_path / "run", "run_ended")
    assert (ended["reason"], ended["step"]) == ("a rank that computes wrongly", 2)
    # On another machine the same command goes on from before.
    assert run_on(world_size, words, tmp_path / "run", data, model=SMALL) == 0


def test_a_rank_that_errs_in_two_checks_ends_the_run(data: Path, tmp_path: Path) -> None:
    # Passes 2 to 4 are of step 2, 6 to 8 of step 4.
    words = [*CHECKED, "--save-interval", "1"]
    before = partial(flip, ranks=[1], passes=[2, 7])
    assert run_on(2, words, tmp_path / "run", data, model=SMALL, before=before) == 81
    first, second = events_of(tmp_path / "run", "passes_compared")
    assert [(event["step"], event["verdict"]) for event in (first, second)] == [(2, "transient"), (4, "persistent")]
    assert [erring["rank"] for erring in second["erring"]] == [1]
    assert "two of the three agree" in second["text"] and "rank 1 did so before" in second["text"]
    assert saved_steps(tmp_path / "run") == [1, 2, 3]


def test_ranks_that_err_in_one_check_each_do_not_end_the_run(data: Path, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        flip(rank, ranks=[0], passes=[2])
        flip(rank, ranks=[1], passes=[7])

    assert run_on(2, CHECKED, tmp_path / "run", data, model=SMALL, before=before) == 0
    compared = events_of(tmp_path / "run", "passes_compared")
    assert [[erring["rank"] for erring in event["erring"]] for event in compared] == [[0], [1]]
    assert [event["verdict"] for event in compared] == ["transient", "transient"]


def test_what_goes_wrong_in_the_exchange_is_no_ranks_fault(data: Path, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        finish, taken = Laid.finish_gradients, [0]

        def disturbed(laid: Laid) -> None:
            finish(laid)
            taken[0] += 1
            if taken[0] == 2 and rank == 1:
                held = next(iter(laid.trained.held.values()))
                assert held.parameter.grad is not None
                held.parameter.grad.copy_(flipped(local_part(held.parameter.grad), 1))

        Laid.finish_gradients = disturbed  # type: ignore[method-assign, assignment]

    assert run_on(2, CHECKED, tmp_path / "run", data, model=SMALL, before=before) == 0
    compared = events_of(tmp_path / "run", "passes_compared")[0]
    assert (compared["verdict"], compared["erring"]) == ("transient", [])
    assert "no rank made something else of the same: what ranks exchanged differs" in compared["text"]


def test_not_a_number_is_no_difference(data: Path, tmp_path: Path) -> None:
    # Samples 8 to 15 are of step 2.
    before = partial(spoil_losses, samples=[9], factor=math.nan)
    assert run_on(1, CHECKED, tmp_path / "run", data, model=SMALL, before=before) == 0
    assert [event["verdict"] for event in events_of(tmp_path / "run", "passes_compared")] == ["alike", "alike"]
    (left_out,) = events_of(tmp_path / "run", "step_left_out")
    assert (left_out["step"], left_out["samples"]) == (2, [9])


@pytest.mark.parametrize(("backward", "verdict"), [(False, "transient"), (True, "alike")])
def test_without_gradients_forward_passes_are_compared(
    backward: bool, verdict: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    skip_unless(not backward, request)

    def before(rank: int) -> None:
        megalith.recheck.compares_gradients = lambda device: False
        flip(rank, ranks=[1], passes=[2], backward=backward)

    assert run_on(2, CHECKED, tmp_path / "run", data, model=SMALL, before=before) == 0
    compared = events_of(tmp_path / "run", "passes_compared")[0]
    assert compared["verdict"] == verdict
    assert [erring["rank"] for erring in compared["erring"]] == ([] if backward else [1])
    assert not any("gradient" in name for erring in compared["erring"] for name in erring["tensors"])
    notes = [event["text"] for event in events_of(tmp_path / "run", "line") if "--check-compute" in event["text"]]
    assert len(notes) == 1 and "forward passes only" in notes[0]


def test_gradients_of_a_gpu_are_compared_if_its_algorithms_are_deterministic() -> None:
    assert compares_gradients(torch.device("cpu"))
    assert not compares_gradients(torch.device("cuda"))
    torch.use_deterministic_algorithms(True)
    try:
        assert compares_gradients(torch.device("cuda"))
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_interval_below_zero_is_a_fault(data: Path) -> None:
    faults = check(read_command_line([*SMALL, "--data-path", str(data), "--check-compute", "-1"]), 1)
    assert [fault.setting for fault in faults] == ["--check-compute"]


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2", "pp2", "zero3"])
@pytest.mark.parametrize("task", ["bert", "t5", "vit", "ict"])
def test_other_tasks_compute_the_same_again(
    task: str, layout: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    skip_unless(False, request)
    if (task, layout) == ("ict", "pp2"):
        pytest.skip("ICT has no pipeline")
    words = ["--train-iters", "3", "--check-compute", "1", *LAYOUTS[layout][1]]
    if task == "ict":
        files = ["--titles-data-path", str(tmp_path / test_ict.TITLES), "--vocab-file", str(tmp_path / "vocab.txt")]
        runs = Runs(tmp_path, model=[*test_ict.MODEL, "--micro-batch-size", "4", *files], write=test_ict.write_texts)
    elif task == "vit":
        runs = Runs(tmp_path, model=test_vit.MODEL, write=write_images)
    else:
        sentences = test_bert if task == "bert" else test_t5
        vocabulary = ["--vocab-file", str(tmp_path / "vocab.txt")]
        runs = Runs(tmp_path, model=[*sentences.MODEL, *vocabulary], write=sentences.write_data)
    save = runs(LAYOUTS[layout][0], *words)
    assert [event["verdict"] for event in events_of(save, "passes_compared")] == ["alike"] * 3
