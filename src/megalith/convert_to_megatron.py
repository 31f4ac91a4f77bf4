"""The newest checkpoint of a run directory as files that Megatron-LM loads, cut for as many ranks as it will have."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megalith.checkpoint.megatron import FILE_NAME, TRACKER, Grid, iteration_name, rank_name
from megalith.checkpoint.megatron_contents import Kept, file_contents
from megalith.config import Run, flag_of
from megalith.data.tokenizer import padded_vocab_size
from megalith.derived import compute_dtype, reference_arguments
from megalith.files import make_directories, open_whole, write_whole
from megalith.models.shape import options_of, shape_of
from megalith.optim.schedule import LATER_STYLES
from megalith.parallel.mesh import Layout
from megalith.trained import load_tensors, refuse_another_tokenizer, run_of, tokenizer_of

# The kinds of tokenizers that Megatron-LM has.
TOKENIZERS = ("GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase")


def to_megatron(
    run_dir: str, directory: str, *, step: int | None, tensor: int, stages: int, layers_per_chunk: int | None
) -> Iterator[str]:
    """Write a checkpoint as Megatron-LM's files for tensor x stages ranks, and say what was done.

    step: which checkpoint; None for the newest that verifies. layers_per_chunk: for the interleaved pipeline; None for
    one chunk a stage. The tracker file is written last. Memory: all that the checkpoint holds, and one file.

    Raises ValueError if there is none, if Megatron-LM has no such model, or cannot cut it like that.
    """
    run = gpt_of(run_dir)
    tensors, loaded = load_tensors(run_dir, step=step)
    yield from (f"warning: {message}" for message in loaded.messages(goes_on=False))
    grid = grid_of(run, int(loaded.index.state["model"]["padded_vocab_size"]), tensor, stages, layers_per_chunk)
    tokenizer = tokenizer_of(run_dir, run)
    refuse_another_tokenizer(run_dir, loaded.index, tokenizer)
    run = cut_like(run, grid, tokenizer.vocab_size)
    dtype: torch.dtype = getattr(torch, compute_dtype(run))
    kept = Kept(tensors, loaded.index.state, run.optimizer, dtype, run.train.seed)
    folder = Path(directory) / iteration_name(loaded.index.step)
    if folder.exists():
        raise ValueError(f"{folder}: exists already. Choose another directory, or move it away.")
    for tensor_rank, stage in grid.files:
        place = folder / rank_name(tensor_rank, stage, stages=grid.stages)
        make_directories(place)
        contents = file_contents(kept, arguments_for(run, kept, grid, tensor_rank, stage), grid, tensor_rank, stage)
        with open_whole(place / FILE_NAME) as file:
            torch.save(contents, file)
        yield f"wrote {place / FILE_NAME}"
    write_whole(Path(directory) / TRACKER, str(loaded.index.step))
    if kept.moments is None:
        yield "note: the checkpoint holds no optimizer state: load it with --finetune or --no-load-optim"
    if tokenizer.name not in TOKENIZERS:
        yield f"note: Megatron-LM has no {tokenizer.name}; it knows {', '.join(TOKENIZERS)}"
    if run.optimizer.lr_decay_style in LATER_STYLES:
        style = run.optimizer.lr_decay_style
        yield f"note: Megatron-LM of 2021 has no --lr-decay-style {style}: load it with --override-lr-scheduler"
    if run.optimizer.lr_warmup_init:
        yield "note: Megatron-LM of 2021 has no --lr-warmup-init: its warm-up begins at 0"
    if grid.chunks > 1 and grid.stages <= 2:
        yield f"note: Megatron-LM of 2021 interleaves more than two stages, not {grid.stages}; later versions may"
    yield f"its tokenizer: {Path(run_dir) / 'tokenizer'}"
    per_chunk = run.parallel.num_layers_per_virtual_pipeline_stage
    interleaved = "" if per_chunk is None else f"--num-layers-per-virtual-pipeline-stage {per_chunk} "
    yield (
        f"start Megatron-LM with --load {directory} --tensor-model-parallel-size {grid.tensor} "
        f"--pipeline-model-parallel-size {grid.stages} {interleaved}"
        f"--make-vocab-size-divisible-by {run.model.make_vocab_size_divisible_by}"
    )


def gpt_of(run_dir: str) -> Run:
    """The run of a run directory; ValueError if there is none or Megatron-LM has no such model."""
    run = run_of(run_dir)
    if run.task != "gpt":
        raise ValueError(f"{run_dir}: holds a {run.task} model; only a gpt can be converted.")
    if run.model.untie_embeddings_and_output_weights:
        raise ValueError(f"{run_dir}: has --untie-embeddings-and-output-weights, which Megatron-LM does not have.")
    if options := options_of(run.model):
        given = ", ".join(map(flag_of, options))
        raise ValueError(
            f"{run_dir}: has {given}, which Megatron-LM of the version that these files are of does not have."
        )
    return run


def grid_of(run: Run, vocab_size: int, tensor: int, stages: int, layers_per_chunk: int | None) -> Grid:
    """How the files share out the run's model; ValueError if they cannot."""
    shape = shape_of(run.model)
    per_stage = shape.num_layers // stages if stages > 0 else 0
    if layers_per_chunk is not None and (layers_per_chunk < 1 or per_stage % layers_per_chunk):
        raise ValueError(
            f"--num-layers-per-virtual-pipeline-stage = {layers_per_chunk}: must divide a stage's {per_stage} layers"
        )
    return Grid(
        **vars(shape),
        vocab_size=vocab_size,
        tensor=tensor,
        stages=stages,
        chunks=1 if layers_per_chunk is None else per_stage // layers_per_chunk,
    )


def cut_like(run: Run, grid: Grid, vocab_size: int) -> Run:
    """The run on the grid's layout, with a padding multiple from which Megatron-LM makes the same padded vocabulary.

    vocab_size: of the tokenizer. Megatron-LM raises it to a multiple of the setting times the tensor-parallel size.
    """
    step = run.model.make_vocab_size_divisible_by
    fits = [n for n in (step // grid.tensor, step) if n and _pads(vocab_size, n, grid)]
    return replace(
        run,
        model=replace(
            run.model, make_vocab_size_divisible_by=fits[0] if fits else max(1, grid.vocab_size // grid.tensor)
        ),
        parallel=replace(
            run.parallel,
            tensor_model_parallel_size=grid.tensor,
            pipeline_model_parallel_size=grid.stages,
            num_layers_per_virtual_pipeline_stage=(
                None if grid.chunks == 1 else grid.num_layers // grid.stages // grid.chunks
            ),
            context_parallel_size=1,
        ),
    )


def _pads(vocab_size: int, multiple: int, grid: Grid) -> bool:
    return padded_vocab_size(vocab_size, multiple, grid.tensor) == grid.vocab_size


def arguments_for(run: Run, kept: Kept, grid: Grid, tensor_rank: int, stage: int) -> dict[str, Any]:
    """Megatron-LM's arguments of the process that would have written a file."""
    rank = stage * grid.tensor + tensor_rank
    layout = Layout(grid.tensor * grid.stages, rank, rank, tensor=grid.tensor, pipeline=grid.stages)
    evaluates = int(run.evaluate.eval_iters > 0)
    return {
        **reference_arguments(run, layout),
        "rank": rank,
        "params_dtype": kept.dtype,
        "consumed_train_samples": kept.state["consumed_train_samples"],
        "consumed_valid_samples": kept.state["consumed_valid_samples"],
        "padded_vocab_size": grid.vocab_size,
        "iteration": kept.state["step"],
        "do_train": 1,
        "do_valid": evaluates,
        "do_test": evaluates,
    }
