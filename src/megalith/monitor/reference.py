"""What Megatron-LM would print for each event: a table from the kind of event to its lines.

An event is reported when something has happened. The lines that announce work before it is done ("building GPT model
...") are said by RunLog.line(..., detail=True) when it begins.
"""

from collections.abc import Callable
from typing import Any

from megalith.monitor import events, lines
from megalith.monitor.troubles import TROUBLES


def reference_lines(event: events.Event, now: float) -> list[str]:
    """The lines of an event, none if Megatron-LM is silent there; now in Unix seconds."""
    return LINES[type(event)](event, now) if type(event) in LINES else []


def run_started(event: events.RunStarted, now: float) -> list[str]:
    if event.rampup_batch_size is None:
        batch = lines.microbatches(event.num_microbatches)
    else:
        start, increment, samples = event.rampup_batch_size
        batch = lines.batch_rampup(start, event.global_batch_size, increment=increment, samples=samples)
    sizes = (event.data_parallel_size, event.tensor_parallel_size, event.pipeline_parallel_size)
    return [
        lines.world(event.world_size, data=sizes[0], tensor=sizes[1], pipeline=sizes[2]),
        *event.remarks,
        lines.parameters_dtype(event.dtype),
        *lines.arguments(event.arguments),
        batch,
    ]


def ranks_started(event: events.RanksStarted, now: float) -> list[str]:
    return [
        lines.initializing_model_parallel("tensor", event.tensor_parallel_size),
        lines.initializing_model_parallel("pipeline", event.pipeline_parallel_size),
        lines.setting_seeds(event.seed),
        lines.model_parallel_seeds(
            rank=event.rank,
            model_parallel_rank=event.model_parallel_rank,
            data_parallel_rank=event.data_parallel_rank,
            model_parallel_seed=event.model_parallel_seed,
            data_parallel_seed=event.data_parallel_seed,
        ),
    ]


def model_built(event: events.ModelBuilt, now: float) -> list[str]:
    return [lines.number_of_parameters(r.tensor_rank, r.pipeline_rank, r.num_parameters) for r in event.ranks]


def corpus_split(event: events.CorpusSplit, now: float) -> list[str]:
    return lines.dataset_split((part.name, part.first, part.end, part.sentences) for part in event.parts)


def maps_built(event: events.MapsBuilt, now: float) -> list[str]:
    return [
        lines.maps_missing(),
        lines.last_epoch(
            event.last_epoch_samples,
            event.samples_per_epoch,
            num_epochs=event.num_epochs,
            separate=event.separate_last_epoch,
        ),
        lines.map_built("doc", event.document_seconds),
        *lines.sample_map_sizes(
            num_documents=event.num_documents,
            num_epochs=event.num_epochs,
            seq_length=event.seq_length,
            num_samples=event.num_samples,
        ),
        lines.map_built("sample", event.sample_seconds),
        lines.shuffle_split(event.samples_before_last_epoch, event.num_samples),
        lines.map_built("shuffle", event.shuffle_seconds),
    ]


def maps_loaded(event: events.MapsLoaded, now: float) -> list[str]:
    paths = (event.document_path, event.sample_path, event.shuffle_path)
    return lines.maps_loaded(paths, event.seconds, num_samples=event.num_samples, num_epochs=event.num_epochs)


def sentence_map_loaded(event: events.SentenceMapLoaded, now: float) -> list[str]:
    return lines.sentence_map_loaded(event.path, event.seconds, num_samples=event.num_samples)


def memory_reported(event: events.MemoryReported, now: float) -> list[str]:
    return [lines.memory(on.rank, event.step, on.memory) for on in event.ranks]


def evaluated(event: events.Evaluated, now: float) -> list[str]:
    if event.final:
        short = {"validation": "val"}.get(event.split, event.split)
        return lines.evaluation(f"the end of training for {short} data", event.losses)
    return lines.evaluation(f"iteration {event.step}", event.losses)


def checkpoint_saved(event: events.CheckpointSaved, now: float) -> list[str]:
    saved = lines.saved(event.step, event.directory)
    if not event.while_training:
        return [saved]
    # How long steps waited for it is the timer checkpoint-stall, in the timers' own line.
    return [saved, lines.timers({"save-checkpoint": event.seconds}, divided_by=1)]


def checkpoint_loaded(event: events.CheckpointLoaded, now: float) -> list[str]:
    return [
        *([lines.checkpoint_version(event.version)] if event.version else []),
        lines.loaded(event.directory, event.step),
        lines.timers({"load-checkpoint": event.seconds}, divided_by=1),
    ]


def warned(event: Any, now: float) -> list[str]:
    """Of any event that carries a text for people, unless that is empty."""
    return [f"WARNING: {event.text}"] if event.text else []


def run_ended(event: events.RunEnded, now: float) -> list[str]:
    """Nothing if the run came to its last step: Megatron-LM then marks the end of training, before it evaluates."""
    if event.reason == "done":
        return []
    if event.reason == "exit-interval":
        return [lines.place_reached(f"exiting program at iteration {event.step}", now)]
    if event.reason == "exit-duration":
        return [lines.place_reached(f"exiting program after {event.minutes} minutes", now)]
    why = f"receiving {event.reason}" if event.reason.startswith("SIG") else event.reason
    return [lines.place_reached(f"exiting program after {why}", now)]


LINES: dict[type, Callable[[Any, float], list[str]]] = {
    events.RunStarted: run_started,
    events.TokenizerBuilt: lambda event, now: [lines.padded_vocabulary(event.vocab_size, event.padded_vocab_size)],
    events.ScalarsOpened: lambda event, now: [lines.setting_tensorboard()],
    events.RanksStarted: ranks_started,
    events.Initialized: lambda event, now: [lines.initialized(event.seconds)],
    events.PlaceReached: lambda event, now: [lines.place_reached(event.place, now)],
    events.ModelBuilt: model_built,
    events.ScheduleBuilt: lambda event, now: [lines.decay_style(event.style)],
    events.TargetsSet: lambda event, now: lines.targets(
        train=event.train, validation=event.validation, test=event.test
    ),
    events.CorpusOpened: lambda event, now: lines.corpus_opened(
        event.num_documents, event.seconds, warmed_up=event.warmed_up, num_sentences=event.num_sentences
    ),
    events.CorpusSplit: corpus_split,
    events.MapsBuilt: maps_built,
    events.MapsLoaded: maps_loaded,
    events.SentenceMapLoaded: sentence_map_loaded,
    events.BlendBuilt: lambda event, now: lines.blend_built(event.weights, event.achieved, event.seconds),
    events.DatasetsBuilt: lambda event, now: [lines.datasets_built(event.name)],
    events.TimersReported: lambda event, now: [lines.timers(event.seconds, divided_by=event.num_steps)],
    events.TrainingStarted: lambda event, now: [lines.training()],
    events.IntervalDone: lambda event, now: [lines.iteration(event)],
    events.MemoryReported: memory_reported,
    events.Evaluated: evaluated,
    events.CheckpointStarted: lambda event, now: [lines.saving(event.step, event.directory)],
    events.CheckpointSaved: checkpoint_saved,
    events.LoadStarted: lambda event, now: [lines.loading(event.directory, event.step)],
    events.CheckpointLoaded: checkpoint_loaded,
    events.CheckpointMissing: lambda event, now: lines.checkpoint_missing(event.tracker),
    events.Warned: warned,
    **dict.fromkeys(TROUBLES, warned),
    events.RunEnded: run_ended,
}
