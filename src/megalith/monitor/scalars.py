"""TensorBoard: the scalars that Megatron-LM writes, by its names, so that its dashboards go on working.

Each is written twice, by step and, as "NAME vs samples", by the samples consumed. The event files are written here and
now through tensorboard's own record format: a writer thread, as most programs use, does not survive the forks of data
workers, and its failures surface nowhere near their cause. Up to tensorboard_queue_size events wait in memory, at most
FLUSH_SECONDS.
"""

import errno
import io
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megalith.monitor import events
from megalith.monitor.lines import perplexity
from megalith.monitor.settings import MonitorConfig
from megalith.terminal import redacted

FLUSH_SECONDS = 30.0


class EventFile:
    """A new TensorBoard event file in a directory. Every method raises OSError if the disk does not take it."""

    def __init__(self, directory: Path, queue_size: int, now: float) -> None:
        # Only here: a run without TensorBoard must not wait for its imports.
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # type: ignore[import-untyped]
        from tensorboard.compat.proto.tensor_pb2 import TensorProto  # type: ignore[import-untyped]
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._event, self._summary, self._metadata = Event, Summary, SummaryMetadata
        self._tensor, self._shape = TensorProto, TensorShapeProto
        self._queue_size = queue_size
        self._waiting: list[Any] = [Event(wall_time=now, file_version="brain.Event:2")]
        self._flushed = now
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = unused(directory, name).open("xb", buffering=0)
        self._record_writer = RecordWriter

    def scalar(self, name: str, value: float, x: int, now: float) -> None:
        summary = self._summary(value=[self._summary.Value(tag=name, simple_value=value)])
        self._add(self._event(wall_time=now, step=x, summary=summary), now)

    def text(self, name: str, text: str, x: int, now: float) -> None:
        """As TensorBoard's text tab wants it, under NAME/text_summary."""
        metadata = self._metadata(plugin_data=self._metadata.PluginData(plugin_name="text"))
        shape = self._shape(dim=[self._shape.Dim(size=1)])
        data = redacted(text).encode("utf-8", "backslashreplace")
        tensor = self._tensor(dtype="DT_STRING", string_val=[data], tensor_shape=shape)
        value = self._summary.Value(tag=f"{name}/text_summary", metadata=metadata, tensor=tensor)
        self._add(self._event(wall_time=now, step=x, summary=self._summary(value=[value])), now)

    def _add(self, event: Any, now: float) -> None:
        self._waiting.append(event)
        if len(self._waiting) >= self._queue_size or now - self._flushed >= FLUSH_SECONDS:
            self.flush(now)

    def flush(self, now: float) -> None:
        waiting, self._waiting = self._waiting, []
        self._flushed = now
        buffer = io.BytesIO()
        records = self._record_writer(buffer)
        for event in waiting:
            records.write(event.SerializeToString())
        data = buffer.getvalue()
        if self._file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def close(self) -> None:
        """Give the file back; what still waits is lost without a flush."""
        self._file.close()


def unused(directory: Path, name: str) -> Path:
    """A path in directory that nothing has yet: the name with the first free number at its end."""
    number = 0
    while (path := directory / f"{name}.{number}").exists():
        number += 1
    return path


class Scalars:
    """Turns events into TensorBoard scalars. When the disk refuses, on_loss is told and nothing more is written."""

    def __init__(self, directory: Path, settings: MonitorConfig) -> None:
        self.directory = directory
        self._settings = settings
        self._arguments: Mapping[str, object] = {}
        self._file: EventFile | None = None
        self._failed = False

    def report(self, event: events.Event, now: float, on_loss: Callable[[str], None]) -> None:
        """Write what TensorBoard is to know of an event, if it is due."""
        if self._failed or not isinstance(event, WRITTEN):
            return
        try:
            if self._file is None:
                self._file = EventFile(self.directory, self._settings.tensorboard_queue_size, now)
            self._write(event, self._file, now)
        except OSError as error:
            self._fail(str(error), on_loss)

    def _write(self, event: events.Event, file: EventFile, now: float) -> None:
        match event:
            case events.RunStarted():
                # Written when training starts, since only then the step is known at which it does.
                self._arguments = event.arguments
            case events.TrainingStarted():
                for name, value in self._arguments.items():
                    file.text(name, str(value), event.step, now)
            case events.StepDone():
                if event.step % self._settings.tensorboard_log_interval == 0:
                    for name, number in self._of_step(event).items():
                        file.scalar(name, number, event.step, now)
                        file.scalar(f"{name} vs samples", number, event.consumed_samples, now)
                    if self._settings.log_memory_to_tensorboard:
                        for name, number in of_memory(event).items():
                            file.scalar(name, number, event.step, now)
            case events.IntervalDone():
                for name, number in self._of_interval(event).items():
                    file.scalar(name, number, event.step, now)
            case events.TimersReported():
                if event.step is not None and self._settings.log_timers_to_tensorboard:
                    for name, number in event.seconds.items():
                        file.scalar(f"{name}-time", number / event.num_steps, event.step, now)
            case events.Evaluated():
                for name, number in self._of_evaluation(event).items():
                    file.scalar(name, number, event.step, now)
                    file.scalar(f"{name} vs samples", number, event.consumed_samples, now)
                file.flush(now)

    def _of_step(self, step: events.StepDone) -> dict[str, float]:
        named: dict[str, Any] = {}
        if self._settings.log_learning_rate_to_tensorboard:
            named["learning-rate"] = step.learning_rate
        if self._settings.log_batch_size_to_tensorboard:
            named["batch-size"] = step.global_batch_size
        named |= step.losses
        if self._settings.log_loss_scale_to_tensorboard:
            named["loss-scale"] = step.loss_scale
        named |= {"grad-norm": step.grad_norm, "num-zeros": step.num_zeros, "params-norm": step.params_norm}
        return {name: float(value) for name, value in named.items() if value is not None}

    def _of_interval(self, interval: events.IntervalDone) -> dict[str, float]:
        """Megatron-LM's iteration-time, seconds; and the speed, which it does not write."""
        named: dict[str, float | None] = {
            "tokens-per-second": interval.tokens_per_second,
            "throughput": interval.tflops_per_device,
            "throughput-causal": interval.causal_tflops_per_device,
            "mfu": interval.mfu,
        }
        if self._settings.log_timers_to_tensorboard:
            named["iteration-time"] = interval.seconds / interval.num_steps
        return {name: value for name, value in named.items() if value is not None}

    def _of_evaluation(self, evaluated: events.Evaluated) -> dict[str, float]:
        named = {}
        for name, loss in evaluated.losses.items():
            named[f"{name} {evaluated.split}"] = loss
            if self._settings.log_validation_ppl_to_tensorboard:
                named[f"{name} {evaluated.split} ppl"] = perplexity(loss)
        return named

    def close(self, now: float, on_loss: Callable[[str], None]) -> None:
        """Write what waits, and close the file."""
        if self._file is None or self._failed:
            return
        try:
            self._file.flush(now)
        except OSError as error:
            self._fail(str(error), on_loss)
        else:
            self._file.close()

    def _fail(self, reason: str, on_loss: Callable[[str], None]) -> None:
        self._failed = True
        if self._file is not None:
            self._file.close()
        on_loss(reason)


def of_memory(step: events.StepDone) -> dict[str, float]:
    if step.memory is None:
        return {}
    named: dict[str, float] = {
        "mem-reserved-bytes": step.memory.reserved,
        "mem-allocated-bytes": step.memory.allocated,
    }
    if step.memory.num_allocations is not None:
        named["mem-allocated-count"] = step.memory.num_allocations
    return named


WRITTEN = (
    events.RunStarted,
    events.TrainingStarted,
    events.StepDone,
    events.IntervalDone,
    events.TimersReported,
    events.Evaluated,
)
