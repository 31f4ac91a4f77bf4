"""How much data a run asks for: blends as Megatron-LM asks for them, and a run that would outlast its data."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megalith.data.index_file import encode_index
from megalith.data.indexed import IndexedWriter, open_indexed
from tests.images import write_images
from tests.layouts.runs import MODEL, run_on, steps_of

SHORT = ["--eval-iters", "0", "--log-format", "reference"]


def megalith(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "megalith", *words], capture_output=True, text=True, timeout=120)


def token_file(folder: Path, name: str, documents: Sequence[int]) -> str:
    """The prefix of a token file with documents of so many tokens."""
    with IndexedWriter(folder / name, np.uint16) as writer:
        for length in documents:
            writer.add_document([np.arange(length) % 256])
    return str(folder / name)


def test_one_data_set_with_a_weight_is_a_blend_of_one(data: Path, tmp_path: Path) -> None:
    words = [*MODEL, *SHORT, "--exit-before-training", "--train-iters", "500", "--data-cache-path", str(tmp_path)]
    for given, samples in (([str(data)], 4000), (["2.5", str(data)], 4020)):
        done = megalith("pretrain", *words, "--data-path", *given)
        assert done.returncode == 0, done.stderr
        assert f"train_indexmap_{samples}ns_" in done.stdout


def test_a_data_set_without_documents_leaves_its_share_to_the_others(tmp_path: Path) -> None:
    lonely, many = token_file(tmp_path, "lonely", [40]), token_file(tmp_path, "many", [40] * 30)
    words = [*MODEL, *SHORT, "--train-iters", "12", "--split", "40,60,0"]
    done = megalith("pretrain", *words, "--data-path", "0.9", lonely, "0.1", many)
    assert done.returncode == 0, done.stderr
    assert f"{lonely} has no document for train: the other data sets take its share" in done.stdout
    assert " iteration       12/      12 " in done.stdout


def test_a_part_that_no_data_set_of_a_blend_has_is_taken_by_none(data: Path, tmp_path: Path) -> None:
    words = [*MODEL, "--exit-before-training", "--train-iters", "5", "--data-cache-path", str(tmp_path)]
    for split, warnings in (("100,0,0", 0), ("99999,1,0", 1)):
        done = megalith("pretrain", *words, "--split", split, "--data-path", "0.3", str(data), "0.7", str(data))
        assert done.returncode == 0, done.stderr
        assert "take its share" not in done.stdout
        assert done.stdout.count("less than one document") == warnings


def test_a_file_that_megatron_merged_is_read_by_its_items(tmp_path: Path) -> None:
    merged = token_file(tmp_path, "merged", [40] * 30)
    index = open_indexed(merged)
    # Its merge keeps the document index of the first file alone.
    content = b"".join(encode_index(index.dtype, index.lengths, index.document_index[:11]))
    Path(f"{merged}.idx").write_bytes(content)
    done = megalith("pretrain", *MODEL, *SHORT, "--train-iters", "3", "--data-path", merged)
    assert done.returncode == 0, done.stderr
    assert "the document index ends early" in done.stdout and "number of documents: 30" in done.stdout
    with pytest.raises(ValueError, match="Megatron-LM's merge"):
        open_indexed(merged)


def test_a_run_that_would_outlast_its_data_does_not_start(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    words = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --img-dim 12 --patch-dim 4 --num-classes 3".split()
    words += "--seq-length 9 --max-position-embeddings 10 --micro-batch-size 1 --global-batch-size 8 --lr 1e-3".split()
    words += ["--data-path", str(images), "--dataloader-type", "single", "--eval-iters", "0", "--device", "cpu"]
    done = megalith("pretrain", "vit", *words, "--train-iters", "600")
    assert done.returncode == 2
    assert "--train-iters = 600" in done.stderr and "--dataloader-type cyclic" in done.stderr
    assert "Traceback" not in done.stderr and "elapsed time per iteration" not in done.stdout


def test_a_run_that_goes_on_with_smaller_batches_says_when_its_data_would_end(tmp_path: Path) -> None:
    prefix, save = token_file(tmp_path, "few", [30] * 70), tmp_path / "run"
    words = ["--train-iters", "16", "--lr-decay-style", "constant", "--save-interval", "4", "--split", "100,0,0"]
    words += ["--eval-iters", "0"]
    assert run_on(1, [*words, "--global-batch-size", "64", "--exit-interval", "4"], save, Path(prefix)) == 0
    words = [*MODEL, *words, "--data-path", prefix, "--save", str(save), "--override-lr-scheduler"]
    done = megalith("pretrain", *words)
    assert done.returncode == 2
    assert "256 samples were taken in 4 steps, and the data set ends after 131, in step 5" in done.stderr
    assert "keep the --global-batch-size of before" in done.stderr
    assert len(steps_of(save)) == 4
