"""megalith index: a trained tower embeds all passages of an evidence file, over any number of ranks.

The passages are cut into spans by their numbers alone. Each is written whole as a small file of embeddings, and at the
end all are joined into one. So what was embedded when the command was killed is found by the next start, with
whichever number of ranks.
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from megalith.agreement import require_same
from megalith.asked import EMBEDDING_DTYPES
from megalith.data.evidence import Passage, check_passages, read_passages
from megalith.data.survey import Survey
from megalith.evaluate.embeddings import Embeddings, open_embeddings, write_block, write_joined
from megalith.files import DISK, TEMPORARY_SUFFIX, Disk, make_directories
from megalith.launch import as_program, end_with_parent, launch
from megalith.parallel.mesh import Layout, choose_device, joined, make_layout
from megalith.parallel.settings import ParallelConfig
from megalith.ranks import Ranks
from megalith.terminal import counted
from megalith.trained import run_of
from megalith.trained_retrieval import TrainedRetriever, digest_of_weights, embed, open_retriever
from megalith.turns import in_turns

SPAN_BATCHES = 16  # batches of a span: what a killed rank loses at most
# Seconds that ranks wait for each other: after a start on another number of ranks one may find all its spans there
# while another has to embed for hours. A rank that is lost ends the others through what started them.
LONGEST_WAIT = 24 * 3600.0


@dataclass(frozen=True)
class Work:
    """What is to be embedded, how, and where the vectors go."""

    retriever: TrainedRetriever
    evidence: str
    path: Path
    batch: int  # passages embedded at once
    log_interval: int  # batches
    sample_rate: float
    dtype: str
    made_from: Mapping[str, Any]

    @property
    def tower(self) -> nn.Module:
        return self.retriever.model.context

    @property
    def folder(self) -> Path:
        """Where the spans lie until all are there."""
        return self.path.with_name(f"{self.path.name}.parts")

    def span(self, number: int) -> Path:
        return self.folder / f"{number:08}"


def main(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Embed the evidence as the words say, of which options were made; return the exit status."""
    if options.nproc is not None and "RANK" not in os.environ:
        command = as_program("megalith", "index", *words)
        return launch(command, options.nproc, stop_grace=ParallelConfig().stop_grace, effect="end")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun leaves its ranks behind when it is killed.
        end_with_parent()
    layout = make_layout(os.environ, tensor=1, pipeline=1)
    with joined(layout, choose_device(options.device, layout.local_rank), timeout=LONGEST_WAIT):
        work = plan(options, layout)
        told = {"--embedding-path": work.path, "--indexer-log-interval": work.log_interval, **work.made_from}
        rule = "all ranks must embed the same. Give every node the same command."
        require_same({name: str(value) for name, value in told.items()}, rule)
        make_index(work, layout)
    return 0


def plan(options: argparse.Namespace, layout: Layout) -> Work:
    """What the words and the run together ask for. Raises ValueError for what is missing or unfit."""
    run = run_of(options.run)

    def given(name: str, otherwise: Any) -> Any:
        value = getattr(options, name)
        return otherwise if value is None else value

    evidence = given("evidence_data_path", run.data.evidence_data_path)
    path = given("embedding_path", run.evaluate.embedding_path)
    batch = given("indexer_batch_size", run.evaluate.indexer_batch_size)
    interval = given("indexer_log_interval", run.evaluate.indexer_log_interval)
    rate = options.sample_rate
    faults = [
        f"--{name}: is required and was not given. Add it." for name, value in _needed(evidence, path) if not value
    ]
    for name, count in (("indexer-batch-size", batch), ("indexer-log-interval", interval)):
        if count < 1:
            faults.append(f"--{name} = {count}: must be greater than 0. Give a positive number.")
    if not 0 < rate <= 1:
        faults.append(f"--sample-rate = {rate}: must be above 0 and at most 1. Give such a share.")
    if evidence and not Path(evidence).is_file():
        faults.append(f"--evidence-data-path = {evidence}: is not a file. Correct the path.")
    if path and not Path(path).parent.is_dir():
        faults.append(f"--embedding-path = {path}: there is no directory {Path(path).parent}. Make it.")
    if faults:
        raise ValueError("\n".join(faults))
    retriever = open_retriever(
        options.run,
        step=options.step,
        device=options.device,
        length=options.retriever_seq_length,
        local_rank=layout.local_rank,
    )
    made_from = {
        "weights": digest_of_weights(retriever.model.context),
        "step": retriever.step,
        "tokenizer": retriever.tokenizer.digest,
        "evidence": in_turns(lambda survey: survey.digest(Path(evidence))).digest,
        "sample_rate": rate,
        "seed": run.train.seed,
        "length": retriever.marks.length,
        "batch": batch,
        "dtype": options.embedding_dtype,
    }
    return Work(retriever, evidence, Path(path), batch, interval, rate, options.embedding_dtype, made_from)


def _needed(evidence: str | None, path: str | None) -> list[tuple[str, str | None]]:
    return [("evidence-data-path", evidence), ("embedding-path", path)]


def make_index(work: Work, layout: Layout, *, disk: Disk = DISK) -> None:
    """Embed what is not embedded yet, and join it all. Every rank calls it.

    Raises ValueError if there is a file of other embeddings already, or the evidence is damaged or empty.
    """
    if work.path.exists():
        if open_embeddings(work.path).made_from != work.made_from:
            raise ValueError(
                f"--embedding-path = {work.path}: holds other embeddings. Remove it, or name another file."
            )
        if layout.rank == 0:
            clear(work.folder, disk=disk)  # the last start may have been killed between the two
        _say(layout, f"{work.path} is there already, made of the same weights and passages")
        return
    # Whatever is wrong with a passage is found before the first is embedded.
    count = in_turns(partial(_checked, work))
    make_directories(work.folder, disk=disk)
    embed_spans(work, layout, disk=disk)
    _wait(layout)
    if layout.rank == 0:
        join_spans(work, count, disk=disk)
        share = f", chosen by --sample-rate {work.sample_rate:g}," if work.sample_rate < 1 else ""
        _say(layout, f"{counted(count, 'passage')}{share} {'is' if count == 1 else 'are'} embedded in {work.path}")
    _wait(layout)


def _checked(work: Work, survey: Survey) -> int:
    """The number of passages, each looked at by one rank of those that see the same file."""
    rate, seed = work.sample_rate, int(work.made_from["seed"])
    look = partial(check_passages, work.evidence, sample_rate=rate, seed=seed)
    count: int = survey.find(f"passages, {rate} of them by seed {seed}", look, work.evidence)
    return count


def embed_spans(work: Work, layout: Layout, *, disk: Disk) -> None:
    """Embed the spans of this rank that are not there yet."""
    size = work.batch * SPAN_BATCHES
    passages = read_passages(work.evidence, sample_rate=work.sample_rate, seed=int(work.made_from["seed"]))
    progress = _Progress(work, layout)
    for number, span in groupby(passages, lambda passage: passage.number // size):
        if number % layout.world_size != layout.rank:
            continue
        held = list(span)
        if _is_there(work, number, held):
            progress.found(len(held))
            continue
        vectors = [vectors for batch in _batches(held, work.batch) for vectors in progress.embedded(batch)]
        rows = np.concatenate(vectors).astype(EMBEDDING_DTYPES[work.dtype])
        ids = np.array([passage.id for passage in held], np.int64)
        if not np.isfinite(rows).all():
            wrong = int(ids[~np.isfinite(rows).all(1)][0])
            raise ValueError(
                f"passage {wrong}: its vector is not finite in {work.dtype}; --embedding-dtype fp32 is wider"
            )
        write_block(work.span(number), ids, rows, {**work.made_from, "span": number}, disk=disk)


def _batches(held: list[Passage], size: int) -> Iterator[list[Passage]]:
    for first in range(0, len(held), size):
        yield held[first : first + size]


class _Progress:
    """Embeds batches and says how far the first rank is, in Megatron-LM's words; others do as much in the same time."""

    def __init__(self, work: Work, layout: Layout) -> None:
        self._work, self._layout = work, layout
        self._batches = self._total = 0

    def found(self, count: int) -> None:
        self._batches += -(-count // self._work.batch)
        self._total += count * self._layout.world_size

    def embedded(self, batch: list[Passage]) -> Iterator[Any]:
        tokenizer, marks = self._work.retriever.tokenizer, self._work.retriever.marks
        ids = tokenizer.encode_batch([text for passage in batch for text in (passage.title, passage.text)])
        sequences = [marks.mark(*ids[place : place + 2]) for place in range(0, len(ids), 2)]
        yield embed(self._work.tower, marks, sequences)
        self._batches += 1
        self._total += len(batch) * self._layout.world_size
        if self._batches % self._work.log_interval == 0:
            _say(self._layout, f"Batch {self._batches:10d} | Total {self._total:10d}")


def _is_there(work: Work, number: int, held: list[Passage]) -> bool:
    """Whether a span was embedded by an earlier start; what is damaged or of other weights is embedded again."""
    if not work.span(number).exists():
        return False
    with suppress(ValueError):
        found = open_embeddings(work.span(number))
        return found.made_from == {**work.made_from, "span": number} and found.ids.tolist() == [p.id for p in held]
    return False


def join_spans(work: Work, count: int, *, disk: Disk) -> None:
    """Make one file of all spans, then remove them. Raises ValueError for one that is missing or damaged."""
    parts: list[Embeddings] = []
    held = 0  # passages
    while held < count:
        if not work.span(len(parts)).exists():
            raise ValueError(f"{work.span(len(parts))}: is missing; all ranks must write to the same directory")
        parts.append(open_embeddings(work.span(len(parts))))
        held += len(parts[-1])
    assert held == count, "spans are cut alike by all ranks"
    for remains in work.path.parent.glob(f".{work.path.name}.*{TEMPORARY_SUFFIX}"):
        disk.remove(remains)
    write_joined(work.path, parts, work.made_from, disk=disk)
    clear(work.folder, disk=disk)


def clear(folder: Path, *, disk: Disk) -> None:
    """Remove the folder of the spans, if it is there; nothing else lies in it."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            disk.remove(path)
        disk.remove_directory(folder)


def _wait(layout: Layout) -> None:
    if layout.world_size > 1:
        Ranks().wait_for_all()


def _say(layout: Layout, text: str) -> None:
    if layout.rank == 0:
        print(text, flush=True)
