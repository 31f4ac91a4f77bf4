"""Data files that are cut short while they are read: every rank ends with a sentence that names the file."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megalith.data.indexed import IndexedDataset, IndexedWriter
from megalith.data.inverse_cloze import ClozeBatches
from megalith.data.marked import Marks
from megalith.data.pairs import PairRows
from megalith.data.sentence_rows import SentenceRows
from megalith.data.spans import SpanRows
from tests.processes import MARK, marked, seconds_until_gone

TRAINING = """
    pretrain --num-layers 1 --hidden-size 16 --num-attention-heads 1 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --tokenizer-type ByteLevelTokenizer --train-iters 20000
    --save-interval 20000 --log-interval 1 --eval-interval 20000 --eval-iters 1 --split 100,0,0 --device cpu
""".split()
ROOT = Path(__file__).parent.parent


def write_tokens(prefix: Path) -> None:
    """A token file of 2,000 documents: many pages of memory."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for number in range(2000):
            writer.add_document([np.arange(number, number + 60) % 256])


@pytest.mark.parametrize(
    ("ending", "ranks"),
    [
        ("bin", 2),
        pytest.param("bin", 1, marks=pytest.mark.slow),
        pytest.param("idx", 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_token_file_is_cut_short_names_it(ending: str, ranks: int, tmp_path: Path) -> None:
    write_tokens(tmp_path / "data")
    mark, run, file = uuid.uuid4().hex, tmp_path / "run", tmp_path / f"data.{ending}"
    size = file.stat().st_size
    words = [*TRAINING, "--data-path", str(tmp_path / "data"), "--save", str(run)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cut_file", str(file), str(ranks), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, MARK: mark, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
    )
    try:
        _, said = process.communicate(timeout=150)
        seconds_until_gone(mark)
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
    assert (run / "log.jsonl").read_text().count('"step_done"') >= 1
    told = f"megalith: {file}: was cut short while it was read: it had {size} bytes when it was opened and has 0. "
    assert process.returncode == 2 and any(line.startswith(told) for line in said.splitlines()), said
    assert "Traceback" not in said and "Bus error" not in said


def cloze(sentences: SentenceRows) -> ClozeBatches:
    marks = Marks(length=8, cls=0, sep=1, pad=2)
    file = sentences.indexed
    titles = IndexedDataset(file.prefix.with_name("titles"))
    return ClozeBatches(file, titles, sentences.rows, marks=marks, kept_share=0.1, seed=1, vocab_size=256)


RULE: Any = SimpleNamespace(length=8, encoder_length=8, decoder_length=8)  # as far as it is asked before a file is read
READERS: dict[str, Callable[[SentenceRows, Any], Any]] = {
    "pairs": lambda rows, at: PairRows(rows, RULE).batch(at),
    "spans": lambda rows, at: SpanRows(rows, RULE).batch(at),
    "inverse cloze": lambda rows, at: cloze(rows).read(at, at),
}


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("task", READERS)
def test_batches_of_sentences_look_first(task: str, ending: str, tmp_path: Path) -> None:
    for name in ("data", "titles"):
        write_tokens(tmp_path / name)
    rows = SentenceRows(IndexedDataset(tmp_path / "data"), np.array([[0, 2, 0, 0]]), seed=1, vocab_size=256)
    os.truncate(tmp_path / f"data.{ending}", 4096)
    with pytest.raises(ValueError, match=rf"data\.{ending}: was cut short while it was read: .* has 4096\. "):
        READERS[task](rows, np.array([0]))
