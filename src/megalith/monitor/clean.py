"""What a person is told of each event: one short line, numbers with their units, nothing that is only bookkeeping."""

from collections.abc import Callable
from typing import Any

from megalith.monitor import events
from megalith.monitor.lines import perplexity
from megalith.monitor.troubles import TROUBLES
from megalith.terminal import counted


def clean_lines(event: events.Event) -> list[str]:
    """The lines of an event, none for one that only a log needs."""
    return LINES[type(event)](event) if type(event) in LINES else []


def run_started(event: events.RunStarted) -> list[str]:
    axes = {
        "data": event.data_parallel_size,
        "tensor": event.tensor_parallel_size,
        "pipeline": event.pipeline_parallel_size,
    }
    layout = " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1)
    ranks = counted(event.world_size, "process", "processes") + (f" ({layout})" if layout else "")
    batch = f"{event.global_batch_size:,} sequences per step"
    if event.rampup_batch_size is None:
        batch += f" in {counted(event.num_microbatches, 'microbatch', 'microbatches')}"
    else:
        batch += f", from {event.rampup_batch_size[0]:,} on"
    return [*event.remarks, f"run: {ranks}, {event.dtype}, {batch}"]


def model_built(event: events.ModelBuilt) -> list[str]:
    text = f"model: {event.name}, {event.num_parameters:,} parameters"
    held = [rank.num_parameters for rank in event.ranks]
    if len(held) > 1:
        text += (
            f", {min(held):,} to {max(held):,} on a rank" if min(held) < max(held) else f", {held[0]:,} on each rank"
        )
    return [text]


def corpus_split(event: events.CorpusSplit) -> list[str]:
    parts = ", ".join(f"{part.name} {part.end - part.first:,}" for part in event.parts)
    return [f"documents: {parts}"]


def maps_loaded(event: events.MapsLoaded) -> list[str]:
    return [f"{event.part}: {event.num_samples:,} samples, {counted(event.num_epochs, 'epoch')} over the data"]


def sentence_map_loaded(event: events.SentenceMapLoaded) -> list[str]:
    used = f"{event.num_used:,} of {counted(event.num_documents, 'document')}"
    return [f"{event.part}: {event.num_samples:,} samples of sentences from {used}"]


def training_started(event: events.TrainingStarted) -> list[str]:
    return [f"training: step {event.step:,} to {event.last_step:,} on {counted(event.num_devices, 'device')}"]


def interval_done(event: events.IntervalDone) -> list[str]:
    fields = [f"step {event.step:,}/{event.last_step:,}", *figures(event)]
    if event.num_skipped:
        fields.append(f"{counted(event.num_skipped, 'step')} skipped")
    steps_left = event.last_step - event.step
    fields.append(f"left {duration(event.seconds / event.num_steps * steps_left)}")
    return [" | ".join(fields)]


def figures(event: events.IntervalDone) -> list[str]:
    norm = [] if event.grad_norm is None else [f"grad norm {event.grad_norm:.3g}"]
    speed = rates(event.tokens_per_second, event.tflops_per_device, event.mfu)
    losses = [f"{name} {loss:.4f}" for name, loss in event.losses.items()]
    return [*losses, f"learning rate {event.learning_rate:.3g}", *norm, *speed]


def rates(tokens_per_second: float, tflops_per_device: float | None, mfu: float | None) -> list[str]:
    shown = [f"{tokens_per_second:,.0f} tokens/s"]
    if tflops_per_device is not None:
        digits = 1 if tflops_per_device >= 1 else 4
        shown.append(f"{tflops_per_device:.{digits}f} TFLOP/s")
    if mfu is not None:
        shown.append(f"MFU {mfu:.1%}")
    return shown


def evaluated(event: events.Evaluated) -> list[str]:
    told = []
    for name, loss in event.losses.items():
        told.append(f"{name} {loss:.4f}" + (f", perplexity {perplexity(loss):,.2f}" if name == "lm loss" else ""))
    # The one at the end reads on in the data where the last between steps stopped: the same step, another loss.
    place = f"the end of training, step {event.step:,}" if event.final else f"step {event.step:,}"
    return [f"{event.split} at {place}: {'; '.join(told)} ({duration(event.seconds)})"]


def warned(event: Any) -> list[str]:
    """Of any event that carries a text for people, unless that is empty."""
    return [f"warning: {event.text}"] if event.text else []


def run_ended(event: events.RunEnded) -> list[str]:
    why = {
        "done": "done",
        "exit-interval": "stopped by --exit-interval",
        "exit-duration": "stopped by --exit-duration-in-mins",
    }.get(event.reason, f"stopped by {event.reason}")
    return [f"{why} at step {event.step:,} after {duration(60.0 * event.minutes)}"]


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3:05, 1:02:03, 2 d 1:02:03."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02}:{rest:02}" if hours or days else f"{minutes}:{rest:02}"
    return f"{days} d {clock}" if days else clock


def checkpoint_saved(event: events.CheckpointSaved) -> list[str]:
    waited = "" if event.stall is None else f", steps waited {event.stall:.3f} s"
    return [f"checkpoint: step {event.step:,} saved in {event.directory} ({duration(event.seconds)}{waited})"]


def checkpoint_loaded(event: events.CheckpointLoaded) -> list[str]:
    return [f"checkpoint: step {event.step:,} loaded from {event.directory} ({duration(event.seconds)})"]


def tokenizer_built(event: events.TokenizerBuilt) -> list[str]:
    return [f"tokenizer: {event.name}, {event.vocab_size:,} tokens, padded to {event.padded_vocab_size:,}"]


LINES: dict[type, Callable[[Any], list[str]]] = {
    events.RunStarted: run_started,
    events.TokenizerBuilt: tokenizer_built,
    events.ModelBuilt: model_built,
    events.CorpusSplit: corpus_split,
    events.MapsLoaded: maps_loaded,
    events.SentenceMapLoaded: sentence_map_loaded,
    events.TrainingStarted: training_started,
    events.IntervalDone: interval_done,
    events.Evaluated: evaluated,
    events.CheckpointSaved: checkpoint_saved,
    events.CheckpointLoaded: checkpoint_loaded,
    events.CheckpointMissing: lambda event: [f"warning: no checkpoint at {event.tracker}: starting from new weights"],
    events.Warned: warned,
    **dict.fromkeys(TROUBLES, warned),
    events.RunEnded: run_ended,
}
