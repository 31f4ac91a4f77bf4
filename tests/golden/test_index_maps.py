"""Index maps are Megatron-LM's, bit for bit, and so are the samples they cut."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megalith.data.causal import CausalDataset
from megalith.data.index_cache import load_or_build_index_maps
from megalith.data.index_maps import IndexMaps
from megalith.data.indexed import IndexedDataset, IndexedWriter

RECORDED = json.loads((Path(__file__).parent / "data" / "gpt_index_maps.json").read_text())
CASES: list[dict[str, Any]] = RECORDED["cases"]
ARRAYS = ("doc_idx", "sample_idx", "shuffle_idx")


def named(case: dict[str, Any]) -> str:
    return f"{case['corpus']}-{case['num_samples']}x{case['seq_length']}-{case['seed']}-{case['name']}"


def lengths_of(corpus: str) -> NDArray[np.int32]:
    return np.array(RECORDED["corpora"][corpus]["lengths"], np.int32)


def built(folder: Path, case: dict[str, Any]) -> IndexMaps:
    """The maps as a run has them: built, kept in the folder and mapped from there."""
    maps, report = load_or_build_index_maps(
        folder / "corpus",
        "train",
        documents=range(*case["documents"]),
        lengths=lengths_of(case["corpus"]),
        num_samples=case["num_samples"],
        sequence_length=case["seq_length"],
        seed=case["seed"],
    )
    assert report.rebuilt_because
    return maps


@pytest.mark.parametrize("case", [case for case in CASES if "raises" not in case], ids=named)
def test_maps_are_bit_identical(golden: Path, tmp_path: Path, case: dict[str, Any]) -> None:
    maps = built(tmp_path, case)
    assert maps.epochs == case["num_epochs"]
    assert maps.separate_last_epoch == case["separate_last_epoch"]
    assert maps.plan.tokens_per_epoch == case["tokens_per_epoch"]
    assert len(maps) == case["len_dataset"]
    assert len(maps.sample_idx) == case["printed_total_number_of_samples"]
    for name in ARRAYS:
        array = getattr(maps, name)
        if "npz" in case:
            expected = np.load(golden / case["npz"], allow_pickle=False)[name]
            assert array.dtype == expected.dtype and np.array_equal(array, expected), name
        else:
            assert array.dtype == case[name]["dtype"] and list(array.shape) == case[name]["shape"], name
            assert hashlib.sha256(array.tobytes()).hexdigest() == case[name]["sha256_raw_bytes"], name


@pytest.mark.parametrize("case", [case for case in CASES if "samples" in case], ids=named)
def test_samples_are_identical(tmp_path: Path, case: dict[str, Any]) -> None:
    lengths = lengths_of(case["corpus"])
    documents = [(131 * number + 17 * np.arange(length) + 7) % 50000 for number, length in enumerate(lengths)]
    with IndexedWriter(tmp_path / "corpus", np.uint16) as writer:
        writer.add_documents(lengths, np.ones(len(lengths), int), np.concatenate(documents))
    dataset = CausalDataset(IndexedDataset(tmp_path / "corpus"), built(tmp_path, case), vocab_size=50000)
    assert len(dataset) == case["len_dataset"]
    numbers = np.array([int(number) for number in case["samples"]])
    together = dataset.batch(numbers)
    for row, (number, expected) in zip(together, case["samples"].items(), strict=True):
        tokens = dataset.sample(int(number))
        assert np.array_equal(row, tokens)
        if isinstance(expected, list):
            assert tokens.tolist() == expected
        else:
            assert len(tokens) == expected["len"]
            assert hashlib.sha256(tokens.tobytes()).hexdigest() == expected["sha256_int64"]


@pytest.mark.parametrize("case", [case for case in CASES if "raises" in case], ids=named)
def test_what_only_an_assertion_forbade_is_built(tmp_path: Path, case: dict[str, Any]) -> None:
    """Its check refuses one sample more than an epoch has, which the last epoch can give: the log shows such maps."""
    assert case["raises"] == "AssertionError: last epoch number of samples exceeded max value."
    plan = built(tmp_path, case).plan
    assert plan.last_epoch_samples == plan.samples_per_epoch + 1
    assert plan.samples >= case["num_samples"]


@pytest.mark.parametrize(
    ("documents", "requested", "epochs", "rows", "separate"),
    [
        (range(0, 812), 64000, 13508, 64005, True),
        (range(812, 913), 1280, 2174, 1281, False),
        (range(913, 1014), 640, 1087, 641, False),
    ],
)
def test_the_small_corpus_of_the_log_gives_its_numbers(
    tmp_path: Path, documents: range, requested: int, epochs: int, rows: int, separate: bool
) -> None:
    case = {"corpus": "F_log1014", "documents": (documents.start, documents.stop), "num_samples": requested}
    maps = built(tmp_path, {**case, "seq_length": 1024, "seed": 1234})
    assert (maps.epochs, len(maps.sample_idx), maps.separate_last_epoch) == (epochs, rows, separate)
