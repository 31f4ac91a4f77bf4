"""What a loss is held against at the end of a run: no more data is read for it than it needs, by one rank."""

from collections import Counter
from dataclasses import replace
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megalith import closing
from megalith.config import Run
from megalith.data.causal import CausalBatches, CausalDataset
from megalith.data.index_maps import build_index_maps
from megalith.data.indexed import IndexedDataset, IndexedWriter
from megalith.evaluate.loss import unigram_entropy
from megalith.task import Baseline
from megalith.tasks import gpt


def opened(folder: Path) -> CausalBatches:
    """Two passes over 50 documents of 0 to 16 tokens."""
    with IndexedWriter(folder / "corpus", np.uint16) as writer:
        for number in range(50):
            writer.add_document([np.arange(number % 17) ** 2 % 11 + number % 5])
    indexed = IndexedDataset(folder / "corpus")
    documents = np.arange(50, dtype=np.int32)
    samples = 2 * indexed.num_tokens // 8 - 1
    maps = build_index_maps(documents, indexed.lengths, num_samples=samples, sequence_length=8, seed=1)
    assert maps.epochs == 2
    return CausalBatches(CausalDataset(indexed, maps, vocab_size=None), None, False, False, False)


def entropy_of(tokens: list[int]) -> float:
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    return -sum(share * log(share) for share in shares)


@pytest.mark.parametrize("most", [1, 40, 44, 45, 46, 10_000])
def test_reading_stops_when_enough_tokens_are_counted(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(tmp_path)
    monkeypatch.setattr(gpt, "MOST_COUNTED", most)
    read, taken = IndexedDataset.read, list[int]()

    def noting(indexed: IndexedDataset, item: int) -> Any:
        taken.append(len(read(indexed, item)))
        return read(indexed, item)

    monkeypatch.setattr(IndexedDataset, "read", noting)
    baseline = gpt.unigram_baseline(Run(), source)
    assert isinstance(source.rows, CausalDataset) and baseline is not None
    tokens = source.rows.indexed.tokens.tolist()  # whose documents lie in order
    assert baseline.value == pytest.approx(entropy_of(tokens[:most]), abs=1e-12)
    assert sum(taken) - taken[-1] < most


def test_the_entropy_is_that_of_the_frequencies() -> None:
    tokens = np.random.default_rng(1).zipf(1.5, 5000) % 300
    assert unigram_entropy(tokens) == pytest.approx(entropy_of(tokens.tolist()), rel=1e-12)


@pytest.mark.parametrize("speaks", [True, False])
def test_only_the_rank_that_speaks_reads_data_for_it(speaks: bool) -> None:
    run, asked, said = Run(), list[object](), list[str]()

    def chance(run: Run, source: object) -> Baseline:
        asked.append(source)
        return Baseline("lm loss", 2.0, "chance", "guessing")

    job: Any = SimpleNamespace(
        run=replace(run, evaluate=replace(run.evaluate, unigram_baseline=True)),
        validations=[(0, {"lm loss": 3.0}), (5, {"lm loss": 1.5})],
        task=SimpleNamespace(baseline=chance, losses=lambda run: ("lm loss",)),
        loaders={"valid": SimpleNamespace(source="its data")},
        log=SimpleNamespace(speaks=speaks, line=said.append),
    )
    closing._tell_losses(job)
    assert asked == (["its data"] if speaks else [])
    assert said[-1:] == (["chance: 2.000, guessing; the model is 0.500 below it"] if speaks else [])
