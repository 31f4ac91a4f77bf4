"""TensorBoard sees Megatron-LM's scalars, read back by TensorBoard's own reader."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from megalith.monitor.events import Event, RunStarted, TimersReported, TrainingStarted
from megalith.monitor.scalars import FLUSH_SECONDS, Scalars
from megalith.monitor.settings import MonitorConfig
from tests.monitor.reports import evaluated, interval_done, step_done
from tests.monitor.test_outlet import disk_that_holds

EVERYTHING = MonitorConfig(
    log_timers_to_tensorboard=True,
    log_batch_size_to_tensorboard=True,
    log_validation_ppl_to_tensorboard=True,
    log_memory_to_tensorboard=True,
)


def read(directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reader's own making
        from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
            EventAccumulator,
        )

        reader = EventAccumulator(str(directory))
        reader.Reload()
    return reader


def written(directory: Path, settings: MonitorConfig, *reported: Event) -> dict[str, Any]:
    """The scalars in directory once some events were reported: their places and values by name."""
    scalars = Scalars(directory, settings)
    for event in reported:
        scalars.report(event, 1234.5, pytest.fail)
    scalars.close(1234.5, pytest.fail)
    reader = read(directory)
    return {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def test_every_scalar_stands_by_step_and_by_samples(tmp_path: Path) -> None:
    found = written(tmp_path, EVERYTHING, step_done(1), step_done(2, 1.5))
    expected = {
        "learning-rate": (pytest.approx(0.001), pytest.approx(0.002)),
        "batch-size": (64, 64),
        "lm loss": (2.5, 1.5),
        "loss-scale": (65536, 65536),
        "grad-norm": (1.25, 1.25),
    }
    for name, (first, second) in expected.items():
        assert found.pop(name) == [(1, first), (2, second)]
        assert found.pop(f"{name} vs samples") == [(64, first), (128, second)]
    assert {name: points[0][1] for name, points in found.items()} == {
        "mem-reserved-bytes": 3 << 30,
        "mem-allocated-bytes": 1 << 30,
        "mem-allocated-count": 17,
    }


def test_what_an_option_turns_off_is_not_written(tmp_path: Path) -> None:
    settings = MonitorConfig(log_learning_rate_to_tensorboard=False, log_loss_scale_to_tensorboard=False)
    timers = TimersReported({"optimizer": 1.0}, step=1)
    found = written(tmp_path, settings, step_done(1), timers, interval_done(), evaluated())
    assert {name for name in found if "vs samples" not in name} == {
        "lm loss",
        "grad-norm",
        "lm loss validation",
        "tokens-per-second",
        "throughput",
        "mfu",
    }


def test_only_steps_that_are_due_are_written(tmp_path: Path) -> None:
    found = written(tmp_path, MonitorConfig(tensorboard_log_interval=3), *map(step_done, range(1, 8)))
    assert [place for place, _ in found["lm loss"]] == [3, 6]


def test_timers_and_intervals_are_in_seconds(tmp_path: Path) -> None:
    timers = TimersReported({"optimizer": 1.0, "batch-generator": 0.5}, num_steps=10, step=10)
    setup = TimersReported({"model-and-optimizer-setup": 9.0})
    found = written(tmp_path, EVERYTHING, setup, timers, interval_done(10))
    assert found["optimizer-time"] == [(10, pytest.approx(0.1))]
    assert found["batch-generator-time"] == [(10, pytest.approx(0.05))]
    assert found["iteration-time"] == [(10, 1.0)]
    assert found["tokens-per-second"] == [(10, 131072.0)] and found["throughput"] == [(10, 156.0)]
    assert "model-and-optimizer-setup-time" not in found


def test_an_evaluation_has_its_perplexity_and_the_test_set_a_name_of_its_own(tmp_path: Path) -> None:
    found = written(tmp_path, EVERYTHING, evaluated(), evaluated("test"))
    assert found["lm loss validation"] == [(10, 3.0)] and found["lm loss test"] == [(10, 3.0)]
    assert found["lm loss validation ppl"] == [(10, pytest.approx(math.exp(3.0)))]
    assert found["lm loss validation ppl vs samples"] == [(640, pytest.approx(math.exp(3.0)))]


def test_the_arguments_stand_as_text_at_the_step_where_training_starts(tmp_path: Path) -> None:
    started = RunStarted({"lr": 0.1, "split": "\udcff"}, 1, 1, 1, 1, "float32", 1, 64)
    written(tmp_path, MonitorConfig(), started, TrainingStarted(500, 1000, 0, 1))
    reader = read(tmp_path)
    (lr,) = reader.Tensors("lr/text_summary")
    assert lr.step == 500 and list(lr.tensor_proto.string_val) == [b"0.1"]
    assert list(reader.Tensors("split/text_summary")[0].tensor_proto.string_val) == [b"\\udcff"]
    plugin = reader.SummaryMetadata("lr/text_summary").plugin_data.plugin_name
    assert plugin == "text"


def test_the_file_is_the_one_that_pytorchs_writer_would_make(tmp_path: Path) -> None:
    """The same events but for the moment of writing, record by record."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_file_loader import (  # type: ignore[import-untyped]
            RawEventFileLoader,
        )
        from tensorboard.compat.proto.event_pb2 import Event as Protocol  # type: ignore[import-untyped]
        from torch.utils.tensorboard import SummaryWriter

    def events_in(directory: Path) -> list[tuple[int, Any]]:
        (path,) = directory.iterdir()
        loaded = [Protocol.FromString(record) for record in RawEventFileLoader(str(path)).Load()]
        return [(event.step, event.summary) for event in loaded]

    theirs = SummaryWriter(str(tmp_path / "theirs"))
    theirs.add_text("lr", "0.1", 0)
    theirs.add_scalar("lm loss", 2.5, 3)
    theirs.add_scalar("lm loss vs samples", 2.5, 192)
    theirs.close()
    settings = MonitorConfig(log_learning_rate_to_tensorboard=False, log_loss_scale_to_tensorboard=False)
    started = RunStarted({"lr": 0.1}, 1, 1, 1, 1, "float32", 1, 64)
    written(tmp_path / "ours", settings, started, TrainingStarted(0, 10, 0, 1), step_done(3))
    assert events_in(tmp_path / "ours")[:4] == events_in(tmp_path / "theirs")


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def test_events_wait_until_there_are_enough_of_them_or_time_has_passed(tmp_path: Path) -> None:
    scalars = Scalars(tmp_path, MonitorConfig(tensorboard_queue_size=12))
    scalars.report(step_done(1), 0.0, pytest.fail)
    empty = size(tmp_path)
    scalars.report(step_done(2), 1.0, pytest.fail)
    assert size(tmp_path) > empty
    few = Scalars(tmp_path / "few", MonitorConfig())
    few.report(step_done(1), 0.0, pytest.fail)
    empty = size(tmp_path / "few")
    few.report(step_done(2), FLUSH_SECONDS + 1.0, pytest.fail)
    assert size(tmp_path / "few") > empty
    for each in (scalars, few):
        each.close(100.0, pytest.fail)


def test_two_runs_in_one_directory_do_not_overwrite_each_other(tmp_path: Path) -> None:
    for _ in range(2):
        written(tmp_path, MonitorConfig(), step_done(1))
    assert len(list(tmp_path.iterdir())) == 2


def test_without_events_nothing_is_made(tmp_path: Path) -> None:
    Scalars(tmp_path / "tb", MonitorConfig()).close(0.0, pytest.fail)
    assert not (tmp_path / "tb").exists()


def test_a_full_disk_is_told_once_and_the_rest_is_let_go(tmp_path: Path) -> None:
    told: list[str] = []
    scalars = Scalars(tmp_path, MonitorConfig(tensorboard_queue_size=1))
    with disk_that_holds(200):
        for step in range(1, 20):
            scalars.report(step_done(step), 0.0, told.append)
    scalars.report(step_done(20), 0.0, told.append)
    scalars.close(0.0, told.append)
    assert len(told) == 1 and "No space left" in told[0]


def test_a_directory_that_cannot_be_made_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told: list[str] = []
    scalars = Scalars(tmp_path / "file" / "tb", MonitorConfig())
    for step in (1, 2):
        scalars.report(step_done(step), 0.0, told.append)
    assert len(told) == 1 and str(tmp_path / "file") in told[0]
