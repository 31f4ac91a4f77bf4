"""A checked run of a GPT in numbers, from which its forecasts are made."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from megalith.config import Run, flag_of
from megalith.data.tokenizer import load_saved_tokenizer, padded_vocab_size
from megalith.datasets import open_tokenizer
from megalith.derived import (
    compute_dtype,
    global_batch_size,
    recompute_granularity,
    sequence_length,
)
from megalith.job import MOCK_VOCABULARY
from megalith.models.shape import activation_of, key_heads, normalization_of, rotary_width, shape_of
from megalith.parallel.apply import num_chunks, schedule_of
from megalith.parallel.mesh import Layout
from megalith.plan.job import Job


class Vocabulary(NamedTuple):
    """Tokens of a tokenizer, and by what that is known."""

    size: int
    known_by: str


def vocabulary_of(run: Run) -> Vocabulary:
    """The vocabulary that a run would have, as far as its settings and files tell; else GPT-2's."""
    data = run.data
    if data.vocab_size is not None:
        return Vocabulary(data.vocab_size, flag_of("vocab_size"))
    if (kept := kept_tokenizer(run)) is not None:
        return Vocabulary(load_saved_tokenizer(kept).vocab_size, str(kept))
    if data.corpus is not None:
        extra = data.vocab_extra_ids if run.task == "t5" else 0
        return Vocabulary(data.corpus_vocab_size + extra, flag_of("corpus_vocab_size"))
    if data.tokenizer_type == "ByteLevelTokenizer" or data.vocab_file or data.tokenizer_model:
        tokenizer = open_tokenizer(run)
        return Vocabulary(tokenizer.vocab_size, tokenizer.name)
    return Vocabulary(MOCK_VOCABULARY, f"GPT-2's, for no tokenizer is named; {flag_of('vocab_size')} gives another")


def kept_tokenizer(run: Run) -> Path | None:
    """Where the tokenizer lies that the run directory keeps, if there is one."""
    kept = None if run.checkpoint.save is None else Path(run.checkpoint.save) / "tokenizer"
    return kept if kept is not None and kept.is_dir() else None


def padded_vocabulary(run: Run) -> int:
    """Rows of the table of a run."""
    return padded_vocab_size(vocabulary_of(run).size, run.model.make_vocab_size_divisible_by, 1)


def planned(run: Run, ranks: int, *, vocab_size: int, device: str) -> Job:
    """The sizes of a checked run of a GPT, on so many ranks; device: cuda or cpu."""
    shape, parallel = shape_of(run.model), run.parallel
    layout = Layout(
        ranks,
        0,
        0,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    assert run.optimizer.micro_batch_size is not None, "check.py saw to it"
    element = 4 if compute_dtype(run) == "float32" else 2
    return Job(
        num_layers=shape.num_layers,
        width=shape.width,
        num_heads=shape.num_heads,
        head_width=shape.head_width,
        inner=shape.inner,
        vocab_size=vocab_size,
        num_positions=0 if rotary_width(run.model) else shape.num_positions,
        num_groups=key_heads(run.model),
        rotary=rotary_width(run.model),
        sequence_length=sequence_length(run),
        micro_batch_size=run.optimizer.micro_batch_size,
        num_microbatches=global_batch_size(run, layout.data) // (run.optimizer.micro_batch_size * layout.data),
        compute_bytes=element,
        bf16=compute_dtype(run) == "bfloat16",
        fp8=parallel.fp8_format is not None,
        stream_bytes=4 if run.model.fp32_residual_connection else element,
        dropout=run.model.hidden_dropout > 0,
        attention_dropout=run.model.attention_dropout > 0,
        recompute=recompute_granularity(run),
        recompute_every=parallel.checkpoint_num_layers,
        cuts_kept=parallel.distribute_checkpointed_activations,
        optimizer=run.optimizer.optimizer,
        moments=run.optimizer.optimizer_state_dtype,
        tied=not run.model.untie_embeddings_and_output_weights,
        biases=run.model.add_bias_linear,
        qkv_biases=run.model.add_bias_linear or run.model.add_qkv_bias,
        norms_of_heads=run.model.qk_layernorm,
        activation=activation_of(run.model),
        normalization=normalization_of(run.model),
        # auto compiles on a GPU where the run is long, and what is planned is.
        compiled=device == "cuda" and parallel.compile != "off",
        tensor=layout.tensor,
        sequence_parallel=parallel.sequence_parallel,
        pipeline=layout.pipeline,
        parts=num_chunks(parallel, shape.num_layers),
        schedule=schedule_of(parallel),
        context=layout.context,
        context_exchange=parallel.context_exchange,
        data=layout.data,
        sharding=parallel.data_parallel_sharding,
        shard_size=parallel.data_parallel_shard_size,
        device=device,
    )


def without_layout(run: Run) -> Run:
    """The run as one rank would have it, a sequence at a time: what is wrong with it is not its layout."""
    parallel = dataclasses.replace(
        run.parallel,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        num_layers_per_virtual_pipeline_stage=None,
        pipeline_schedule=None,
        sequence_parallel=False,
        data_parallel_shard_size=None,
        data_parallel_sharding="none",
    )
    return dataclasses.replace(run, parallel=parallel, optimizer=dataclasses.replace(run.optimizer, micro_batch_size=1))
