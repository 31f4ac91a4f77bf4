"""A Megatron-LM checkpoint as a run directory of ours: its files joined, one after the other."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalith import __version__
from megalith.checkpoint.directory import list_checkpoints
from megalith.checkpoint.foreign import ForeignFile, TensorRef, open_foreign
from megalith.checkpoint.megatron import Files, Grid, Tree, chunk_names, find_files, modern_qkv
from megalith.checkpoint.megatron_contents import (
    loss_scale_of,
    moments_of,
    schedule_of,
    tensors_in,
    update_counts,
)
from megalith.checkpoint.pieces import whole
from megalith.checkpoint.store import save
from megalith.config import ConfigError, Fault, Run, compose, known_settings
from megalith.config import convert as convert_setting
from megalith.data.order import SampleCounts, consumed_at
from megalith.data.tokenizer import Tokenizer
from megalith.datasets import open_tokenizer
from megalith.derived import OURS
from megalith.files import make_directories
from megalith.models.shape import shape_of
from megalith.monitor.interval import Interval
from megalith.monitor.ledger import Ledger
from megalith.sources import as_toml, write_run_file

# Arguments of Megatron-LM that follow from others or count the progress, so that ours need not keep them.
DERIVED = """
    rank world_size data_parallel_size params_dtype consumed_train_samples consumed_valid_samples iteration
    virtual_pipeline_model_parallel_size padded_vocab_size do_train do_valid do_test
""".split()
# Where and on how many ranks the other program ran: chosen anew for each start of ours. The run directory has a place
# for TensorBoard's files.
OF_THE_START = """
    tensor_model_parallel_size pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage local_rank
    lazy_mpu_init save load finetune tensorboard_dir
""".split()


@dataclass
class Joined:
    """What the files read so far make up."""

    run: Run
    grid: Grid
    tokenizer: Tokenizer
    iteration: int
    version: float
    moments: tuple[str, ...] | None  # None: weights only
    state: dict[str, Any]
    unknown: list[str]  # arguments that no setting of ours takes over
    tensors: dict[str, Tensor] = field(default_factory=dict)
    differing: list[tuple[str, float]] = field(default_factory=list)  # copies unlike the first, and by how much


def from_megatron(
    directory: str,
    run_dir: str,
    *,
    iteration: int | None,
    weights_only: bool,
    tokenizer_settings: Mapping[str, str],
) -> Iterator[str]:
    """Make a run directory of a checkpoint, and say what was done; iteration None: the one its tracker file names.

    Raises ValueError, naming file and place, for what is missing, damaged or not a GPT's; nothing is written then.
    Memory: the model in fp32, twice more for Adam's moments, and the largest tensor of a file.
    """
    if list_checkpoints(run_dir):
        raise ValueError(f"--to = {run_dir}: holds checkpoints already. Choose another directory.")
    files = find_files(Path(directory), iteration)
    weights_only = weights_only or files.is_release
    make_directories(run_dir)
    joined: Joined | None = None
    for stage in range(files.stages):
        for tensor_rank in range(files.tensor):
            path = files.path(tensor_rank, stage)
            yield f"reading {path}"
            with open_foreign(path, scratch=Path(run_dir)) as file:
                try:
                    if joined is None:
                        joined = start(file, files, run_dir, tokenizer_settings, weights_only=weights_only)
                    add(joined, file, tensor_rank, stage)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
                except (AttributeError, IndexError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}: is not laid out as Megatron-LM's are ({error!r})") from error
    assert joined is not None
    yield from remarks(joined)
    joined.tokenizer.save(Path(run_dir) / "tokenizer")
    write_run_file(joined.run)
    pieces = {name: whole(tensor) for name, tensor in joined.tensors.items()}
    written = save(run_dir, joined.iteration, pieces, joined.state, notes=notes_for(joined, files))
    yield f"wrote {written}"
    data = "" if joined.run.data.data_path else " --data-path PREFIX"
    start_anew = f" --save OTHER_DIR --load {run_dir} --finetune" if joined.moments is None else ""
    yield f"go on with: megalith pretrain {run_dir}/run.toml{data}{start_anew}"


def start(
    file: ForeignFile, files: Files, run_dir: str, tokenizer_settings: Mapping[str, str], *, weights_only: bool
) -> Joined:
    """What the first file says about all: settings, sizes, progress. Raises ValueError if that is not sound."""
    tree = file.tree
    arguments = tree["args"]
    chunks = sum(1 for key in tree if key.startswith("model"))
    if chunks != (arguments.get("virtual_pipeline_model_parallel_size") or 1):
        raise ValueError(f"it has {chunks} model chunks, its args another number")
    for name, found in {"tensor": files.tensor, "pipeline": files.stages}.items():
        if arguments.get(f"{name}_model_parallel_size", found) != found:
            raise ValueError(f"args/{name}_model_parallel_size is not {found}, which the directories' names say")
    run = run_of(arguments, run_dir, tokenizer_settings)
    tokenizer = required_tokenizer(run)
    table = tree[chunk_names(chunks)[0]]["language_model"]["embedding"]["word_embeddings"]["weight"]
    vocab_size = table.shape[0] * files.tensor
    if arguments.get("padded_vocab_size", vocab_size) != vocab_size:
        raise ValueError(
            f"args/padded_vocab_size is {arguments['padded_vocab_size']}, but the word tables have {vocab_size} rows"
        )
    run = padded_to(run, tokenizer.vocab_size, vocab_size)
    grid = Grid(
        **vars(shape_of(run.model)),
        vocab_size=vocab_size,
        tensor=files.tensor,
        stages=files.stages,
        chunks=chunks,
    )
    iteration = 0 if files.is_release else int(tree["iteration"])
    moments = None if weights_only else moments_of(run.optimizer)
    version = float(tree.get("checkpoint_version", 0))
    joined = Joined(run, grid, tokenizer, iteration, version, moments, {}, unknown_arguments(arguments))
    joined.state = state_for(joined, file)
    return joined


def run_of(arguments: Mapping[str, Any], run_dir: str, tokenizer_settings: Mapping[str, str]) -> Run:
    """The run that the arguments describe, saving into the run directory. ConfigError for values of wrong types."""
    known, values, faults = known_settings(), dict[str, Any](), list[Fault]()
    for name, value in arguments.items():
        if name not in known or name in OURS or name in OF_THE_START or value is None:
            continue
        values[name], fault = convert_setting(name, known[name], value)
        faults += [fault] if fault else []
    if faults:
        raise ConfigError(faults)
    # What the other program filled in stands beside what it was made from, which ours takes for a contradiction.
    drop = {"encoder_seq_length"} if "seq_length" in values else set()
    if "train_samples" in values:
        drop |= {"train_iters", "lr_decay_iters", "lr_warmup_iters"}
    width, heads = values.get("hidden_size", 0), values.get("num_attention_heads", 0)
    if values.get("ffn_hidden_size") == 4 * width:
        drop.add("ffn_hidden_size")
    if heads and values.get("kv_channels") == width // heads and width % heads == 0:
        drop.add("kv_channels")
    kept = {name: value for name, value in values.items() if name not in drop}
    return compose("gpt", {**kept, **tokenizer_settings, "save": run_dir})


def unknown_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """The arguments that no setting of ours takes over, beside those that follow from others."""
    return sorted(set(arguments) - set(known_settings()) - set(DERIVED))


def required_tokenizer(run: Run) -> Tokenizer:
    """The run's tokenizer; ValueError with a remedy where its files are not at hand."""
    try:
        return open_tokenizer(run)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"its tokenizer is needed: {error}. Name its files with --vocab-file and --merge-file, or its kind with "
            "--tokenizer-type and what that needs"
        ) from error


def padded_to(run: Run, size: int, padded: int) -> Run:
    """The run with a padding multiple that raises a vocabulary of that size to the padded one on any layout.

    Megatron-LM multiplies its multiple by the tensor-parallel size; ours pads alike everywhere.
    """
    if size > padded:
        raise ValueError(f"the word table has {padded} rows, but the tokenizer {size} tokens: it is another tokenizer")
    before = run.model.make_vocab_size_divisible_by
    fits = [step for step in (before, *(before * n for n in range(2, 129))) if -(-size // step) * step == padded]
    return replace(run, model=replace(run.model, make_vocab_size_divisible_by=(fits or [padded])[0]))


def state_for(joined: Joined, file: ForeignFile) -> dict[str, Any]:
    """Everything but tensors that a run of ours goes on from (see run_state.py), as JSON."""
    tree, fresh = file.tree, joined.moments is None
    consumed = consumed_samples(joined, tree["args"])
    schedule, samples = schedule_of(tree) if "lr_scheduler" in tree or not fresh else ({}, 0)
    updates = 0 if fresh else num_updates(file, joined.grid)
    counts = joined.run.optimizer.optimizer == "adam" and not fresh
    shape = shape_of(joined.run.model)
    return {
        "step": joined.iteration,
        "consumed_train_samples": consumed.train,
        "consumed_valid_samples": consumed.valid,
        "schedule_samples": samples,
        "skipped_steps": max(0, joined.iteration - updates) if counts else 0,
        "num_updates": updates,
        "loss_scale": None if fresh else loss_scale(file),
        "schedule": schedule,
        "model": {
            "task": joined.run.task,
            "num_layers": shape.num_layers,
            "hidden_size": shape.width,
            "num_attention_heads": shape.num_heads,
            "kv_channels": shape.head_width,
            "max_position_embeddings": shape.num_positions,
            "padded_vocab_size": joined.grid.vocab_size,
            "tokenizer": joined.tokenizer.digest,
        },
    }


def consumed_samples(joined: Joined, arguments: Mapping[str, Any]) -> SampleCounts:
    """What the other program had drawn of its data. The oldest versions do not count it."""
    train, valid = (arguments.get(f"consumed_{part}_samples") for part in ("train", "valid"))
    if train is not None or joined.iteration == 0:
        return SampleCounts(train=int(train or 0), valid=int(valid or 0), test=0)
    batch_size, evaluate = joined.run.optimizer.global_batch_size, joined.run.evaluate
    if batch_size is None:
        raise ValueError("its arguments have neither consumed_train_samples nor global_batch_size")
    return consumed_at(
        joined.iteration,
        global_batch_size=batch_size,
        eval_interval=evaluate.eval_interval,
        eval_iters=evaluate.eval_iters,
    )


def notes_for(joined: Joined, files: Files) -> dict[str, Any]:
    """What a checkpoint of ours keeps besides: nothing measured yet, and where this one comes from."""
    return {
        "interval": Interval(0.0, last_step=0, num_devices=1, peak_flops=None).state(0.0),
        "ledger": Ledger(clock=lambda: 0, calendar=time.time_ns).state(ended=True),
        "run": as_toml(joined.run),
        "megalith": __version__,
        "converted_from": str(files.folder),
        "checkpoint_version": joined.version,
    }


def num_updates(file: ForeignFile, grid: Grid) -> int:
    """How many steps the optimizer has taken. Raises ValueError if parameters differ in it."""
    found = update_counts(file.tree, grid, 0, 0)
    counts = {int(file.read(count) if isinstance(count, TensorRef) else count) for count in found}
    if len(counts) > 1:
        raise ValueError(f"optimizer/state: some parameters took part in {min(counts)} steps, others in {max(counts)}")
    return counts.pop() if counts else 0


def loss_scale(file: ForeignFile) -> dict[str, Any] | None:
    scaler = file.tree["optimizer"].get("grad_scaler") or {}
    return loss_scale_of(file.tree, float(file.read(scaler["scale"])) if "scale" in scaler else None)


def add(joined: Joined, file: ForeignFile, tensor_rank: int, stage: int) -> None:
    """Put the tensors of one more file where they belong. Raises ValueError, naming what is not as it must be."""
    check_same(joined, file.tree)
    qkv_width = joined.grid.head_width
    for found in tensors_in(file.tree, joined.grid, tensor_rank, stage, moments=joined.moments):
        read = file.read(found.tensor)
        if found.is_qkv:
            read = modern_qkv(read, joined.version, qkv_width)
        if found.name not in joined.tensors:
            joined.tensors[found.name] = torch.zeros(found.part.shape)
        target = joined.tensors[found.name][found.part.place.slices((0,) * len(found.part.shape))]
        if not found.part.is_copy:
            target.copy_(read)
        elif not torch.equal(target, read.float()):
            difference = float((target - read.float()).abs().max())
            joined.differing.append((f"{file.path}: {found.where}", difference))
    for moment in joined.moments or ():
        # An optimizer that has not taken a step has no moments: it starts from zeros.
        for name in [name for name in joined.tensors if name.startswith("weight.")]:
            moved = f"{moment}.{name.removeprefix('weight.')}"
            if moved not in joined.tensors:
                joined.tensors[moved] = torch.zeros_like(joined.tensors[name])


def check_same(joined: Joined, tree: Tree) -> None:
    """Raise ValueError if a file is of another checkpoint than the first."""
    version, iteration = float(tree.get("checkpoint_version", 0)), int(tree.get("iteration", 0))
    if version != joined.version:
        raise ValueError(f"checkpoint_version is {version}, but {joined.version} in the first file")
    if joined.iteration and iteration != joined.iteration:
        raise ValueError(f"iteration is {iteration}, but {joined.iteration} in the first file")


def remarks(joined: Joined) -> Iterator[str]:
    """What the user should know of the checkpoint."""
    if joined.differing:
        where, difference = max(joined.differing, key=lambda entry: entry[1])
        yield (
            f"note: {len(joined.differing)} copies differ from the first of their kind, by up to {difference:.3g} "
            f"({where}); the first was taken"
        )
    if joined.unknown:
        yield f"note: no setting here does what these of its arguments did: {', '.join(joined.unknown)}"
    if joined.moments is None:
        yield "note: weights only; optimizer, schedule and progress are left behind"
