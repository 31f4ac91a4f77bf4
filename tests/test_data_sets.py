"""A part of the data that has data sets of its own: what it reads, and what becomes of the rest."""

import json
from pathlib import Path

import numpy as np
import pytest

from megalith.check import check
from megalith.cli import main
from megalith.config import compose, overlay
from megalith.data.causal import CausalBatches
from megalith.data.indexed import IndexedWriter, open_indexed
from megalith.data.survey import nothing
from megalith.data_sets import data_sets, split_of
from megalith.datasets import build_causal_parts
from megalith.monitor.events import CorpusSplit, Event
from megalith.sentence_datasets import build_sentence_rows
from megalith.sources import read_command_line
from tests.layouts.runs import MODEL, events_of, run_on, steps_of
from tests.test_amounts import megalith
from tests.test_sentence_datasets import FirstTokens

# Where the tokens of each file begin; there are 40 kinds in each.
FIRST = {"a": 0, "b": 40, "c": 80}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Prefixes of token files that have no token in common, of 50, 20 and 10 documents."""
    folder = tmp_path_factory.mktemp("files")
    for (name, first), documents in zip(FIRST.items(), (50, 20, 10), strict=True):
        with IndexedWriter(folder / name, np.uint16) as writer:
            for number in range(documents):
                writer.add_document([first + (np.arange(30) + number) % 40])
    return {name: str(folder / name) for name in FIRST}


def owners(batches: CausalBatches, count: int) -> set[str]:
    """The files of which so many samples of a part are."""
    samples = np.arange(count)
    tokens = batches.read(samples, samples)["tokens"]
    return {name for name, first in FIRST.items() if ((tokens >= first) & (tokens < first + 40)).any()}


def test_each_part_reads_its_own_data_sets_whole(files: dict[str, str]) -> None:
    settings = {
        "data_path": (files["a"],),
        "valid_data_path": (files["b"],),
        "test_data_path": ("1", files["b"], "3", files["c"]),
        "seq_length": 16,
    }
    said: list[Event] = []
    targets = {"train": 90, "valid": 30, "test": 24}
    parts = build_causal_parts(
        compose("gpt", settings),
        object(),  # type: ignore[arg-type]
        vocab_size=120,
        targets=targets,
        report=said.append,
        moved=nothing,
    )
    assert {name: owners(batches, targets[name]) for name, batches in parts.items()} == {
        "train": {"a"},
        "valid": {"b"},
        "test": {"b", "c"},
    }
    splits = [event for event in said if isinstance(event, CorpusSplit)]
    bounds = [[(part.first, part.end) for part in split.parts] for split in splits]
    assert bounds == [
        [(0, 50), (50, 50), (50, 50)],
        [(0, 0), (0, 20), (20, 20)],
        [(0, 0), (0, 0), (0, 20)],
        [(0, 0), (0, 0), (0, 10)],
    ]


@pytest.mark.parametrize(
    ("split", "own", "left"),
    [
        ("969, 30, 1", (), "969, 30, 1"),
        ("969, 30, 1", ("valid_data_path",), "969,0, 1"),
        ("90/5/5", ("valid_data_path", "test_data_path"), "90,0,0"),
        ("100", ("test_data_path",), "100,0,0"),
    ],
)
def test_a_part_of_its_own_leaves_its_share_to_the_others(split: str, own: tuple[str, ...], left: str) -> None:
    run = compose("gpt", {"data_path": ("x",), "split": split} | {name: ("y",) for name in own})
    assert split_of(run) == left
    assert sorted(part for sets in data_sets(run) for part in sets.parts) == ["test", "train", "valid"]


def test_sentences_of_a_part_are_of_its_own_data_set(tmp_path: Path) -> None:
    prefixes = {}
    for name, first in (("train", 5), ("valid", 25)):
        prefixes[name] = str(tmp_path / name)
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            for _ in range(12):
                writer.add_document([[first] * 4, [first + 1] * 4])
    run = compose("bert", {"data_path": (prefixes["train"],), "valid_data_path": (prefixes["valid"],)})
    parts = build_sentence_rows(
        run,
        longest=14,
        least=2,
        vocab_size=60,
        make_rows=FirstTokens,
        targets={"train": 24, "valid": 6, "test": 0},
        report=lambda event: None,
        moved=nothing,
    )
    firsts = {name: set(rows.batch(np.arange(len(rows)))[:, 0].tolist()) for name, rows in parts.items()}
    assert firsts["train"] <= {5, 6} and firsts["valid"] <= {25, 26}


WORDS = "--train-iters 6 --eval-interval 3 --eval-iters 2 --save-interval 3".split()


def test_training_is_that_of_a_run_that_keeps_nothing_back(files: dict[str, str], tmp_path: Path) -> None:
    plain, own = tmp_path / "plain", tmp_path / "own"
    assert run_on(1, [*WORDS, "--split", "100,0,0"], plain, Path(files["a"])) == 0
    beside = [*WORDS, "--split", "80,20,0", "--valid-data-path", files["b"]]
    assert run_on(1, beside, own, Path(files["a"])) == 0
    assert [step["losses"] for step in steps_of(own)] == [step["losses"] for step in steps_of(plain)]
    assert not events_of(plain, "evaluated") and len(events_of(own, "evaluated")) == 3


def test_another_validation_is_told_and_another_training_refused(files: dict[str, str], tmp_path: Path) -> None:
    save, data = tmp_path / "run", Path(files["a"])
    words = [*WORDS, "--valid-data-path", files["b"]]
    assert run_on(1, [*words, "--exit-interval", "3"], save, data) == 0
    words[-1] = files["c"]
    assert run_on(1, words, save, data) == 0
    [told] = [line["text"] for line in events_of(save, "line") if "settings that differ" in line["text"]]
    assert "--valid-data-path is" in told
    # Without one of its own the validation takes documents from the training.
    with pytest.raises(BaseException, match="--split was 969,0, 1 and is 969, 30, 1"):
        run_on(1, [*WORDS, "--train-iters", "9", "--override-lr-scheduler"], save, data)


def test_evaluate_measures_a_part_of_its_own(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "run"
    assert run_on(1, [*WORDS, "--valid-data-path", files["b"]], save, Path(files["a"])) == 0

    def measured(*words: str) -> tuple[int, float]:
        assert main(["evaluate", str(save), "--json", *words]) == 0
        report = json.loads(capsys.readouterr().out)
        return report["tokens"], report["loss"]

    assert measured("--split", "valid") == measured("--file", files["b"])
    assert measured("--split", "valid")[0] == len(open_indexed(files["b"]).tokens) - 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--valid-data-path nowhere", "--valid-data-path: no token file with the prefix nowhere"),
        ("--valid-data-path 1 a 2", "--valid-data-path = 1 a 2: has 3 words"),
        ("--test-data-path x a 2 b", "--test-data-path = x a 2 b: "),
        ("--split 0,100,0 --valid-data-path {b}", "--split = 0,100,0: leaves nothing of --data-path for training"),
        ("--valid-data-path {empty}", "holds no document"),
    ],
)
def test_what_cannot_be_is_refused_by_name(words: str, said: str, files: dict[str, str], tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "empty", np.uint16):
        pass
    given = words.format(**files, empty=tmp_path / "empty").split()
    done = megalith("pretrain", *MODEL, *WORDS, "--save", str(tmp_path / "run"), "--data-path", files["a"], *given)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("other", ["--mock-data", "--corpus python --save run --save-interval 9"])
def test_made_up_tokens_and_a_corpus_have_no_data_sets_beside_them(other: str) -> None:
    words = [*MODEL, *WORDS, *other.split(), "--valid-data-path", "x"]
    faults = [str(fault) for fault in check(read_command_line(words), 1)]
    assert any("--valid-data-path" in fault and f"contradicts {other.split()[0]}" in fault for fault in faults), faults
    # On the command line they take the place of what a run file names.
    named = {"data_path": ("a",), "valid_data_path": ("b",)}
    assert "valid_data_path" not in overlay([named, {other.split()[0].strip("-").replace("-", "_"): "x"}])
