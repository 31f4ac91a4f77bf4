"""Many ranks open the same data: what takes long is done once, what one finds wrong ends all, none waits for ever."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megalith import turns
from megalith.config import ConfigError, Run, compose
from megalith.data import index_cache, index_file, survey
from megalith.data.blend import Blend, BlendedDataset, blend_order
from megalith.data.causal import CausalBatches
from megalith.data.indexed import IndexedWriter, bin_path, idx_path
from megalith.data.record import write_record
from megalith.data.survey import Survey, nothing
from megalith.datasets import build_causal_parts, identify_token_files
from megalith.monitor.events import BlendBuilt, Event, MapsBuilt
from megalith.ranks import Ranks
from megalith.turns import in_turns
from tests.ranks import run_ranks

HOSTS = ("a", "a", "b", "b")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Of a token file with a record."""
    prefix = tmp_path / "corpus"
    with IndexedWriter(prefix, np.uint16) as writer:
        for number in range(40):
            writer.add_document([np.arange(number % 7, 30) % 50])
    tokenizer = {"type": "any", "digest": "known", "vocab_size": 50}
    write_record(prefix, {"megalith": "test", "tokenizer": tokenizer}, largest_token=29)
    return compose("gpt", {"data_path": (str(prefix),), "seq_length": 16, "split": "80,20,0"})


class Known:
    digests = ("known",)


def count_looks(patch: pytest.MonkeyPatch) -> Counter[str]:
    """From now on: how often this process reads a file to its end, goes through a table, or makes index maps."""
    looks: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            looks[name] += 1
            return real(*arguments, **named)

        patch.setattr(module, name, counting)

    counted(survey, "digest_of")
    counted(index_file, "_check_items")
    hashes = SimpleNamespace(sha256=hashlib.sha256)
    patch.setattr(index_cache, "hashlib", hashes)
    counted(hashes, "sha256")
    counted(index_cache, "make_arrays")
    return looks


def open_everything(run: Run, heard: list[Event]) -> dict[str, CausalBatches]:
    identify_token_files(run, Known(), vocab_size=50, report=heard.append)  # type: ignore[arg-type]
    return build_causal_parts(
        run,
        Known(),  # type: ignore[arg-type]
        vocab_size=50,
        targets={"train": 100, "valid": 20, "test": 0},
        report=heard.append,
        moved=nothing,
    )


def looks_of(run: Run, hosts: tuple[str, ...], seen: Callable[[Path, str], str] | None = None) -> list[Any]:
    """What each rank of these hosts had to look at, a batch of it, and whether it could say that maps were built."""

    def on_rank(rank: int) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(turns, "this_host", lambda: hosts[rank])
            if seen is not None:
                patch.setattr(survey, "seen", lambda path: seen(path, hosts[rank]))
            looks = count_looks(patch)
            heard: list[Event] = []
            parts = open_everything(run, heard)
            samples = np.arange(20)
            batch = parts["train"].read(samples, samples)["tokens"].tolist()
            return dict(looks), batch, sum(isinstance(event, MapsBuilt) for event in heard)

    return run_ranks(on_rank, len(hosts))


def test_one_rank_looks_and_builds_and_all_have_the_same_data(run: Run) -> None:
    first, *others = looks_of(run, HOSTS)
    # The .idx; of each of two parts three arrays, its lengths, and the maps.
    assert first[0] == {"digest_of": 7, "_check_items": 1, "sha256": 2, "make_arrays": 2}
    for looks, batch, built in others:
        assert not looks and batch == first[1] and built == first[2] == 2
    # At the next start the first checks all, and nothing is built.
    first, *others = looks_of(run, HOSTS)
    assert first[0] == {"digest_of": 7, "_check_items": 1, "sha256": 2} and first[2] == 0
    assert not any(looks for looks, _, _ in others)


def test_a_host_with_files_of_its_own_looks_at_them_once(run: Run) -> None:
    real = survey.seen
    all_of_it = {"digest_of": 7, "_check_items": 1, "sha256": 2}
    open_everything(run, [])
    told = looks_of(run, HOSTS, lambda path, host: f"{real(path)} of host {host}")
    assert [looks for looks, _, _ in told] == [all_of_it, {}, all_of_it, {}]


def test_a_single_process_looks_at_everything_at_every_start(run: Run) -> None:
    open_everything(run, [])
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            looks = count_looks(patch)
            open_everything(run, [])
            assert looks == {"digest_of": 7, "_check_items": 1, "sha256": 2}


def test_a_large_blend_is_made_once_and_mapped_by_all(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prefix,) = run.data.data_path or ()
    blended = replace(run, data=replace(run.data, data_path=("0.3", prefix, "0.7", prefix)))
    small = open_everything(blended, [])
    assert not list(tmp_path.glob("*_blend_*"))
    monkeypatch.setattr(index_cache, "FEWEST_KEPT", 100)

    def on_rank(rank: int) -> Any:
        made, heard = list[int](), list[Event]()

        def making(weights: Sequence[float], size: int) -> Blend:
            made.append(size)
            return blend_order(weights, size)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index_cache, "blend_order", making)
            parts = open_everything(blended, heard)
        rows = parts["train"].rows
        assert isinstance(rows, BlendedDataset)
        arrays = [array.tolist() for array in (rows.blend.datasets, rows.blend.samples, rows.blend.taken)]
        is_mapped = not rows.blend.samples.flags.writeable and rows.blend.samples.base is not None
        return made, is_mapped, arrays, rows.repeated, [event.achieved for event in heard if type(event) is BlendBuilt]

    rows = small["train"].rows
    assert isinstance(rows, BlendedDataset)
    right = [array.tolist() for array in (rows.blend.datasets, rows.blend.samples, rows.blend.taken)]
    size, small_size = len(rows), len(small["valid"].rows)
    assert size >= 100 > small_size
    for start in (0, 1):
        for rank, (made, is_mapped, arrays, repeated, shares) in enumerate(run_ranks(on_rank, 3)):
            assert made == ([size, small_size] if (start, rank) == (0, 0) else [small_size])
            assert is_mapped and arrays == right and repeated == rows.repeated and len(shares) == 2
            assert shares[0] == tuple(np.bincount(rows.blend.datasets) / size)
    files = {path.name.rpartition("_")[2] for path in tmp_path.glob("corpus_blend_*")}
    assert files == {"datasets.npy", "samples.npy", "taken.npy", "from.json"}


def flipped(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def test_what_one_rank_finds_damaged_ends_all(run: Run) -> None:
    (prefix,) = run.data.data_path or ()
    flipped(idx_path(prefix), 40)

    def on_rank(rank: int) -> str:
        said = []
        for opening in (
            lambda: identify_token_files(run, Known(), vocab_size=50, report=print),  # type: ignore[arg-type]
            lambda: open_everything(replace(run, data=replace(run.data, data_path=(prefix,))), []),
        ):
            with pytest.raises(ValueError) as raised:
                opening()
            said.append((type(raised.value).__name__, str(raised.value)))
        return str(said)

    first, *others = run_ranks(on_rank, 3)
    assert f"{idx_path(prefix)}: SHA-256" in first and "it was changed" in first
    assert others == ["[('ConfigError', ''), ('ConfigError', '')]"] * 2
    assert bin_path(prefix).exists()


@pytest.mark.parametrize("guilty", [0, 1, 2, 3])
def test_whichever_rank_fails_none_waits_for_it(guilty: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_rank(rank: int) -> list[str]:
        monkeypatch.setattr(turns, "this_host", lambda: HOSTS[rank])

        def work(survey: Survey) -> int:
            if rank == guilty:
                raise OSError(f"the disk of rank {rank} has failed")
            return rank

        with pytest.raises((OSError, ConfigError)) as raised:
            in_turns(work)
        # Another collective works: nobody is left in one of the turns.
        return [str(raised.value), *map(str, Ranks().gather(os.getpid() > 0))]

    ends = run_ranks(on_rank, 4)
    assert [end[0] for end in ends] == [
        f"the disk of rank {guilty} has failed" if n == guilty else "" for n in range(4)
    ]


def test_turns_are_taken_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_rank(rank: int) -> dict[str, Any]:
        monkeypatch.setattr(turns, "this_host", lambda: HOSTS[rank])

        def work(survey: Survey) -> dict[str, Any]:
            told = dict(survey.findings)
            assert survey.find("who looked for all", lambda: rank) == 0
            survey.find(f"who looked on {HOSTS[rank]}", lambda: rank)
            return told

        return in_turns(work)

    everyone = {"who looked for all": 0}
    assert run_ranks(on_rank, 4) == [
        {},
        {**everyone, "who looked on a": 0},
        {**everyone, "who looked on a": 0},
        {**everyone, "who looked on a": 0, "who looked on b": 2},
    ]
