"""ICT: two encoders that learn to find the block of text that a sentence was taken from, for retrieval."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megalith.check_layout import num_replicas
from megalith.config import Run
from megalith.data.block_maps import build_block_map
from megalith.data.index_cache import digest_of_lengths, load_or_build_sentence_map
from megalith.data.indexed import IndexedDataset, open_indexed
from megalith.data.inverse_cloze import ClozeBatches, title_bounds, title_lengths
from megalith.data.loader import BatchSource
from megalith.data.marked import Marks
from megalith.data.mock import MockRows
from megalith.data.survey import Survey
from megalith.data.tokenizer import Tokenizer
from megalith.data_sets import data_sets
from megalith.datasets import SPOKEN, Report, identify_token_files, no_documents, open_corpus
from megalith.derived import sequence_length
from megalith.launch import ranks_in
from megalith.models.retrieval import Retriever, num_candidates
from megalith.models.shape import shape_of
from megalith.parallel.apply import BuildPart
from megalith.parallel.step import Batch
from megalith.sentence_datasets import tell_map, use_of
from megalith.task import Baseline, Fit, Origin, Task, made_up, stack_flops
from megalith.turns import in_turns

MARKS_AROUND = 3  # [CLS] and two [SEP] beside title and block


def build_part(run: Run, vocab_size: int, dtype: torch.dtype, *, report_rank: bool = False) -> BuildPart:
    """What builds the bi-encoder, without weights yet."""

    def build(*, layers: range, first: bool, last: bool) -> Retriever:
        return Retriever(
            run.model,
            vocab_size,
            dtype=dtype,
            scaled=run.evaluate.retriever_score_scaling,
            report=run.evaluate.retriever_report_topk_accuracies,
            report_rank=report_rank,
            device="meta",
        )

    return build


def build_parts(
    run: Run,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    targets: Mapping[str, int],
    report: Report,
    moved: Callable[[], None],
) -> dict[str, ClozeBatches]:
    """The samples of every part that is asked for some and has documents.

    Raises ValueError naming the file for data that is missing, damaged or does not fit.
    """
    return in_turns(partial(_cloze_parts, run, tokenizer, vocab_size, targets, report), moved=moved)


def _cloze_parts(
    run: Run, tokenizer: Tokenizer, vocab_size: int, targets: Mapping[str, int], report: Report, survey: Survey
) -> dict[str, ClozeBatches]:
    assert run.data.data_path is not None and run.data.titles_data_path is not None, "check_ict.py saw to it"
    corpus = open_corpus(run.data.data_path[0], next(data_sets(run)), run, survey, report, sentences=True)
    sentences, documents = corpus.indexed, corpus.parts
    titles = open_indexed(run.data.titles_data_path, run.data.data_impl, survey=survey)
    lengths = title_lengths(titles, title_bounds(sentences, titles))
    for name, num_samples in targets.items():
        if num_samples and not documents[name]:
            no_documents(name, corpus.sets, report)
    marks = Marks.of(tokenizer, sequence_length(run))
    return {
        name: ClozeBatches(
            sentences,
            titles,
            _map_of(run, name, sentences, titles.prefix, lengths, documents[name], num_samples, report, survey),
            marks=marks,
            kept_share=run.data.query_in_block_prob,
            seed=run.train.seed,
            vocab_size=vocab_size,
        )
        for name, num_samples in targets.items()
        if num_samples and documents[name]
    }


def _map_of(
    run: Run,
    name: str,
    sentences: IndexedDataset,
    titles: Path,
    lengths_of_titles: NDArray[np.int32],
    documents: range,
    num_samples: int,
    report: Report,
    survey: Survey,
) -> NDArray[Any]:
    """The block map of a part, from its file beside the data or built and kept there."""
    length, seed = sequence_length(run), run.train.seed
    places = range(documents.start, documents.stop + 1)
    bounds = sentences.document_index[places.start : places.stop]
    items = range(int(bounds[0]), int(bounds[-1]))
    of_titles = lengths_of_titles[documents.start : documents.stop]
    least = 1 if run.data.use_one_sent_docs else 2
    one = "_1sentok" if run.data.use_one_sent_docs else ""

    def build() -> Iterator[tuple[str, NDArray[Any]]]:
        try:
            rows = build_block_map(
                bounds,
                sentences.lengths,
                of_titles,
                num_samples=num_samples,
                longest=length - MARKS_AROUND,
                least=least,
                seed=seed,
                first_document=documents.start,
                moved=survey.moved,
            )
        except ValueError as error:
            raise ValueError(f"{sentences.prefix}, {SPOKEN[name]} part: {error}") from error
        yield "map", rows

    made_from = {
        "kind": "blocks",
        "documents": [documents.start, documents.stop],
        "bounds_sha256": digest_of_lengths(sentences.prefix, "documents", places, sentences.document_index, survey),
        "lengths_sha256": digest_of_lengths(sentences.prefix, "lengths", items, sentences.lengths, survey),
        "titles_sha256": digest_of_lengths(titles, "titles", documents, lengths_of_titles, survey),
        "num_samples": num_samples,
        "sequence_length": length,
        "least": least,
        "seed": seed,
    }
    file = f"{name}_indexmap_{num_samples}mns_{length}msl_{seed}s{one}"
    rows, path, kept = load_or_build_sentence_map(
        sentences.prefix, file, made_from, build, cache_path=run.data.data_cache_path, survey=survey
    )
    use = use_of(sentences, documents, least, survey)
    tell_map(SPOKEN[name], path, kept.seconds["load"], len(rows), use, sentences, report)
    return rows


def identify_data(run: Run, tokenizer: Tokenizer, *, vocab_size: int, report: Report) -> list[dict[str, Any]]:
    """What tells the sentences and the titles from other token files."""
    assert run.data.data_path is not None and run.data.titles_data_path is not None, "check_ict.py saw to it"
    both = ("1", run.data.data_path[0], "1", run.data.titles_data_path)
    files = dataclasses.replace(run, data=dataclasses.replace(run.data, data_path=both))
    return identify_token_files(files, tokenizer, vocab_size=vocab_size, report=report)


class MockPairs:
    """Made-up queries and contexts of full length, for measuring; the same for the same seed, anywhere."""

    def __init__(self, num_samples: int, *, length: int, contexts: int, vocab_size: int, seed: int) -> None:
        self.length, self.contexts = length, contexts
        self._rows = MockRows(
            num_samples, sequence_length=length * (1 + contexts) - 1, vocab_size=vocab_size, seed=seed
        )

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: NDArray[np.int64], samples: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        rows = self._rows.batch(indices)
        contexts = rows[:, self.length :].reshape(len(rows), self.contexts, self.length)
        return {
            "queries": rows[:, : self.length].copy(),
            "queries_real": np.ones((len(rows), self.length), np.int64),
            "contexts": contexts.copy(),
            "contexts_real": np.ones_like(contexts),
            "loss_mask": np.ones(len(rows), np.float32),
            "samples": np.asarray(samples, np.int64),
        }


def build_mock(run: Run, vocab_size: int, targets: Mapping[str, int]) -> dict[str, MockPairs]:
    """Made-up samples of every part that is asked for some; each part has samples of its own."""
    size = run.data.vocab_size or vocab_size

    def make(num_samples: int, seed: int) -> MockPairs:
        return MockPairs(num_samples, length=sequence_length(run), contexts=1, vocab_size=size, seed=seed)

    return made_up(run, targets, make)


def run_part(part: nn.Module, entering: Tensor, batch: Batch) -> Tensor:
    """The loss, and the figures that are logged beside it."""
    leaving: Tensor = part(
        entering,
        batch["contexts"],
        queries_real=batch["queries_real"],
        contexts_real=batch["contexts_real"],
        loss_weights=batch["loss_mask"],
        rows=batch.get("rows"),
    )
    return leaving


def losses(run: Run) -> tuple[str, ...]:
    """The loss, and an accuracy for each k asked for."""
    return ("loss", *(f"top{k}_acc" for k in run.evaluate.retriever_report_topk_accuracies))


def step_flops(run: Run, vocab_size: int, batch: int, *, length: int | None = None, contexts: int = 1) -> float:
    """Operations of a step, by Megatron's convention; those of the scores depend on the replicas and are left out."""
    shape = shape_of(run.model)
    one_text = stack_flops(run, batch, length=sequence_length(run) if length is None else length)
    projection = 6.0 * batch * shape.width * run.model.biencoder_projection_dim
    return (1 + contexts) * (one_text + projection)


def chance_baseline(run: Run, source: BatchSource, *, contexts: float = 1) -> Baseline:
    """What guessing among all passages of a microbatch costs. contexts: passages of a question, on average."""
    replicas = num_replicas(run, ranks_in(os.environ)[1]) or 1
    count = num_candidates(run.optimizer.micro_batch_size or 1, replicas, contexts)
    meaning = f"the loss of guessing among the {count} passages of a microbatch"
    return Baseline("loss", math.log(count), "chance", meaning)


def origin(run: Run) -> Origin | None:
    """The BERT whose encoder both towers begin with, if one is named."""
    if run.checkpoint.bert_load is None:
        return None
    return Origin("--bert-load", run.checkpoint.bert_load, "bert", _parameter_of_bert)


def _parameter_of_bert(name: str) -> str | None:
    # towers.query.encoder.layers.0...; a projection is drawn.
    _, _, part, rest = name.split(".", 3)
    return rest if part == "encoder" else None


def identity(run: Run) -> dict[str, Any]:
    """What the weights depend on beside the sizes of the transformer."""
    return {
        "norm_after_residual": run.model.norm_after_residual,
        "biencoder_projection_dim": run.model.biencoder_projection_dim,
        "biencoder_shared_query_context_model": run.model.biencoder_shared_query_context_model,
    }


# From one bi-encoder's task to another's.
FIT = Fit(may_differ=("task",), begins_anew=lambda name: False)

TASK = Task(
    title="ICT",
    build_part=build_part,
    build_parts=build_parts,
    run_part=run_part,
    losses=losses,
    masks=lambda run: ("loss_mask",) * len(losses(run)),
    num_places=lambda run: 2 * sequence_length(run),
    step_flops=step_flops,
    build_mock=build_mock,
    entering="queries",
    is_tied=lambda run: False,
    contrasts=True,
    baseline=chance_baseline,
    identity=identity,
    identify_data=identify_data,
    origin=origin,
    fit=FIT,
    next_commands=(
        ("index", "megalith index {save} --evidence-data-path TSV --embedding-path FILE"),
        ("search", "megalith evaluate {save} --qa-data-dev TSV --evidence-data-path TSV --embedding-path FILE"),
    ),
)
