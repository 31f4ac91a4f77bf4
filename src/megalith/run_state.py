"""What a checkpoint holds of a run, tensors and the rest of its state, and how a run takes the rest over."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from megalith import __version__
from megalith.checkpoint.pieces import Piece
from megalith.checkpoint.store import Loaded
from megalith.continuity import decisive
from megalith.evaluations import OWED
from megalith.job import Job
from megalith.models.settings import ModelConfig
from megalith.models.shape import OPTIONS, shape_of
from megalith.optim.batch_size import steps_left
from megalith.optim.finite import BadSteps
from megalith.optim.groups import num_updates, readable_tensors, set_num_updates
from megalith.optim.local import local_part
from megalith.optim.schedule import length_flag, resumed_schedule, schedule_to_json
from megalith.sources import as_toml

# Tensors of a checkpoint are named after what they are, then by the parameter: weight.layers.0.... , exp_avg. ...
WEIGHT = "weight."


def tensors_of(job: Job) -> dict[str, Piece]:
    """What this rank holds of the weights and, unless --no-save-optim, of the optimizer's tensors."""
    pieces = weight_pieces(job)
    return pieces if job.run.checkpoint.no_save_optim else {**pieces, **optimizer_pieces(job)}


def weight_pieces(job: Job) -> dict[str, Piece]:
    held = job.laid.trained.held
    return {WEIGHT + name: Piece(local_part(h.parameter.data), h.whole, h.offset) for name, h in held.items()}


def optimizer_pieces(job: Job) -> dict[str, Piece]:
    """The optimizer's tensors; those that it keeps in fewer bits are not read yet."""
    pieces = {}
    for name, (tensor, read) in readable_tensors(job.laid.trained, job.optimizer).items():
        held = job.laid.trained.held[name.split(".", 1)[1]]
        pieces[name] = Piece(local_part(tensor), held.whole, held.offset, read)
    return pieces


def state_of(job: Job) -> dict[str, Any]:
    """Everything else that a run goes on from, as JSON."""
    progress = job.progress
    return {
        "step": progress.step,
        "consumed_train_samples": progress.consumed_train_samples,
        "consumed_valid_samples": progress.consumed_valid_samples,
        "owes": progress.owes,
        "schedule_samples": progress.schedule_samples,
        "skipped_steps": progress.skipped_steps,
        "bad_steps": progress.bad_steps.to_json(),
        "spikes": progress.spikes.state(),
        "num_updates": num_updates(job.laid.trained, job.optimizer),
        "loss_scale": None if progress.loss_scale is None else progress.loss_scale.to_json(),
        "schedule": schedule_to_json(job.schedule),
        "model": identity_of(job),
        "data": job.data,
        "samples": samples_of(job),
    }


def samples_of(job: Job) -> dict[str, Any]:
    """What decides the run's samples, and how many pairs a loss compares if it does."""
    pairs = (job.run.optimizer.micro_batch_size or 1) * job.layout.data if job.task.contrasts else None
    return decisive(job.run, contrasted=pairs)


def notes_of(job: Job) -> dict[str, Any]:
    """What a checkpoint keeps besides: it may differ between two checkpoints that are the same."""
    return {
        "interval": job.interval.state(time.perf_counter()),
        "ledger": job.ledger.state(),
        "run": as_toml(job.run),
        "megalith": __version__,
    }


def identity_of(job: Job) -> dict[str, Any]:
    """What must be the same for a checkpoint's weights to mean the same."""
    shape = shape_of(job.run.model)
    return {
        "task": job.run.task,
        "num_layers": shape.num_layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.num_heads,
        "kv_channels": shape.head_width,
        "ffn_hidden_size": shape.inner,
        "untie_embeddings_and_output_weights": job.run.model.untie_embeddings_and_output_weights,
        "max_position_embeddings": shape.num_positions,
        "padded_vocab_size": job.vocab_size,
        "tokenizer": None if job.tokenizer is None else job.tokenizer.digest,
        **job.task.identity(job.run),
    }


def differing(stored: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Names and both values of what is not the same in two identities of models, a checkpoint's and a run's."""
    plain = ModelConfig()
    for name in {**own, **{name: None for name in stored if name in OPTIONS}}:
        if name in OPTIONS:
            there, here = (model.get(name, getattr(plain, name)) for model in (stored, own))
        else:
            # Checkpoints of earlier versions do not say all of it.
            there, here = stored.get(name, own[name]), own[name]
        if there != here:
            yield name, there, here


def restore(job: Job, loaded: Loaded, *, with_optimizer: bool, goes_on: bool = True) -> None:
    """Take over everything but the tensors, in place.

    goes_on: the run is the checkpoint's own; else without the optimizer the learning rate's schedule begins anew.
    """
    state: Mapping[str, Any] = loaded.index.state
    progress = job.progress
    progress.step = int(state["step"])
    progress.consumed_train_samples = int(state["consumed_train_samples"])
    progress.consumed_valid_samples = int(state["consumed_valid_samples"])
    if with_optimizer or goes_on:
        progress.schedule_samples = int(state["schedule_samples"])
    progress.skipped_steps = int(state["skipped_steps"])
    # Checkpoints of earlier versions have none of these.
    owes = state.get("owes")
    progress.owes = owes if isinstance(owes, str) and owes in OWED else None
    progress.bad_steps = BadSteps.from_json(state.get("bad_steps", {}))
    progress.spikes.restore(state.get("spikes", {}))
    set_last_step(job)
    if with_optimizer:
        set_num_updates(job.laid.trained, job.optimizer, int(state["num_updates"]))
        # A constant scale has left nothing to go on from.
        if progress.loss_scale is not None and state["loss_scale"]:
            progress.loss_scale = progress.loss_scale.resumed(state["loss_scale"])
        job.schedule, spoken = resumed_schedule(
            job.schedule,
            state["schedule"],
            override_lr_scheduler=job.run.optimizer.override_lr_scheduler,
            use_checkpoint_lr_scheduler=job.run.optimizer.use_checkpoint_lr_scheduler,
            length_flag=length_flag(job.run.optimizer, train_iters=job.run.train.train_iters),
            step_samples=job.batch_sizes.global_batch_size if job.run.train.train_iters else None,
        )
        for line in spoken:
            job.log.line(line, detail=True)
    job.interval.restore(loaded.index.notes["interval"], time.perf_counter())


def set_last_step(job: Job) -> None:
    """Let a run whose length is given in samples end with them, whatever the batches were so far; in place."""
    progress, train = job.progress, job.run.train
    if train.train_samples is None:
        return
    before, left = job.last_step, steps_left(train.train_samples, job.batch_sizes, progress.consumed_train_samples)
    job.last_step = job.interval.last_step = progress.step + left
    if job.last_step != before:
        job.log.line(f"setting training iterations to {job.last_step}, for the batch size was another one")
