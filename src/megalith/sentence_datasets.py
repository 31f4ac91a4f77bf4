"""The parts of a run's data for tasks that read sentences: opened, split, mapped and blended as its settings say."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.config import Run
from megalith.data.causal import SampleRows
from megalith.data.index_cache import digest_of_lengths, load_or_build_sentence_map
from megalith.data.indexed import IndexedDataset, idx_path
from megalith.data.sentence_maps import (
    LONGEST_SENTENCE,
    DocumentUse,
    SentencePlan,
    build_sentence_map,
    document_use,
)
from megalith.data.sentence_rows import SentenceRows
from megalith.data.survey import Survey
from megalith.datasets import SPOKEN, Corpus, Report, build_parts
from megalith.monitor.events import SentenceMapLoaded, Warned
from megalith.turns import in_turns

MOST_USED = 0.9  # the share of the documents below which it is said why


def build_sentence_rows(
    run: Run,
    *,
    longest: int,
    least: int,
    vocab_size: int,
    make_rows: Callable[[SentenceRows], SampleRows],
    targets: Mapping[str, int],
    report: Report,
    moved: Callable[[], None],
) -> dict[str, SampleRows]:
    """The samples of every part that is asked for some and has documents, as rows of numbers; every rank calls it.

    longest: tokens of a sample, special ones apart; least: sentences that it needs. vocab_size: ids that the model has.
    make_rows: what makes a task's samples of sentences. targets: samples wanted of each of train, valid and test.
    moved: called as it gets on. Raises ValueError naming the file for data that is missing, damaged or does not fit the
    vocabulary.
    """
    plan = SentencePlan(longest, least, run.data.short_seq_prob, run.train.seed)

    def build(survey: Survey) -> dict[str, SampleRows]:
        def rows_of(corpus: Corpus, name: str, num_samples: int) -> SampleRows:
            return make_rows(_sentences(corpus, name, num_samples, plan, run, vocab_size, survey, report))

        return build_parts(run, targets, survey, report, rows_of, sentences=True)

    return in_turns(build, moved=moved)


def _sentences(
    corpus: Corpus,
    name: str,
    num_samples: int,
    plan: SentencePlan,
    run: Run,
    vocab_size: int,
    survey: Survey,
    report: Report,
) -> SentenceRows:
    """The sentences of a part's samples, by a map that is built once and kept."""
    indexed, documents = corpus.indexed, corpus.parts[name]
    places = range(documents.start, documents.stop + 1)
    document_index = indexed.document_index[places.start : places.stop]
    items = range(int(document_index[0]), int(document_index[-1]))
    made_from = {
        "documents": [documents.start, documents.stop],
        "document_index_sha256": digest_of_lengths(indexed.prefix, "documents", places, indexed.document_index, survey),
        "lengths_sha256": digest_of_lengths(indexed.prefix, "lengths", items, indexed.lengths, survey),
        "num_samples": num_samples,
        "longest": plan.longest,
        "least": plan.least,
        "short_share": plan.short_share,
        "seed": plan.seed,
    }

    def build() -> Iterator[tuple[str, NDArray[Any]]]:
        try:
            rows = build_sentence_map(
                document_index, indexed.lengths, num_samples=num_samples, plan=plan, moved=survey.moved
            )
        except ValueError as error:
            raise ValueError(f"{indexed.prefix}, {SPOKEN[name]} part: {error}") from error
        yield "map", rows

    rows, path, kept = load_or_build_sentence_map(
        indexed.prefix,
        f"{name}_indexmap_{num_samples}mns_{plan.longest}msl_{plan.short_share:.2f}ssp_{plan.seed}s",
        made_from,
        build,
        cache_path=run.data.data_cache_path,
        survey=survey,
    )
    use = use_of(indexed, documents, plan.least, survey)
    tell_map(SPOKEN[name], path, kept.seconds["load"], len(rows), use, indexed, report)
    if plan.least == 1:
        _tell_what_is_cut(SPOKEN[name], indexed, documents, plan.longest, survey, report)
    return SentenceRows(indexed, rows, seed=plan.seed, vocab_size=vocab_size)


def _tell_what_is_cut(
    part: str, indexed: IndexedDataset, documents: range, longest: int, survey: Survey, report: Report
) -> None:
    """Warn where many documents are one sentence of more tokens than a sample takes, as without --split-sentences."""

    def look() -> int:
        bounds = indexed.document_index[documents.start : documents.stop + 1]
        return int((indexed.lengths[bounds[:-1][np.diff(bounds) == 1]] > longest).sum())

    what = f"documents {documents.start} to {documents.stop} of one sentence of more than {longest} tokens"
    count = survey.find(what, look, idx_path(indexed.prefix))
    if count > (1 - MOST_USED) * len(documents):
        report(
            Warned(
                f"{indexed.prefix}, {part} part: {count:,} of {len(documents):,} documents are one sentence of more "
                f"than {longest} tokens, whose rest is left out; prepare the text with --split-sentences"
            )
        )


def use_of(indexed: IndexedDataset, documents: range, least: int, survey: Survey) -> DocumentUse:
    """What becomes of a part's documents where a sample needs at least so many sentences."""

    def look() -> list[int]:
        use = document_use(indexed.document_index[documents.start : documents.stop + 1], indexed.lengths, least)
        return [use.used, use.short, use.spoilt]

    what = f"use of documents {documents.start} to {documents.stop} for {least} sentences"
    return DocumentUse(*survey.find(what, look, idx_path(indexed.prefix)))


def tell_map(
    part: str, path: Path, seconds: float, num_samples: int, use: DocumentUse, indexed: IndexedDataset, report: Report
) -> None:
    """Say what a map of sentences is, and warn where samples are made of much less than all documents."""
    report(SentenceMapLoaded(part, str(path), seconds, num_samples, use.used, use.total))
    if use.used < MOST_USED * use.total:
        report(
            Warned(
                f"{indexed.prefix}, {part} part: samples are made of {use.used:,} of {use.total:,} documents; "
                f"{use.spoilt:,} hold a sentence of more than {LONGEST_SENTENCE} tokens, {use.short:,} have too few "
                "sentences"
            )
        )
