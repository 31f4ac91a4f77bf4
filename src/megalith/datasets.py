"""The three parts of a run's data, opened, split, mapped and blended as its settings say."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megalith.config import Run
from megalith.data.blend import BlendedDataset, normalize, parse_data_path, samples_of_each
from megalith.data.causal import CausalBatches, CausalDataset, SampleRows
from megalith.data.index_cache import IndexMapsReport, load_or_build_blend, load_or_build_index_maps, tokens_of
from megalith.data.index_maps import plan_epochs
from megalith.data.indexed import IndexedDataset, find_prefix, open_indexed
from megalith.data.record import check_tokenizer, identify, read_record
from megalith.data.split import PARTS, parse_split, split_documents
from megalith.data.survey import Survey
from megalith.data.tokenizer import Tokenizer, load_tokenizer
from megalith.data_sets import DataSets, data_sets
from megalith.derived import sequence_length, tokenizer_type
from megalith.monitor.events import (
    BlendBuilt,
    CorpusOpened,
    CorpusPart,
    CorpusSplit,
    Event,
    MapsBuilt,
    MapsLoaded,
    Warned,
)
from megalith.notices import repeated_warning
from megalith.turns import in_turns

# The parts' names as a log spells them.
SPOKEN = {"train": "train", "valid": "validation", "test": "test"}

Report = Callable[[Event], None]


@dataclass(frozen=True)
class Corpus:
    """One token file, how it is split, and the data sets that it is one of."""

    indexed: IndexedDataset
    parts: Mapping[str, range]
    sets: DataSets


def open_tokenizer(run: Run) -> Tokenizer:
    """The tokenizer of the run's data."""
    data = run.data
    return load_tokenizer(
        tokenizer_type(run),
        vocab_file=data.vocab_file,
        merge_file=data.merge_file,
        tokenizer_model=data.tokenizer_model,
        vocab_extra_ids=data.vocab_extra_ids,
    )


def identify_token_files(run: Run, tokenizer: Tokenizer, *, vocab_size: int, report: Report) -> list[dict[str, Any]]:
    """What tells each token file from others, its weight, and the part that it alone serves, if it does; held against
    what preprocessing recorded of it.

    vocab_size: ids that the model has. Raises ValueError naming the file for one that is missing, was changed, has
    tokens that the model lacks, or was made with another tokenizer (a warning with --allow-changed-data).
    """

    def identify_one(sets: DataSets, given: str, weight: float, survey: Survey) -> dict[str, Any]:
        prefix = find_prefix(given)
        record = read_record(prefix)
        identity = {**identify(prefix, record, vocab_size=vocab_size, survey=survey), "weight": weight}
        if record is not None:
            try:
                check_tokenizer(prefix, record, tokenizer.digests)
            except ValueError as error:
                if not run.checkpoint.allow_changed_data:
                    raise ValueError(f"{error}; or give --allow-changed-data if both give the same tokens") from error
                report(Warned(f"--allow-changed-data: {error}"))
        return identity if sets.own is None else {**identity, "part": sets.own}

    def identify_all(survey: Survey) -> list[dict[str, Any]]:
        return [
            identify_one(sets, given, weight, survey)
            for sets in data_sets(run)
            for given, weight in zip(*parse_data_path(sets.data_path), strict=True)
        ]

    return in_turns(identify_all)


def identify_training_files(run: Run, tokenizer: Tokenizer, *, vocab_size: int, report: Report) -> list[dict[str, Any]]:
    """What tells each file of --train-data from others, for tasks that read such files instead of token files."""

    def identify_all(survey: Survey) -> list[dict[str, Any]]:
        files = [(path.name, survey.digest(path)) for path in map(Path, run.data.train_data or ())]
        return [{"name": name, "bin_size": written.size, "bin_sha256": written.digest} for name, written in files]

    return in_turns(identify_all)


def open_corpus(
    prefix: str, sets: DataSets, run: Run, survey: Survey, report: Report, *, sentences: bool = False
) -> Corpus:
    """Open a token file, one of sets, and split its documents. sentences: a document has an item for each; else it is
    an item.
    """
    started = time.perf_counter()
    indexed = open_indexed(prefix, run.data.data_impl, merged=not sentences, survey=survey)
    if indexed.document_index[-1] < indexed.num_items:
        text = "the document index ends early, as Megatron-LM's merge leaves it: each item counts as a document"
        report(Warned(f"{prefix}: {text}."))
    if run.data.mmap_warmup:
        indexed.warm_up()
    seconds = time.perf_counter() - started
    num_sentences = indexed.num_items if sentences else None
    report(
        CorpusOpened(
            indexed.num_documents if sentences else indexed.num_items, seconds, run.data.mmap_warmup, num_sentences
        )
    )
    parts = split_documents(sets.split, indexed.num_documents if sentences else indexed.num_items)
    index = indexed.document_index
    report(
        CorpusSplit(
            tuple(
                CorpusPart(
                    SPOKEN[name],
                    part.start,
                    part.stop,
                    (int(index[part.start]), int(index[part.stop])) if sentences else None,
                )
                for name, part in parts.items()
            )
        )
    )
    return Corpus(indexed, parts, sets)


def build_causal_parts(
    run: Run,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    targets: Mapping[str, int],
    report: Report,
    moved: Callable[[], None],
) -> dict[str, CausalBatches]:
    """The batches of every part that is asked for samples and has documents; every rank calls it.

    vocab_size: ids that the model has. targets: samples wanted of each of train, valid and test. moved: called as it
    gets on. Raises ValueError naming the file for data that is missing, damaged or does not fit the vocabulary.
    """
    return in_turns(partial(_causal_parts, run, tokenizer, vocab_size, targets, report), moved=moved)


def _causal_parts(
    run: Run, tokenizer: Tokenizer, vocab_size: int, targets: Mapping[str, int], report: Report, survey: Survey
) -> dict[str, CausalBatches]:
    def rows_of(corpus: Corpus, name: str, num_samples: int) -> CausalDataset:
        return _rows(corpus, name, num_samples, run, vocab_size, survey, report)

    parts = build_parts(run, targets, survey, report, rows_of)
    return {
        name: CausalBatches(
            rows,
            eod=_eod(run, tokenizer),
            reset_position_ids=run.data.reset_position_ids,
            reset_attention_mask=run.data.reset_attention_mask,
            eod_mask_loss=run.data.eod_mask_loss,
        )
        for name, rows in parts.items()
    }


def build_parts(
    run: Run,
    targets: Mapping[str, int],
    survey: Survey,
    report: Report,
    rows_of: Callable[[Corpus, str, int], SampleRows],
    *,
    sentences: bool = False,
) -> dict[str, SampleRows]:
    """The samples of every part that is asked for some and has documents, blended.

    rows_of: the samples of a corpus for a part, so many.
    """
    parts: dict[str, SampleRows] = {}
    for sets in data_sets(run):
        prefixes, weights = parse_data_path(sets.data_path)
        corpora = [open_corpus(prefix, sets, run, survey, report, sentences=sentences) for prefix in prefixes]
        for name in sets.parts:
            wanted = samples_wanted(sets, corpora, weights, name, targets[name], report)
            rows = [
                rows_of(corpus, name, num_samples) if corpus.parts[name] and num_samples else None
                for corpus, num_samples in zip(corpora, wanted, strict=True)
            ]
            if any(row is not None for row in rows):
                parts[name] = blend_rows(rows, weights, corpora, run, survey, report)
            elif targets[name]:
                no_documents(name, sets, report)
    return parts


def samples_wanted(
    sets: DataSets, corpora: Sequence[Corpus], weights: Sequence[float], name: str, target: int, report: Report
) -> list[int]:
    """How many samples of a part each data set is asked for; one without documents leaves its share to the others.

    Where a weight is given it is a blend, even of one (spec 5.5).
    """
    if len(sets.data_path) == 1:
        return [target]
    has_some = [bool(corpus.parts[name]) for corpus in corpora]
    shares = [weight if has else 0.0 for weight, has in zip(weights, has_some, strict=True)]
    if not any(shares):
        return [0] * len(shares)
    for corpus, weight, has in zip(corpora, weights, has_some, strict=True):
        if target and weight and not has:
            prefix = corpus.indexed.prefix
            report(Warned(f"{prefix} has no document for {SPOKEN[name]}: the other data sets take its share."))
    return samples_of_each(shares if all(has_some) else normalize(shares), target)


def no_documents(name: str, sets: DataSets, report: Report) -> None:
    """Refuse a training without documents, and a part's own data sets; warn of another part that was to have some."""
    if name == "train":
        raise ValueError(f"{sets.said}: leaves no document for training. Give the first share more.")
    if sets.own is not None:
        raise ValueError(f"{sets.said} {' '.join(sets.data_path)}: holds no document. Name data sets that do.")
    if parse_split(sets.split)[PARTS.index(name)] > 0:
        text = f"{sets.said}: the share for {SPOKEN[name]} is less than one document: there is none"
        report(Warned(f"{text}. Give it more, or make more documents of the text."))


def _eod(run: Run, tokenizer: Tokenizer) -> int | None:
    needed = run.data.reset_position_ids or run.data.reset_attention_mask or run.data.eod_mask_loss
    return tokenizer.eod if needed else None


def _check_amount(corpus: Corpus, name: str, num_samples: int, run: Run, survey: Survey) -> None:
    """Raise ValueError if a part has no token, or would be read too often; nothing is built yet."""
    part, prefix, sets = corpus.parts[name], corpus.indexed.prefix, corpus.sets
    num_tokens = tokens_of(prefix, part, corpus.indexed.lengths, survey)
    if not num_tokens:
        raise ValueError(
            f"{prefix}: the {len(part)} documents that {sets.said} leaves for {SPOKEN[name]} hold no token. "
            f"{'Change the split, or prepare' if sets.own is None else 'Prepare'} the text anew."
        )
    plan = plan_epochs(num_tokens, num_samples=num_samples, sequence_length=sequence_length(run))
    if plan.epochs > run.data.max_epochs:
        raise ValueError(
            f"--max-epochs = {run.data.max_epochs}: {prefix} has {num_tokens:,} tokens for {SPOKEN[name]} and would be "
            f"read {plan.epochs:,} times for {num_samples:,} samples. Give more text or fewer steps, or raise it."
        )


def _rows(
    corpus: Corpus, name: str, num_samples: int, run: Run, vocab_size: int, survey: Survey, report: Report
) -> CausalDataset:
    _check_amount(corpus, name, num_samples, run, survey)
    maps, made = load_or_build_index_maps(
        corpus.indexed.prefix,
        name,
        documents=corpus.parts[name],
        lengths=corpus.indexed.lengths,
        num_samples=num_samples,
        sequence_length=sequence_length(run),
        seed=run.train.seed,
        cache_path=run.data.data_cache_path,
        survey=survey,
    )
    for event in _maps_events(name, made):
        report(event)
    if name == "train" and (text := repeated_warning(corpus.indexed.prefix, made.plan.epochs)):
        report(Warned(text))
    return CausalDataset(corpus.indexed, maps, vocab_size=vocab_size)


def _maps_events(name: str, made: IndexMapsReport) -> list[Event]:
    events: list[Event] = []
    plan = made.plan
    if made.rebuilt_because:
        events.append(
            MapsBuilt(
                num_documents=made.num_documents,
                num_epochs=plan.epochs,
                seq_length=made.sequence_length,
                num_samples=plan.samples,
                samples_before_last_epoch=plan.samples_before_last_epoch if plan.separate_last_epoch else plan.samples,
                samples_per_epoch=plan.samples_per_epoch,
                last_epoch_samples=plan.last_epoch_samples,
                separate_last_epoch=plan.separate_last_epoch,
                document_seconds=made.seconds.get("doc_idx", 0.0),
                sample_seconds=made.seconds.get("sample_idx", 0.0),
                shuffle_seconds=made.seconds.get("shuffle_idx", 0.0),
            )
        )
    paths = {array: str(path) for array, path in made.paths.items()}
    events.append(
        MapsLoaded(
            part=SPOKEN[name],
            document_path=paths["doc_idx"],
            sample_path=paths["sample_idx"],
            shuffle_path=paths["shuffle_idx"],
            seconds=made.seconds["load"],
            num_samples=plan.samples,
            num_epochs=plan.epochs,
        )
    )
    return events


def blend_rows(
    rows: Sequence[SampleRows | None],
    weights: Sequence[float],
    corpora: Sequence[Corpus],
    run: Run,
    survey: Survey,
    report: Report,
) -> SampleRows:
    """The only data set, or the blend of those that have documents in this part. corpora: of the rows."""
    kept = [(row, weight) for row, weight in zip(rows, weights, strict=True) if row is not None]
    if len(kept) == 1:
        return kept[0][0]
    started = time.perf_counter()
    order = partial(load_or_build_blend, corpora[0].indexed.prefix, cache_path=run.data.data_cache_path, survey=survey)
    weights_kept = normalize([weight for _, weight in kept])
    blended = BlendedDataset([row for row, _ in kept], weights_kept, order=order)
    shares = tuple(int(count) / max(1, len(blended)) for count in blended.blend.taken)
    report(BlendBuilt(tuple(blended.weights), shares, time.perf_counter() - started))
    return blended
